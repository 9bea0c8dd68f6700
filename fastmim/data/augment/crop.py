"""Boxes of random resized crops, and flips: torchvision's law, drawn from the keys of the samples.

    ten tries:  area = u0 * H * W,  u0 ~ U(scale);   aspect = exp(u1),  u1 ~ U(log ratio)
                w = round(sqrt(area * aspect)),  h = round(sqrt(area / aspect))
                the first that fits (0 < w <= W, 0 < h <= H) gets a corner, uniform among those inside
    else:       the largest central box whose aspect is clamped to ratio
    `clamp`:    the first try, w and h cut to W and H: the crop of MAE's linear probe, util/crop.py

Source  RandomResizedCrop of pytorch/vision: the law, not its random numbers.
Shapes  B = samples; a box is (top, left, height, width) in pixels of the stored image.
Draws   words 0..19 of stream BOXES + box: area and aspect of each try; 20, 21: corner; 22: flip.
"""

from collections.abc import Sequence

import numpy as np
from fastmim_kernels.philox import draw_uniform
from torch import Tensor

from fastmim.streams import BOXES
from fastmim.views import Crop

TRIES = 10
OF_A_BOX = ("scale", "ratio", "clamp", "flip")


def draw_boxes(seeds_B: Tensor, sizes_B2: np.ndarray, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """Boxes int32 `[B, 4]` and flips bool `[B]` for images of (height, width) `sizes_B2`."""
    u = draw_uniform(seeds_B, 2 * TRIES + 3, BOXES.of(crop.box)).numpy()
    tries = u[:, : 2 * TRIES].reshape(-1, TRIES, 2)
    height_B, width_B = sizes_B2[:, 0].astype(np.float64), sizes_B2[:, 1].astype(np.float64)

    area = (height_B * width_B)[:, None] * _between(tries[:, :, 0], crop.scale)
    aspect = np.exp(_between(tries[:, :, 1], np.log(crop.ratio)))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    if crop.clamp:
        w, h = w.clip(1, width_B[:, None]), h.clip(1, height_B[:, None])
    fits = (w > 0) & (w <= width_B[:, None]) & (h > 0) & (h <= height_B[:, None])
    first_B = fits.argmax(axis=1)
    rows = np.arange(len(first_B))
    found_B = fits[rows, first_B]

    fallback_h, fallback_w = _clamped(height_B, width_B, crop.ratio)
    h_B = np.where(found_B, h[rows, first_B], fallback_h)
    w_B = np.where(found_B, w[rows, first_B], fallback_w)
    free_h, free_w = height_B - h_B, width_B - w_B
    top_B = np.where(found_B, np.floor(u[:, -3] * (free_h + 1)), free_h // 2)
    left_B = np.where(found_B, np.floor(u[:, -2] * (free_w + 1)), free_w // 2)
    return np.stack([top_B, left_B, h_B, w_B], axis=1).astype(np.int32), u[:, -1] < crop.flip


def _between(u: np.ndarray, limits: Sequence[float] | np.ndarray) -> np.ndarray:
    return limits[0] + u * (limits[1] - limits[0])


def _clamped(
    height_B: np.ndarray, width_B: np.ndarray, ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    aspect_B = width_B / height_B
    h_B = np.where(aspect_B < ratio[0], np.rint(width_B / ratio[0]), height_B)
    w_B = np.where(aspect_B > ratio[1], np.rint(height_B * ratio[1]), width_B)
    # rounding must not reach past the image, nor to nothing
    return h_B.clip(1, height_B), w_B.clip(1, width_B)


def by_box(crops: Sequence[Crop]) -> dict[int, Crop]:
    """One crop for each `box`, in order of first use. ValueError if crops that share one disagree on it."""
    found: dict[int, Crop] = {}
    for crop in crops:
        first = found.setdefault(crop.box, crop)
        if any(getattr(first, name) != getattr(crop, name) for name in OF_A_BOX):
            raise ValueError(f"want one scale, ratio and flip for box {crop.box}, got {first} and {crop}")
    if not found:
        raise ValueError("want at least one crop, got none")
    return found
