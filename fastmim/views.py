"""What passes from the data to a method: uint8 views of each sample, and the keys of its random draws.

A method says which `View`s it wants and in which order; the data deliver a `Batch` that holds them in
that order. Neither side knows the other. Two views with the same `crop` number are cut from the same
box with the same flip (C-MAE's two photometric views, BEiT's image and its half-size copy); different
numbers are independent draws (the many crops of DINO, iBOT and MoCo v3).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True, kw_only=True)
class View:
    """One image per sample: a random crop, resized to `size` (H, W) pixels and flipped at random."""

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)  # fraction of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, drawn log-uniformly
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5
    crop: int = 0  # which draw of box and flip


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank."""

    views: tuple[Tensor, ...]  # each uint8 [B, H, W, C], on the training device, in the order asked for
    keys_B: Tensor  # int64 [B], same device: one key per sample, a function of (seed, epoch, sample id)
    ids_B: Tensor  # int64 [B], on the CPU: sample ids, for reports
    epoch: int
