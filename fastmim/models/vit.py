"""The vision transformer: a pre-norm encoder that says where each patch is and sees what it is shown.

Its inputs are `Tokens`, which say what they show. Several, of several images and sizes, go through in one
packed pass: the tokens of each are a segment, which attends to itself alone, so it equals one pass for each.

Source  Dosovitskiy et al., arXiv:2010.11929; sizes, fixed sine-cosine positions and initialization as
        in MAE, arXiv:2111.06377, and its repository facebookresearch/mae; the rest as block.py, embed.py and
        init.py say.
Keys    The state dict of `Encoder` is that of timm's VisionTransformer, and of the encoder half of an
        MAE checkpoint: cls_token, pos_embed, patch_embed.proj, blocks.N, norm. With it, mask_token. With
        relative positions it is that of timm's Beit: rel_pos_bias in the place of pos_embed.
Shapes  B images, K visible patches, N = h * w patches, P = patch * patch * channels values of a patch in
        row, column, channel order, T tokens of all segments together, S segments, D width, H heads.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from fastmim_kernels import restore_tokens
from fastmim_kernels.attention import Backend
from torch import Tensor, nn

from fastmim.models.block import AddNorm, Bias, Block, QKVBias, drop_path_keeps
from fastmim.models.embed import MARGIN, Grid, PatchEmbed, RelativePositionBias, resize_positions, sincos_2d
from fastmim.models.init import INITS, Init
from fastmim.models.tokens import Encoded, Tokens, every_patch, runs_of, token_sources

Positions = Literal["sincos", "learned", "relative", "relative_per_block"]
LARGEST = {"width": 65536, "depth": 1024, "heads": 1024, "patch": 4096, "channels": 1024}
LARGEST_SIDE = 65536  # of an image, in pixels
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
    positions: Positions = "sincos"
    """Where a patch is: fixed sine-cosine (MAE), learned (DINO), or relative, as a bias of the attention that
    all blocks share (BEiT), or that each block has for itself (relative_per_block)"""
    layer_scale: float = 0.0
    """First value of LayerScale, a trained factor of each value of each branch; 0: there is none"""
    drop_path: float = 0.0
    """Probability that a sample skips the last block's branches in training; the first block's is 0"""
    qkv_bias: QKVBias = "qkv"
    """Which of queries, keys and values have a bias; qv, as in BEiT"""
    final_norm: bool = True
    """Whether a norm follows the last block"""
    init: Init = "mae"
    """First weights, as of MAE, MoCo v3, CAE, DINO or BEiT"""

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"model.{name}: want 1 to {most}, got {getattr(self, name)}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"model.width: want a multiple of heads = {self.heads} and of 4 (positions), got {self.width}"
            )
        height, width = self.size
        if max(height, width) > LARGEST_SIDE:
            raise ValueError(
                f"model.image-size: want sides of at most {LARGEST_SIDE}, got {height} x {width}"
            )
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
        if self.layer_scale < 0 or not 0 <= self.drop_path < 1:
            raise ValueError(
                "model.layer-scale, model.drop-path: want 0 or more, and a probability below 1, "
                f"got {self.layer_scale} and {self.drop_path}"
            )

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


class Encoder(nn.Module):
    """ViT that takes uint8 images as `Tokens`. With `mask_token` it has one for what is hidden."""

    def __init__(self, config: ViTConfig, mask_token: bool = False):
        super().__init__()
        self.config, self.width = config, config.width
        c, D = config, config.width
        self.patch_embed = PatchEmbed(c.channels, c.patch, D, c.pixel_mean, c.pixel_std)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.mask_token = nn.Parameter(torch.empty(1, 1, D)) if mask_token else None
        self.pos_embed = self.rel_pos_bias = None
        if c.positions == "sincos":
            self.pos_embed = nn.Parameter(sincos_2d(D, c.grid)[None], requires_grad=False)
        elif c.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + c.num_patches, D))
        elif c.positions == "relative":
            self.rel_pos_bias = RelativePositionBias(c.grid, c.heads)
        self.blocks = nn.ModuleList(
            Block(
                D, c.heads, c.attention, qkv_bias=c.qkv_bias, layer_scale=c.layer_scale,
                relative=c.grid if c.positions == "relative_per_block" else None,
            )
            for _ in range(c.depth)
        )  # fmt: skip
        self.norm = AddNorm(D) if c.final_norm else None
        INITS[c.init](self)

    def every_block(self) -> list[Block]:
        """The blocks, the first first."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def tokens(self) -> list[nn.Parameter]:
        """The class token, and the mask token if there is one."""
        return [token for token in (self.cls_token, self.mask_token) if token is not None]

    def learned_positions(self) -> list[nn.Parameter]:
        """The table of positions if it is learned."""
        return [self.pos_embed] if self.config.positions == "learned" and self.pos_embed is not None else []

    def forward(
        self,
        *inputs: Tokens,
        class_token: bool = True,
        final_norm: bool = True,
        outputs: Collection[int] = (),
        mlps: Collection[int] = (),
        seeds_B: Tensor | None = None,
    ) -> Encoded:
        """Encode every input in one pass.

        `outputs` are numbers of blocks, 0 the first, after which the stream is wanted, `mlps` those of which
        the MLP's output is. In training with drop path `seeds_B` are the seeds of the samples, from which it
        is drawn, the same on any number of ranks. One input can be encoded without its class token, and any
        without the norm behind the last block.
        ValueError for what the encoder does not have: a mask token, positions for a size, such a block.
        """
        grids = self.check(inputs, {*outputs, *mlps})
        x_BTD, lengths = self.embed(inputs, grids)
        if not class_token:
            if len(inputs) != 1 or self.config.positions.startswith("relative"):
                raise ValueError(
                    "want one input, and no relative positions, for an encoding without a class token, got "
                    f"{len(inputs)} and positions {self.config.positions}"
                )
            x_BTD, lengths = x_BTD[:, 1:], (x_BTD.shape[1] - 1,)
        bias: Bias = None if self.rel_pos_bias is None else tuple(self.rel_pos_bias(grid) for grid in grids)
        keeps = self.drop_path(seeds_B, lengths)
        branch, found, of_mlps = None, {}, {}
        for i, block in enumerate(self.blocks):
            x_BTD, branch = block(x_BTD, branch, lengths, bias=bias, grids=grids, keep_2BT=keeps[i])
            if i in outputs:
                found[i] = branch.added_to(x_BTD)
            if i in mlps:
                of_mlps[i] = branch.value_BTD
        if final_norm and self.norm is not None:
            return Encoded(self.norm(x_BTD, branch)[0], lengths, found, of_mlps)
        return Encoded(x_BTD if branch is None else branch.added_to(x_BTD), lengths, found, of_mlps)

    def check(self, inputs: Sequence[Tokens], blocks: Collection[int]) -> tuple[Grid, ...]:
        """The grid of each input; ValueError for what cannot be encoded."""
        c = self.config
        if not inputs:
            raise ValueError("want at least one image to encode, got none")
        if not set(blocks) <= set(range(c.depth)):
            raise ValueError(f"want outputs of blocks 0 to {c.depth - 1}, got {sorted(blocks)}")
        grids = []
        for tokens in inputs:
            B, height, width, channels = tokens.image_BHWC.shape
            if height % c.patch or width % c.patch or min(height, width) < c.patch or channels != c.channels:
                raise ValueError(
                    f"want images of {c.channels} channels and of multiples of the patch, {c.patch} px, "
                    f"got {channels} channels of {height} x {width}"
                )
            grid = height // c.patch, width // c.patch
            hidden = tokens.hidden_BN
            if hidden is not None and hidden.shape != (B, grid[0] * grid[1]):
                raise ValueError(
                    f"want a mask of {B} images of {grid[0]} x {grid[1]} patches, got {list(hidden.shape)}"
                )
            if tokens.masks and self.mask_token is None:
                raise ValueError("want an encoder with a mask token for hidden patches, got one without")
            if c.positions.startswith("relative") and tokens.seen_BK is not None and not tokens.mask_tokens:
                raise ValueError("want all patches, or mask tokens, with relative positions, got some")
            grids.append(grid)
        return tuple(grids)

    def positions(self, grid: Grid) -> Tensor | None:
        """The table `[1 + N, D]` of absolute positions for images of this grid; None without any."""
        if self.pos_embed is None:
            return None
        margin = MARGIN if self.config.positions == "learned" else 0.0
        table_1TD: Tensor = self.pos_embed
        if grid != self.config.grid:  # in fp32, as bicubic weights of other dtypes are not
            table_1TD = resize_positions(table_1TD.float(), self.config.grid, grid, margin=margin)
        return table_1TD[0].to(self.pos_embed.dtype)

    def drop_path(self, seeds_B: Tensor | None, lengths: tuple[int, ...]) -> list[Tensor | None]:
        """What each block keeps of its two branches, as factors of each token. `[2, B, T]` fp32, or None.

        Each sample has a draw of its own in each segment. Probabilities rise from 0 at the first block.
        """
        if not self.training:
            return [None] * self.config.depth
        return drop_path_keeps(seeds_B, self.config.drop_path, self.config.depth, lengths)

    # --- tokens of the inputs -------------------------------------------------------------------------

    def embed(self, inputs: Sequence[Tokens], grids: Sequence[Grid]) -> tuple[Tensor, tuple[int, ...]]:
        """All inputs as tokens with their positions, class token first in each. `[B, T, D]`, and T's parts.

        What is of one image, or whole images of one size, is embedded in one product.
        """
        parts: list[Tensor] = []
        for first, last in runs_of(inputs, grids):
            together, grid = inputs[first:last], grids[first]
            if inputs[first].masks:
                parts.append(self.embed_masked(inputs[first], grid))
            elif inputs[first].seen_BK is not None:
                parts += self.embed_visible(together, grid)
            else:
                parts += self.embed_whole(together, grid)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), tuple(p.shape[1] for p in parts)

    def class_part(self, pos_TD: Tensor | None, B: int) -> Tensor:
        """The class token of each image at its position. `[B, 1, D]`."""
        cls_11D = self.cls_token if pos_TD is None else self.cls_token + pos_TD[None, :1]
        return cls_11D.expand(B, -1, -1)

    def embed_visible(self, inputs: Sequence[Tokens], grid: Grid) -> list[Tensor]:
        """The visible patches of inputs of one image, behind a class token each."""
        seen = [t.seen_BK for t in inputs if t.seen_BK is not None]
        index_BK = seen[0] if len(seen) == 1 else torch.cat(seen, dim=1)
        pos_TD = self.positions(grid)
        patches_BKD = self.patch_embed(inputs[0].image_BHWC, index_BK)
        if pos_TD is not None:
            patches_BKD = patches_BKD + pos_TD[1:][index_BK]
        cls_B1D = self.class_part(pos_TD, len(index_BK))
        runs = patches_BKD.split([s.shape[1] for s in seen], dim=1)
        return [torch.cat([cls_B1D, run], dim=1) for run in runs]

    def embed_whole(self, inputs: Sequence[Tokens], grid: Grid) -> list[Tensor]:
        """Every patch of images of one size, behind a class token each."""
        images = [t.image_BHWC for t in inputs]
        image_BHWC = images[0] if len(images) == 1 else torch.cat(images)
        pos_TD, B = self.positions(grid), len(image_BHWC)
        patches_BND = self.patch_embed(image_BHWC, every_patch(image_BHWC, grid))
        if pos_TD is not None:
            patches_BND = patches_BND + pos_TD[1:]
        x_BTD = torch.cat([self.class_part(pos_TD, B), patches_BND], dim=1)
        return list(x_BTD.split([len(image) for image in images]))

    def embed_masked(self, tokens: Tokens, grid: Grid) -> Tensor:
        """A class token, then every patch in its place, hidden ones as mask tokens. `[B, 1 + N, D]`.

        A patch embedding acts on each patch alone: where as many are seen of each image, only those need one.
        """
        image_BHWC, mask_token_11D, N = tokens.image_BHWC, self.mask_token, grid[0] * grid[1]
        assert mask_token_11D is not None
        pos_TD = self.positions(grid)
        if tokens.seen_BK is not None:
            rows_BKD = self.patch_embed(image_BHWC, tokens.seen_BK)
            cls_B1D = self.cls_token.expand(len(rows_BKD), -1, -1)
            rows_RD = torch.cat([cls_B1D, rows_BKD], dim=1).flatten(0, 1)
            source_BT = token_sources((tokens.seen_BK,), N)
            if pos_TD is None:
                pos_TD = rows_RD.new_zeros(1 + N, rows_RD.shape[1])
            return restore_tokens(rows_RD, source_BT, mask_token_11D.view(-1), pos_TD)
        assert tokens.hidden_BN is not None
        patches_BND = self.patch_embed(image_BHWC, every_patch(image_BHWC, grid))
        patches_BND = torch.where(tokens.hidden_BN[..., None], mask_token_11D, patches_BND)
        x_BTD = torch.cat([self.cls_token.expand(len(image_BHWC), -1, -1), patches_BND], dim=1)
        return x_BTD if pos_TD is None else x_BTD + pos_TD
