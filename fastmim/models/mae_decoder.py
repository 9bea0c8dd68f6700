"""MAE's decoder: mask tokens where nothing was seen, a narrow transformer, a linear map to pixels.

Source  He et al., arXiv:2111.06377; facebookresearch/mae, models_mae.py.
Keys    mask_token, decoder_embed, decoder_pos_embed, decoder_blocks.N, decoder_norm, decoder_pred: those
        of an MAE checkpoint. The union of the encoder's and the decoder's state dicts is one.
Shapes  V inputs packed as `fastmim.models.vit.Encoder` packs them, L scored patches, d decoder width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fastmim_kernels import restore_tokens
from torch import Tensor, nn

from fastmim.models.block import NORM_EPS, Block, LinearFP32
from fastmim.models.embed import sincos_2d
from fastmim.models.init import init_linear
from fastmim.models.tokens import token_sources
from fastmim.models.vit import ViTConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Size of the pixel decoder."""

    width: int = 512
    """d, values per token"""
    depth: int = 8
    """Number of blocks"""
    heads: int = 16
    """Attention heads per block"""

    def __post_init__(self) -> None:
        if min(self.width, self.heads) < 1 or self.depth < 0:
            raise ValueError(f"method.decoder: want positive sizes, got {self}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"method.decoder.width: want a multiple of heads = {self.heads} and of 4 (positions), "
                f"got {self.width}"
            )


class Decoder(nn.Module):
    """Predicts the pixels of chosen patches from the encoding of the visible ones, or `out` of fp32."""

    def __init__(self, config: DecoderConfig, model: ViTConfig, out: int | None = None):
        super().__init__()
        d = config.width
        self.num_patches = model.num_patches
        self.decoder_embed = nn.Linear(model.width, d)
        self.mask_token = nn.Parameter(torch.empty(1, 1, d))
        self.decoder_pos_embed = nn.Parameter(sincos_2d(d, model.grid)[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(d, config.heads, model.attention) for _ in range(config.depth)
        )
        self.decoder_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(d, model.patch_values) if out is None else LinearFP32(d, out)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        z_BTD: Tensor,
        seen: Sequence[Tensor],
        scored_BL: Tensor | None = None,
        *,
        pool: bool = False,
    ) -> tuple[Tensor, ...]:
        """Decode all V inputs in one batch of V * B. Packed `[B, T, D]` to V predictions `[B, L, P]`.

        `seen` are the index tensors the encoding was made with; `scored_BL` the patches whose pixels
        are wanted, of every input the same (None: all N of them); with `pool` it is their mean, `[B, P]`.
        Differentiable in `z_BTD`.
        """
        B, V = len(z_BTD), len(seen)
        rows_Rd = self.decoder_embed(z_BTD).flatten(0, 1)
        source = token_sources(seen, self.num_patches)
        x = restore_tokens(rows_Rd, source, self.mask_token.view(-1), self.decoder_pos_embed[0])
        branch = None
        for block in self.decoder_blocks:
            x, branch = block(x, branch)
        x = x if branch is None else branch.added_to(x)
        x = x[:, 1:]  # the class row helps the others and predicts nothing
        if scored_BL is not None:  # the norm and the head work row by row: unscored rows need neither
            index = scored_BL.repeat(V, 1)[..., None].expand(-1, -1, x.shape[-1])
            x = x.gather(1, index)
        if pool:  # the head is linear: that of the mean is the mean of all
            return self.decoder_pred(self.decoder_norm(x).mean(1, dtype=torch.float32)).split(B)
        return self.decoder_pred(self.decoder_norm(x)).split(B)
