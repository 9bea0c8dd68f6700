"""Fixed two-dimensional sine-cosine positions, and how learned or fixed tables change their grid.

    omega_k = 10000^(-k / (D/4)),  k = 0 ... D/4 - 1
    pe(row, column) = [sin(column omega), cos(column omega), sin(row omega), cos(row omega)]

Source  MAE, facebookresearch/mae, util/pos_embed.py: column first. MoCo v3 and its descendants have the
        row first; the two are transposes and matter only when weights are carried over.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Table `[1 + N, D]` fp32 of a (rows, columns) grid in row-major order; row 0, the class token, is 0."""
    if width % 4:
        raise ValueError(f"want a width that is a multiple of 4, got {width}")
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    row, column = (x.flatten()[:, None] * omega for x in torch.meshgrid(rows, columns, indexing="ij"))
    table_ND = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table_ND]).float()


def resize_positions(table_1TD: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bicubic resize of the patch rows of `[1, 1 + N, D]` from one grid to another; the class row stays."""
    if table_1TD.shape[1] != 1 + old[0] * old[1]:
        raise ValueError(f"want a table of 1 + {old[0]} x {old[1]} rows, got {table_1TD.shape[1]} rows")
    if old == new:
        return table_1TD
    cls_11D, patches_1ND = table_1TD[:, :1], table_1TD[:, 1:]
    grid_1Dhw = patches_1ND.transpose(1, 2).unflatten(2, old)
    grid_1Dhw = F.interpolate(grid_1Dhw, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls_11D, grid_1Dhw.flatten(2).transpose(1, 2)], dim=1)
