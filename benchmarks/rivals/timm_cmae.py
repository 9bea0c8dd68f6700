"""C-MAE made of timm's blocks and eager torch: `python -m benchmarks.rivals.timm_cmae`.

No code of C-MAE was ever published: this is how one would write it. All patches are embedded by a convolution
and hidden ones replaced, the logits of all positions exist at once, the teacher moves tensor by tensor.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rivals.race import Pixels, main
from benchmarks.rivals.timm_mae import timm_block
from fastmim.methods.cmae import CMAE
from fastmim.models.vit import ViTConfig
from fastmim.views import Batch


class RivalEncoder(nn.Module):
    """Mask tokens among the patches. Weights carry the names of ours."""

    def __init__(self, model: ViTConfig):
        super().__init__()
        D = model.width
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(model.channels, D, model.patch, model.patch)})
        self.cls_token, self.mask_token = (nn.Parameter(torch.empty(1, 1, D)) for _ in range(2))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + model.num_patches, D), requires_grad=False)
        self.blocks = nn.ModuleList(timm_block(D, model.heads) for _ in range(model.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, pixels: Tensor, hidden_BN: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.where(hidden_BN[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]


class RivalHead(nn.Sequential):
    """Two layers and a GELU between them."""

    def __init__(self, n_in: int, hidden: int, n_out: int):
        super().__init__(nn.Linear(n_in, hidden), nn.Linear(hidden, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](F.gelu(self[0](x)))


class RivalCMAE(nn.Module):
    """`(batch, noise [B, N] or None) -> loss`: the recipe's C-MAE, whose choices these are, on one device."""

    def __init__(self, method: CMAE):
        super().__init__()
        c, model = method.config, method.model
        self.temperature, self.num_seen, self.ema = c.temperature, method.num_seen, c.ema
        self.pixels = Pixels(model)
        self.encoder = RivalEncoder(model)
        self.projector = RivalHead(model.width, c.hidden, c.out)
        self.predictor = RivalHead(c.out, c.hidden, c.out)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        state = method.state_dict()
        self.load_state_dict(state | {f"pixels.{k}": v for k, v in self.pixels.state_dict().items()})

    def forward(self, batch: Batch, noise_BN: Tensor | None = None) -> Tensor:
        one, two = (self.pixels(view) for view in batch.crops)
        noise_BN = torch.rand(len(one), self.encoder.pos_embed.shape[1] - 1) if noise_BN is None else noise_BN
        rank_BN = noise_BN.to(one.device).argsort(1).argsort(1)
        hidden_BN = rank_BN >= self.num_seen
        q = self.predictor(self.projector(self.encoder(one, hidden_BN)))
        with torch.no_grad():
            k = self.target_projector(self.target_encoder(two, ~hidden_BN))
        q, k = (F.normalize(x.float(), dim=-1) for x in (q, k))
        logits_NBG = torch.einsum("bnd,gnd->nbg", q, k) / self.temperature
        labels = torch.arange(len(q), device=q.device).expand(logits_NBG.shape[:2])
        return F.cross_entropy(logits_NBG.flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def after_update(self) -> None:
        """The teacher's step."""
        for teacher, student in (
            (self.target_encoder, self.encoder),
            (self.target_projector, self.projector),
        ):
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.lerp_(s, 1 - self.ema)


if __name__ == "__main__":
    sys.exit(main("timm", "timm", RivalCMAE, of="cmae"))
