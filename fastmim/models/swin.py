"""Swin, of timm, as an encoder of `Tokens` with mask tokens: shifted windows in four stages.

    stage i of 4: tokens of patch 2^i pixels on each side, width 2^i D, heads 2^i, windows of `window` tokens

Source  Liu et al., arXiv:2103.14030; with mask tokens: SimMIM, arXiv:2111.09886. The model is timm's
        SwinTransformer and its state dict that of timm, beside mask_token.
Sizes   `ViTConfig` has width D and heads of the first stage, and depth 12 or more: 2, 2, depth - 6, 2 blocks.
        Swin-B is width 128, depth 24, heads 4, patch 4. The window is the largest of at most 7 tokens that
        divides every stage: 7 at 224 px, 6 at 192.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmim.models.init import truncated_normal
from fastmim.models.tokens import Encoded, Tokens
from fastmim.models.vit import ViTConfig

STRIDE = 8  # of a token of the last stage, in patches
LARGEST_WINDOW = 7


@dataclass(frozen=True)
class Stage:
    """One of the four stages: its grid of tokens, their width, its blocks."""

    rows: int
    columns: int
    width: int
    depth: int
    heads: int


def stages_of(c: ViTConfig) -> tuple[Stage, ...]:
    """The four stages; ValueError for sizes that no Swin has."""
    rows, columns = c.grid
    if rows % STRIDE or columns % STRIDE:
        raise ValueError(
            f"model.image-size: want multiples of {STRIDE * c.patch} px for swin with patch {c.patch}, "
            f"got {c.size[0]} x {c.size[1]}"
        )
    if c.depth < 8 or c.drop_path:
        raise ValueError(
            "model.depth, model.drop-path: want 8 blocks or more, and no drop path, for swin, "
            f"got {c.depth} and {c.drop_path}"
        )
    depths = 2, 2, c.depth - 6, 2
    return tuple(
        Stage(rows >> i, columns >> i, c.width << i, depth, c.heads << i) for i, depth in enumerate(depths)
    )


def window_of(c: ViTConfig) -> int:
    """Side of a window in tokens: the largest of at most 7 that divides every stage."""
    last = stages_of(c)[-1]
    return max(n for n in range(1, LARGEST_WINDOW + 1) if last.rows % n == 0 and last.columns % n == 0)


class SwinEncoder(nn.Module):
    """timm's Swin. A token of the last stage stands for 8 x 8 patches; there is no class token.

    ImportError if there is no timm.
    """

    def __init__(self, config: ViTConfig, mask_token: bool = False):
        super().__init__()
        self.config = config
        stages = stages_of(config)
        self.width = stages[-1].width
        swin = swin_transformer()(
            img_size=config.size, patch_size=config.patch, in_chans=config.channels, num_classes=0,
            global_pool="", embed_dim=config.width, depths=[s.depth for s in stages],
            num_heads=[s.heads for s in stages], window_size=window_of(config), drop_path_rate=0.0,
        )  # fmt: skip
        self.patch_embed, self.layers, self.norm = swin.patch_embed, swin.layers, swin.norm
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width)) if mask_token else None
        if self.mask_token is not None:
            truncated_normal(self.mask_token)

    def forward(self, *inputs: Tokens, seeds_B: Tensor | None = None) -> Encoded:
        """The last stage's tokens of one image, `[B, 36, 8 D]` at 192 px. ValueError for anything else."""
        if len(inputs) != 1 or inputs[0].seen_BK is not None:
            raise ValueError("want one image, whole or with mask tokens, for swin, got something else")
        (tokens,) = inputs
        c, image_BHWC, hidden_BN = self.config, tokens.image_BHWC, tokens.hidden_BN
        if image_BHWC.shape[1:] != (*c.size, c.channels):
            raise ValueError(
                f"want images {(*c.size, c.channels)} for swin, got {tuple(image_BHWC.shape[1:])}"
            )
        like = next(self.patch_embed.parameters())
        mean, std = (like.new_tensor(values, dtype=torch.float32) for values in (c.pixel_mean, c.pixel_std))
        pixels = ((image_BHWC.float() / 255 - mean) / std).to(like.dtype)
        x_BhwD = self.patch_embed(pixels.permute(0, 3, 1, 2))
        if hidden_BN is not None:
            if self.mask_token is None:
                raise ValueError("want an encoder with a mask token for hidden patches, got one without")
            hidden_Bhw1 = hidden_BN.view(x_BhwD.shape[:3])[..., None]
            x_BhwD = torch.where(hidden_Bhw1, self.mask_token[:, None], x_BhwD)
        z_BTD = self.norm(self.layers(x_BhwD)).flatten(1, 2)
        return Encoded(z_BTD, (z_BTD.shape[1],))


def swin_transformer() -> Any:
    """timm's SwinTransformer. ImportError says what is missing."""
    try:
        from timm.models.swin_transformer import SwinTransformer
    except ImportError as error:
        raise ImportError(f"swin: want timm, as `pip install timm` has it, got: {error}") from error
    return SwinTransformer
