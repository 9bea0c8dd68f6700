"""The vision transformer: a pre-norm encoder that embeds and sees only the patches it is told to.

Source  Dosovitskiy et al., arXiv:2010.11929; sizes, fixed sine-cosine positions and initialization as
        in MAE, arXiv:2111.06377, and its repository facebookresearch/mae.
Keys    The state dict of `Encoder` is that of timm's VisionTransformer, and of the encoder half of an
        MAE checkpoint: cls_token, pos_embed, patch_embed.proj, blocks.N, norm. With it, mask_token.
Shapes  B images, K visible patches, N = h * w patches, P = patch * patch * channels values of a patch in
        row, column, channel order, T tokens of all views together, D width, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fastmim_kernels import add_layer_norm, bias_gelu, gather_patches, restore_tokens
from fastmim_kernels.attention import Backend, attention
from torch import Tensor, nn

from fastmim.models.positions import sincos_2d

NORM_EPS = 1e-6
PIXEL_STATISTICS = {  # mean, std of ImageNet; of its gray version for one channel
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: ((0.449,), (0.226,)),
}


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Size of the encoder, and what it reads."""

    width: int
    """D, values per token"""
    depth: int
    """Number of blocks"""
    heads: int
    """Attention heads per block"""
    patch: int = 16
    """Side of a square patch, in pixels"""
    image_size: int | tuple[int, int] = 224
    """Side of the input in pixels, or height and width"""
    channels: int = 3
    """Image channels: 3 for RGB, 1 for gray; image files give these two"""
    mean: tuple[float, ...] | None = None
    """Pixel mean per channel on the scale 0 to 1; by default that of ImageNet"""
    std: tuple[float, ...] | None = None
    """Pixel standard deviation per channel on the scale 0 to 1; by default that of ImageNet"""
    attention: Backend = "auto"
    """auto: on CUDA the fastest for each shape, as measured at its first call; torch's sdpa elsewhere"""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: want at least 1, got {getattr(self, name)}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"model.width: want a multiple of heads = {self.heads} and of 4 (positions), got {self.width}"
            )
        height, width = self.size
        if min(height, width) < 1 or height % self.patch or width % self.patch:
            raise ValueError(
                f"model.image-size: want multiples of the patch, {self.patch}, got {height} x {width}"
            )
        if self.channels not in PIXEL_STATISTICS and (self.mean is None or self.std is None):
            raise ValueError(f"model.mean, model.std: there is no default for {self.channels} channels")
        if len(self.pixel_mean) != self.channels or len(self.pixel_std) != self.channels:
            raise ValueError(
                f"model.mean, model.std: want {self.channels} values each (model.channels), "
                f"got {self.pixel_mean} and {self.pixel_std}"
            )
        if min(self.pixel_std) <= 0:
            raise ValueError(f"model.std: want values above 0, got {self.pixel_std}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        """P, values of one patch."""
        return self.patch**2 * self.channels

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        return PIXEL_STATISTICS[self.channels][0] if self.mean is None else self.mean

    @property
    def pixel_std(self) -> tuple[float, ...]:
        return PIXEL_STATISTICS[self.channels][1] if self.std is None else self.std


class PatchProjection(nn.Module):
    """The patch embedding of a convolutional ViT as a linear map of rows; keeps the convolution's weight."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))
        fan_in = channels * patch**2
        nn.init.xavier_uniform_(self.weight.view(width, fan_in))  # as a matrix, not as a convolution
        nn.init.uniform_(self.bias, -(fan_in**-0.5), fan_in**-0.5)  # what nn.Conv2d does and MAE leaves

    def forward(self, rows_BKP: Tensor) -> Tensor:
        weight_DP = self.weight.permute(0, 2, 3, 1).flatten(1)  # rows run row, column, channel
        return F.linear(rows_BKP, weight_DP, self.bias)


class PatchEmbed(nn.Module):
    """Holds the projection under the key `proj`, where timm has it."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.proj = PatchProjection(config.channels, config.patch, config.width)

    def forward(self, image_BHWC: Tensor, index_BK: Tensor) -> Tensor:
        c = self.config
        dtype = self.proj.weight.dtype
        return self.proj(
            gather_patches(image_BHWC, index_BK, c.patch, c.pixel_mean, c.pixel_std, dtype=dtype)
        )


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, backend: Backend):
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, segments: tuple[int, ...] | None) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).unbind(2)
        return self.proj(attention(q, k, v, segments=segments, backend=self.backend).reshape(B, T, D))


class LinearGELU(nn.Linear):
    """`gelu(x W + b)`, exact: the bias enters with the GELU, and the backward keeps the product alone."""

    def forward(self, x: Tensor) -> Tensor:
        return bias_gelu(F.linear(x, self.weight), self.bias)


class LinearFP32(nn.Linear):
    """`x W + b` in fp32, whatever the dtype of its weights: for rows of which differences are taken."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = LinearGELU(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class AddNorm(nn.LayerNorm):
    """LayerNorm of a residual stream to which a branch is added first; gives both. Eps as in MAE."""

    def __init__(self, width: int):
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """`[B, T, D]` and the branch of the same shape, if one is to be added, to normed and sum."""
        if branch is None:
            return super().forward(x), x
        return add_layer_norm(branch, x, self.weight, self.bias, eps=self.eps)


class Block(nn.Module):
    """`x += MHA(LN x); x += MLP(LN x)`, exact GELU, on `[B, T, D]`.

    The sums are made where they are normalized: a block takes the stream and the branch that the block before
    it left to be added, and leaves its own.
    """

    def __init__(self, width: int, heads: int, backend: Backend):
        super().__init__()
        self.norm1 = AddNorm(width)
        self.attn = Attention(width, heads, backend)
        self.norm2 = AddNorm(width)
        self.mlp = MLP(width)

    def forward(
        self, x_BTD: Tensor, branch_BTD: Tensor | None = None, segments: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        normed_BTD, x_BTD = self.norm1(x_BTD, branch_BTD)
        normed_BTD, x_BTD = self.norm2(x_BTD, self.attn(normed_BTD, segments))
        return x_BTD, self.mlp(normed_BTD)


def init_linear(module: nn.Module) -> None:
    """MAE's rule for `Module.apply`: Xavier-uniform matrices (fused qkv as one), zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """ViT that takes uint8 images and, for each view of them, the indices of the patches it may see.

    What it may not see it drops; with `mask_token` it has a token of its own in its place.
    """

    def __init__(self, config: ViTConfig, mask_token: bool = False):
        super().__init__()
        self.config = config
        D = config.width
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.mask_token = nn.Parameter(torch.empty(1, 1, D)) if mask_token else None
        self.pos_embed = nn.Parameter(sincos_2d(D, config.grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(D, config.heads, config.attention) for _ in range(config.depth))
        self.norm = AddNorm(D)
        self.blocks.apply(init_linear)
        for token in (self.cls_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def forward(
        self, image_BHWC: Tensor, *seen: Tensor, class_token: bool = True, final_norm: bool = True
    ) -> Tensor:
        """Encode every view in one pass. `[B, H, W, C]` uint8 and V index tensors `[B, K_v]` to `[B, T, D]`.

        The tokens of view v are one run of 1 + K_v along T = sum of (1 + K_v), class token first; runs
        do not attend to one another, so this equals one pass per view. `split_views` undoes it.
        With mask tokens there is one view and T = 1 + N: every patch at its place, in rows. One view can
        be encoded without its class token, and any without the norm behind the last block.
        """
        if not seen:
            raise ValueError("want at least one index tensor of visible patches, got none")
        if self.mask_token is None:
            x_BTD, segments = self.embed_visible(image_BHWC, seen), view_lengths(seen)
        elif len(seen) == 1:
            x_BTD = self.embed_all(image_BHWC, seen[0], self.mask_token)
            segments = (x_BTD.shape[1],)
        else:
            raise ValueError(f"want one view of an image for an encoder with mask tokens, got {len(seen)}")
        if not class_token:
            if len(seen) != 1:
                raise ValueError(f"want one view to be encoded without a class token, got {len(seen)}")
            x_BTD, segments = x_BTD[:, 1:], (x_BTD.shape[1] - 1,)
        branch_BTD = None
        for block in self.blocks:
            x_BTD, branch_BTD = block(x_BTD, branch_BTD, segments)
        if final_norm:
            return self.norm(x_BTD, branch_BTD)[0]
        return x_BTD if branch_BTD is None else x_BTD + branch_BTD

    def embed_visible(self, image_BHWC: Tensor, seen: Sequence[Tensor]) -> Tensor:
        """The visible patches of each view behind a class token, positions added. `[B, T, D]`."""
        index_BK = seen[0] if len(seen) == 1 else torch.cat(list(seen), dim=1)
        patches_BKD = self.patch_embed(image_BHWC, index_BK) + self.pos_embed[0, 1:][index_BK]
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(index_BK), -1, -1)
        runs = patches_BKD.split([s.shape[1] for s in seen], dim=1)
        return torch.cat([part for run in runs for part in (cls_B1D, run)], dim=1)

    def embed_all(self, image_BHWC: Tensor, seen_BK: Tensor, mask_token_11D: Tensor) -> Tensor:
        """A class token, then every patch in its place, hidden ones as mask tokens. `[B, 1 + N, D]`.

        A patch embedding acts on each patch alone: only the visible ones need one.
        """
        rows_BKD = self.patch_embed(image_BHWC, seen_BK)
        cls_B1D = self.cls_token.expand(len(rows_BKD), -1, -1)
        rows_RD = torch.cat([cls_B1D, rows_BKD], dim=1).flatten(0, 1)
        source_BT = token_sources((seen_BK,), self.config.num_patches)
        return restore_tokens(rows_RD, source_BT, mask_token_11D.view(-1), self.pos_embed[0])


def view_lengths(seen: Sequence[Tensor]) -> tuple[int, ...]:
    """Tokens of each view in a packed encoding: its visible patches and its class token."""
    return tuple(1 + s.shape[1] for s in seen)


def split_views(z_BTD: Tensor, seen: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The packed encoding of `Encoder.forward` as one `[B, 1 + K_v, D]` per view, class token first."""
    return z_BTD.split(view_lengths(seen), dim=1)


def token_sources(seen: Sequence[Tensor], num_patches: int) -> Tensor:
    """For each position the row of the packed encoding that fills it, or -1. `[V * B, 1 + N]` int64.

    Rows count through `[B, T]`; views follow one another in the batch; position 0 is the class token.
    """
    lengths = view_lengths(seen)
    B, T, device = len(seen[0]), sum(lengths), seen[0].device
    first_row_B1 = torch.arange(B, device=device)[:, None] * T
    sources, start = [], 0
    for index_BK, length in zip(seen, lengths, strict=True):
        rows_BL = first_row_B1 + torch.arange(start, start + length, device=device)
        source = torch.full((B, 1 + num_patches), -1, device=device)
        position_BL = torch.cat([index_BK.new_zeros(B, 1), index_BK + 1], dim=1)
        sources.append(source.scatter_(1, position_BL, rows_BL))
        start += length
    return torch.cat(sources)
