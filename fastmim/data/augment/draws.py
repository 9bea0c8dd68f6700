"""All that is drawn for the crops of a micro-batch: boxes, flips, windows, colors, RandAugment. Functions of
the samples' seeds.

Draws   words 0 and 1 of stream WINDOWS + draw: how far down and how far right a window of a master lies.
        Boxes are drawn in crop.py, colors in color.py, operations in rand_augment.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from fastmim_kernels.philox import draw_uniform
from torch import Tensor

from fastmim.data.augment.color import ColorDraws, draw_colors
from fastmim.data.augment.crop import by_box, draw_boxes
from fastmim.data.augment.rand_augment import Operation, draw_operations
from fastmim.streams import WINDOWS
from fastmim.views import Crop


@dataclass(frozen=True)
class Draws:
    """What B images are cut and colored by; on the CPU."""

    boxes: dict[int, np.ndarray]  # box -> int32 [B, 4], (top, left, height, width) in pixels
    flips: dict[int, np.ndarray]  # box -> bool [B]
    windows: dict[int, Tensor]  # draw -> int64 [B, 2], (top, left) in the master
    colors: dict[int, ColorDraws]  # index of a crop that has colors
    operations: dict[int, list[list[Operation]]] = field(default_factory=dict)  # of one with RandAugment


def check_crops(crops: Sequence[Crop]) -> tuple[Crop, ...]:
    """The crops; ValueError if there is none, or if crops that share a number disagree on what it draws."""
    by_box(crops)
    shifts: dict[int, int] = {}
    for crop in crops:
        if crop.shift and shifts.setdefault(crop.draw, crop.shift) != crop.shift:
            raise ValueError(f"want one shift for the windows of draw {crop.draw}, got {crop}")
    return tuple(crops)


def draw_crops(seeds_B: Tensor, sizes_B2: np.ndarray, crops: Sequence[Crop]) -> Draws:
    """The draws of checked crops, for keys on the CPU and images of (height, width) `sizes_B2`."""
    drawn = {box: draw_boxes(seeds_B, sizes_B2, crop) for box, crop in by_box(crops).items()}
    return Draws(
        boxes={box: boxes for box, (boxes, _) in drawn.items()},
        flips={box: flips for box, (_, flips) in drawn.items()},
        windows={crop.draw: draw_windows(seeds_B, crop) for crop in crops if crop.shift},
        colors={i: draw_colors(seeds_B, v.color, v.draw) for i, v in enumerate(crops) if v.color is not None},
        operations={
            i: draw_operations(seeds_B, v.rand_augment, v.draw)
            for i, v in enumerate(crops)
            if v.rand_augment is not None
        },
    )


def draw_windows(seeds_B: Tensor, crop: Crop) -> Tensor:
    """Top left corners int64 `[B, 2]`, uniform from 0 to `crop.shift` in each direction."""
    return (draw_uniform(seeds_B, 2, WINDOWS.of(crop.draw)) * (crop.shift + 1)).long()
