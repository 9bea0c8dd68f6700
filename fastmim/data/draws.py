"""All that is drawn for the views of a micro-batch: boxes, flips, windows, colours. Functions of the keys.

Draws   crop.py has stream 100 + crop, color.py 300 + draw; words 0 and 1 of stream 200 + draw: how far down
        and how far right a window of a master lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastmim_kernels.philox import draw_uniform
from torch import Tensor

from fastmim.data.color import ColorDraws, draw_colors
from fastmim.data.crop import crops_of, draw_boxes
from fastmim.views import View

STREAM = 200


@dataclass(frozen=True)
class Draws:
    """What B images are cut and coloured by; on the CPU."""

    boxes: dict[int, np.ndarray]  # crop -> int32 [B, 4], (top, left, height, width) in pixels
    flips: dict[int, np.ndarray]  # crop -> bool [B]
    windows: dict[int, Tensor]  # draw -> int64 [B, 2], (top, left) in the master
    colors: dict[int, ColorDraws]  # index of a view that has colours


def check_views(views: Sequence[View]) -> tuple[View, ...]:
    """The views; ValueError if there is none, or if views that share a number disagree on what it draws."""
    crops_of(views)
    shifts: dict[int, int] = {}
    for view in views:
        if view.shift and shifts.setdefault(view.draw, view.shift) != view.shift:
            raise ValueError(f"want one shift for the windows of draw {view.draw}, got {view}")
    return tuple(views)


def draw_views(keys_B: Tensor, sizes_B2: np.ndarray, views: Sequence[View]) -> Draws:
    """The draws of checked views, for keys on the CPU and images of (height, width) `sizes_B2`."""
    drawn = {crop: draw_boxes(keys_B, sizes_B2, view) for crop, view in crops_of(views).items()}
    return Draws(
        boxes={crop: boxes for crop, (boxes, _) in drawn.items()},
        flips={crop: flips for crop, (_, flips) in drawn.items()},
        windows={view.draw: draw_windows(keys_B, view) for view in views if view.shift},
        colors={i: draw_colors(keys_B, v.color, v.draw) for i, v in enumerate(views) if v.color is not None},
    )


def draw_windows(keys_B: Tensor, view: View) -> Tensor:
    """Top left corners int64 `[B, 2]`, uniform from 0 to `view.shift` in each direction."""
    return (draw_uniform(keys_B, 2, STREAM + view.draw) * (view.shift + 1)).long()
