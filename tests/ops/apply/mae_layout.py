"""A model laid out as facebookresearch/mae, of timm's blocks: its names and mathematics, code of our own."""

import torch
from torch import Tensor, nn


class MaskedAutoencoder(nn.Module):
    def __init__(
        self, img_size=32, patch_size=8, embed_dim=48, depth=2, decoder_embed_dim=32, norm_pix_loss=True
    ):
        from timm.models.vision_transformer import Block, PatchEmbed

        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
        tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, 2, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_embed_dim) * 0.02)
        pos = torch.randn(1, tokens, decoder_embed_dim)
        self.decoder_pos_embed = nn.Parameter(pos, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, 2, qkv_bias=True) for _ in range(1))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * 3)
        self.norm_pix_loss = norm_pix_loss

    def patchify(self, imgs: Tensor) -> Tensor:
        p = self.patch_embed.patch_size[0]
        return imgs.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        B, N, D = x.shape
        kept = int(N * (1 - mask_ratio))
        order = torch.rand(B, N, device=x.device).argsort(dim=1)
        ids_restore = order.argsort(dim=1)
        visible = x.gather(1, order[:, :kept, None].expand(-1, -1, D))
        mask = torch.cat([x.new_zeros(B, kept), x.new_ones(B, N - kept)], dim=1).float()
        return visible, mask.gather(1, ids_restore), ids_restore

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(x)
        B, T, D = x.shape
        masks = self.mask_token.expand(B, ids_restore.shape[1] + 1 - T, -1)
        patches = torch.cat([x[:, 1:], masks], dim=1).gather(1, ids_restore[..., None].expand(-1, -1, D))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        return (((pred - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask
