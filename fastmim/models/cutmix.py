"""CutMix with boxes of whole patches: a rectangle of each image is another's, and what came from where.

    lambda ~ U(0, 1)                           the share that an image keeps, Beta(1, 1)
    h, w   = sqrt(1 - lambda) of the grid's height and width, rounded to patches
    box    = h by w patches, centered on a patch drawn uniformly, what reaches outside cut off

The partner of image 2i is 2i + 1, and the other way round. The order of an epoch is one permutation, of which
a micro-batch of even size is a run that starts at an even place: so the partner is the same on any number of
ranks, like the box, which each image draws for itself.

Source  Yun et al., arXiv:1905.04899; snapped to patches for arXiv:2208.04164, Table 5, whose own rule is not
        published.
Shapes  B images, even; N = rows * columns patches in rows.
Draws   words 0..2 of the stream of its own: lambda, row and column of the center.
"""

import torch
from fastmim_kernels import draw_uniform
from torch import Tensor

from fastmim.streams import CUTMIX


def cutmix_mask(seeds_B: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patches each image takes from its partner, bool `[B, N]`, on the keys' device."""
    u_B3 = draw_uniform(seeds_B, 3, CUTMIX.of())
    side_B = u_B3[:, 0].neg().add(1).sqrt()  # lambda = u_0
    inside = []
    for cells, center_B in zip(grid, u_B3[:, 1:].unbind(1), strict=True):
        length_B = (side_B * cells).round().long()
        first_B = (center_B * cells).long() - length_B // 2
        cell = torch.arange(cells, device=seeds_B.device)
        inside.append((cell >= first_B[:, None]) & (cell < (first_B + length_B)[:, None]))
    return (inside[0][:, :, None] & inside[1][:, None, :]).flatten(1)


def partners(x_B: Tensor) -> Tensor:
    """Rows 2i and 2i + 1 exchanged. ValueError for an odd number of them."""
    if len(x_B) % 2:
        raise ValueError(f"cutmix: want an even micro-batch, to make pairs of its images, got {len(x_B)}")
    return x_B.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def from_partners(x_BT: Tensor, foreign_BT: Tensor) -> Tensor:
    """`[B, T]` or `[B, T, D]` with the rows of the partners where `foreign_BT` says so."""
    return torch.where(foreign_BT.view(*foreign_BT.shape, *[1] * (x_BT.ndim - 2)), partners(x_BT), x_BT)


def mix_patches(image_BHWC: Tensor, foreign_BN: Tensor, patch: int) -> Tensor:
    """The images, with the patches of their partners where `foreign_BN` says so. `[B, H, W, C]`."""
    B, H, W, _ = image_BHWC.shape
    foreign_BHW = foreign_BN.view(B, H // patch, 1, W // patch, 1).expand(-1, -1, patch, -1, patch)
    return torch.where(foreign_BHW.reshape(B, H, W, 1), partners(image_BHWC), image_BHWC)
