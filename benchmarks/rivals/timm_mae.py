"""MAE made of timm's blocks, as the code of its authors is: `python -m benchmarks.rivals.timm_mae`.

All patches are embedded by a convolution, masks are an argsort of noise, the decoder's head reads all tokens
and the loss is a weighted sum over all patches. Weights carry the names of an MAE checkpoint.
`--apply` races it with the ops of fastmim_kernels put in, too. Where timm is absent the tests run this model
with blocks of our own in its place.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.provenance import import_torchvision
from benchmarks.rivals.race import Rival, main
from fastmim.methods.mae import MAE


def timm_block(width: int, heads: int) -> nn.Module:
    import_torchvision()  # timm does
    from timm.models.vision_transformer import Block

    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    return Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm)


class RivalMAE(nn.Module):
    """`(pixels [B, C, H, W], noise [B, N] or None) -> loss`. Patches with the least noise are seen."""

    def __init__(self, method: MAE, block: Callable[[int, int], nn.Module]):
        super().__init__()
        model, decoder, N = method.model, method.config.decoder, method.model.num_patches
        D, d = model.width, decoder.width
        self.patch, self.num_seen, self.norm_pix = model.patch, method.num_seen, method.config.norm_pix
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(model.channels, D, self.patch, self.patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + N, D), requires_grad=False)
        self.blocks = nn.ModuleList(block(D, model.heads) for _ in range(model.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed = nn.Linear(D, d)
        self.mask_token = nn.Parameter(torch.empty(1, 1, d))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + N, d), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(block(d, decoder.heads) for _ in range(decoder.depth))
        self.decoder_norm = nn.LayerNorm(d, eps=1e-6)
        self.decoder_pred = nn.Linear(d, model.patch_values)

    def forward(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        z, mask, restore = self.encode(pixels, noise)
        return self.loss(pixels, self.decode(z, restore), mask)

    def encode(self, pixels: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Encoding of the seen patches, 0/1 of the hidden ones, and where each patch went in the shuffle."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        B, N, D = x.shape
        noise = torch.rand(B, N, device=x.device) if noise is None else noise
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        seen = x.gather(1, shuffle[:, : self.num_seen, None].expand(-1, -1, D))
        mask = (restore >= self.num_seen).float()
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        z = torch.cat([cls, seen], dim=1)
        for block in self.blocks:
            z = block(z)
        return self.norm(z), mask, restore

    def decode(self, z: Tensor, restore: Tensor) -> Tensor:
        y = self.decoder_embed(z)
        B, N, d = len(y), restore.shape[1], y.shape[2]
        masks = self.mask_token.to(y.dtype).expand(B, N + 1 - y.shape[1], d)
        patches = torch.cat([y[:, 1:], masks], dim=1).gather(1, restore[..., None].expand(-1, -1, d))
        y = torch.cat([y[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            y = block(y)
        return self.decoder_pred(self.decoder_norm(y))[:, 1:]

    def loss(self, pixels: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        p = self.patch
        cells = pixels.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, h, p, w, p]
        target = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        if self.norm_pix:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


def build(method: MAE, block: Callable[[int, int], nn.Module] = timm_block) -> RivalMAE:
    """The rival with the weights of `method`; RuntimeError if a name or shape differs."""
    rival = RivalMAE(method, block)
    state = {name.partition(".")[2]: tensor for name, tensor in method.state_dict().items()}
    rival.load_state_dict(state)
    return rival


if __name__ == "__main__":
    sys.exit(main("timm", "timm", lambda method: Rival(build(method), method.model)))
