"""What a block never sees: patches as tokens, and the three ways to say where a patch is.

Patches     one linear map of the pixels of a square, normalized by the channels' mean and deviation.
Sine-cosine omega_k = 10000^(-k / (D/4)),  k = 0 ... D/4 - 1
            pe(row, column) = [sin(column omega), cos(column omega), sin(row omega), cos(row omega)]
Learned     a table of 1 + N rows, resampled bicubically for images of another size.
Relative    bias_h(i, j) = table[offset(i, j), h], added to the attention logits: one row for each offset in
            rows and columns, and three more for class token to patch, patch to class token, and itself.

Source  MAE, facebookresearch/mae, util/pos_embed.py: column first. MoCo v3 and its descendants have the row
        first; the two are transposes and matter only when weights are carried over. Relative: BEiT,
        arXiv:2106.08254, and microsoft/unilm/beit. DINO (arXiv:2104.14294) resamples with a scale factor that
        is a tenth of a patch too large, against a rounding fault; `MARGIN` is that tenth.
Shapes  N = rows * columns patches in row-major order, T = 1 + N tokens with the class token in front, P
        values of a patch in row, column, channel order, H heads, D width.
"""

from functools import cache

import torch
import torch.nn.functional as F
from fastmim_kernels import gather_patches
from torch import Tensor, nn

Grid = tuple[int, int]  # rows and columns of patches
MARGIN = 0.1  # patches, by which DINO's and iBOT's scale factor is too large
TO_CLASS = 3  # rows of a relative table beyond the offsets


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
    """Chosen patches of uint8 images as tokens. Holds the projection under the key `proj`, as timm does."""

    def __init__(
        self, channels: int, patch: int, width: int, mean: tuple[float, ...], std: tuple[float, ...]
    ):
        super().__init__()
        self.patch, self.mean, self.std = patch, mean, std
        self.proj = PatchProjection(channels, patch, width)

    def forward(self, image_BHWC: Tensor, index_BK: Tensor) -> Tensor:
        """`[B, H, W, C]` uint8 and `[B, K]` to `[B, K, D]`."""
        dtype = self.proj.weight.dtype
        return self.proj(gather_patches(image_BHWC, index_BK, self.patch, self.mean, self.std, dtype=dtype))


# --- absolute positions -------------------------------------------------------------------------------


def sincos_2d(width: int, grid: Grid) -> Tensor:
    """Table `[1 + N, D]` fp32 of a (rows, columns) grid in row-major order; row 0, the class token, is 0."""
    if width % 4:
        raise ValueError(f"want a width that is a multiple of 4, got {width}")
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    row, column = (x.flatten()[:, None] * omega for x in torch.meshgrid(rows, columns, indexing="ij"))
    table_ND = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table_ND]).float()


def resize_positions(table_1TD: Tensor, old: Grid, new: Grid, *, margin: float = 0.0) -> Tensor:
    """Bicubic resize of the patch rows of `[1, 1 + N, D]` from one grid to another; the class row stays.

    With a `margin`, in patches, the scale factor is that of a grid larger by so much, as DINO and iBOT have
    it; without, it is that of the grid. Differentiable in the table. ValueError for a table of another grid.
    """
    if table_1TD.shape[1] != 1 + old[0] * old[1]:
        raise ValueError(f"want a table of 1 + {old[0]} x {old[1]} rows, got {table_1TD.shape[1]} rows")
    if old == new:
        return table_1TD
    cls_11D, patches_1ND = table_1TD[:, :1], table_1TD[:, 1:]
    grid_1Dhw = patches_1ND.transpose(1, 2).unflatten(2, old)
    if margin:
        factors = [(n + margin) / o for n, o in zip(new, old, strict=True)]
        resized = F.interpolate(grid_1Dhw, scale_factor=factors, mode="bicubic", align_corners=False)
        assert resized.shape[2:] == new
    else:
        resized = F.interpolate(grid_1Dhw, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls_11D, resized.flatten(2).transpose(1, 2)], dim=1)


# --- relative positions -------------------------------------------------------------------------------


def num_offsets(grid: Grid) -> int:
    """Rows of a relative table for patches of this grid, with those of the class token: 732 for 14 x 14."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + TO_CLASS


@cache
def relative_index(table: Grid, grid: Grid, device: torch.device) -> Tensor:
    """The row of `table`'s relative table for each pair of tokens of `grid`. `[T, T]` int64, shared.

    ValueError for a grid that has offsets which the table lacks.
    """
    if grid[0] > table[0] or grid[1] > table[1]:
        raise ValueError(
            f"want at most {table[0]} x {table[1]} patches, of which there are relative positions, "
            f"got {grid[0]} x {grid[1]}"
        )
    row, column = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    down, right = row[:, None] - row[None, :], column[:, None] - column[None, :]
    N, rows = len(row), num_offsets(table)
    index = torch.empty(1 + N, 1 + N, dtype=torch.int64)
    index[1:, 1:] = (down + table[0] - 1) * (2 * table[1] - 1) + right + table[1] - 1
    index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return index.to(device)


class RelativePositionBias(nn.Module):
    """A bias of each head for each offset of two tokens, 0 at the start. Key as in BEiT and timm."""

    def __init__(self, grid: Grid, heads: int):
        super().__init__()
        self.grid = grid
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets(grid), heads))

    def forward(self, grid: Grid) -> Tensor:
        """What to add to the logits of an image of this grid and its class token. `[H, T, T]`."""
        return relative_bias(self.relative_position_bias_table, self.grid, grid)


def relative_bias(table_RH: Tensor, table: Grid, grid: Grid) -> Tensor:
    """The rows of a relative table as a bias of the logits. `[R, H]` to `[H, T, T]`; differentiable."""
    index_TT = relative_index(table, grid, table_RH.device)
    return F.embedding(index_TT, table_RH).permute(2, 0, 1)
