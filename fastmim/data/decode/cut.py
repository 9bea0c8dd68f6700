"""Crops out of decoded images: cut, resized, flipped, colored and augmented, the same after every decoder."""

from collections.abc import Sequence

import numpy as np
import torch
from fastmim_kernels import resized_crop
from torch import Tensor

from fastmim.data.augment.color import apply_colors
from fastmim.data.augment.draws import Draws
from fastmim.data.augment.rand_augment import apply_operations
from fastmim.views import Crop


def cut_crops(crops: Sequence[Crop], images: Sequence[Tensor], draws: Draws) -> tuple[Tensor, ...]:
    """Crops uint8 `[B, H, W, C]` of decoded images `[H_b, W_b, C]`; what several are made of is made once."""
    resized: dict[tuple[object, ...], Tensor] = {}
    cut = []
    for i, crop in enumerate(crops):
        how = crop.box, crop.resized, crop.interpolation
        if how not in resized:
            resized[how] = resized_crop(
                images,
                torch.from_numpy(draws.boxes[crop.box].astype(np.int64)),
                crop.resized,
                flips_B=torch.from_numpy(draws.flips[crop.box]),
                filter=crop.interpolation,
            )
        pixels = resized[how]
        if crop.size != crop.resized:
            pixels = window(pixels, crop, draws)
        if crop.color is not None:
            pixels = apply_colors(pixels, draws.colors[i])
        if crop.rand_augment is not None:
            pixels = apply_operations(pixels, draws.operations[i])
        cut.append(pixels)
    return tuple(cut)


def window(master_BHWC: Tensor, crop: Crop, draws: Draws) -> Tensor:
    """The window of each master, at its drawn corner: a box of its own size, which the resize copies."""
    size_B2 = torch.tensor(crop.size).expand(len(master_BHWC), 2)
    corner_B2 = draws.windows[crop.draw] if crop.shift else torch.zeros_like(size_B2)
    return resized_crop(master_BHWC.unbind(0), torch.cat([corner_B2, size_B2], 1), crop.size)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor where the training is, without waiting for it to be there."""
    return x if x.device.type == device.type else x.pin_memory().to(device, non_blocking=True)
