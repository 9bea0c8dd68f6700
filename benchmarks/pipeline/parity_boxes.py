"""Where crop boxes fall: `draw_boxes` against torchvision's RandomResizedCrop, on the sizes of a set.

    D = sup |F(x) - G(x)|,   p = 2 sum over k >= 1 of (-1)^(k-1) exp(-2 k^2 D^2 n m / (n + m))

Source  Kolmogorov and Smirnov's test of two samples, in the limit of many draws. Sides are whole pixels, so
        values are tied: then p is too large rather than too small.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from fastmim_kernels import sample_seeds

from benchmarks.pipeline import parity_reference
from fastmim.data.augment.crop import draw_boxes
from fastmim.views import Crop

LAWS = {  # each with random numbers of its own
    "MAE": Crop(size=(224, 224), scale=(0.2, 1.0), box=0),
    "BEiT": Crop(size=(224, 224), scale=(0.08, 1.0), box=1),
    "DINO, small": Crop(size=(96, 96), scale=(0.05, 0.4), box=2),
}


def ks_test(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Distance of two samples and its p-value."""
    values = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b)]
    distance = float(np.abs(below[0] - below[1]).max())
    reach = distance**2 * len(a) * len(b) / (len(a) + len(b))
    if reach < 0.02:  # the sum is 1 to ten digits there, and converges slowly
        return distance, 1.0
    p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * reach) for k in range(1, 101))
    return distance, min(p, 1.0)  # it rounds


def described(boxes_B4: np.ndarray, sizes_B2: np.ndarray) -> dict[str, np.ndarray]:
    """What a box is, apart from the size of its image; places from 0 to 1."""
    top, left, height, width = boxes_B4.T.astype(np.float64)
    H, W = sizes_B2.T.astype(np.float64)
    return {
        "area": height * width / (H * W),
        "aspect": np.log(width / height),
        "center, down": (top + height / 2) / H,
        "center, across": (left + width / 2) / W,
    }


def our_boxes(sizes_B2: np.ndarray, epochs: int, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and flips of `epochs` passes over the images, as a run draws them."""
    ids = torch.arange(len(sizes_B2))
    keys = torch.cat([sample_seeds(0, epoch, ids) for epoch in range(epochs)])
    return draw_boxes(keys, np.tile(sizes_B2, (epochs, 1)), crop)


def compare_boxes(sizes_B2: np.ndarray, draws: int) -> Iterator[dict[str, Any]]:
    """A row for each law and quantity, of at least `draws` boxes on each side."""
    epochs = -(-draws // len(sizes_B2))
    sizes = np.tile(sizes_B2, (epochs, 1))
    torch.manual_seed(0)
    for law, crop in LAWS.items():
        boxes, flips = our_boxes(sizes_B2, epochs, crop)
        ours, theirs = described(boxes, sizes), described(parity_reference.boxes_of(sizes, crop), sizes)
        row = {"kind": "boxes", "law": law, "draws": len(sizes)}
        for quantity in ours:
            distance, p = ks_test(ours[quantity], theirs[quantity])
            means = {"ours": float(ours[quantity].mean()), "theirs": float(theirs[quantity].mean())}
            yield {**row, "quantity": quantity, "distance": distance, "p": p, **means}
        share = float(flips.mean())
        z = abs(share - crop.flip) / math.sqrt(crop.flip * (1 - crop.flip) / len(flips))
        rest = {"distance": abs(share - crop.flip), "p": math.erfc(z / math.sqrt(2))}
        yield {**row, "quantity": "flipped", **rest, "ours": share, "theirs": crop.flip}
