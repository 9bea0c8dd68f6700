"""RandAugment: a few operations on each crop, drawn from its sample's seed, each with a strength of its own.

    `layers` operations, drawn with repetition from OPERATIONS; each is done with `probability`, at level
        l = N(magnitude, deviation^2) clamped to [0, 10]; a sign is drawn for each operation that has one
    autocontrast, equalize, invert     have no strength
    rotate                             +-30 l / 10 degrees
    posterize                          to 4 - floor(4 l / 10) bits
    solarize                           from 256 - floor(256 l / 10) on
    solarize_add                       + floor(110 l / 10) below 128
    color, contrast, brightness,       factor 1 +- 0.9 l / 10
      sharpness
    shear_x, shear_y                   +-0.3 l / 10
    translate_x, translate_y           +-0.45 l / 10 of the side
    What moves in from outside has the mean color of ImageNet; what moves is resampled bicubically.

Source  Cubuk et al., arXiv:1909.13719; the operations and strengths of timm's `rand-m9-mstd0.5-inc1`, with
        which MAE and its descendants fine-tune; not its random numbers, of one generator for all threads.
Draws   stream RAND_AUGMENT + draw, WORDS for each layer: operation, whether, sign, two of the normal.
Limits  Pillow, on the CPU, a crop a thread. Crops on another device come to the CPU for it and go back.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from fastmim_kernels.philox import draw_uniform
from PIL import Image, ImageChops, ImageEnhance, ImageOps
from torch import Tensor

from fastmim.streams import RAND_AUGMENT
from fastmim.views import RandAugment

WORDS = 5
TOP = 10.0  # the highest level
# the mean of ImageNet, and of its gray version
FILL: dict[str, tuple[float, ...] | float] = {"RGB": (124, 116, 104), "L": 114}


class Operation(NamedTuple):
    """One operation on one crop: `level` from 0 to 10, `sign` 1 or -1."""

    name: str
    level: float
    sign: int


def moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    fill = FILL[image.mode]
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill
    )


def rotate(image: Image.Image, share: float, sign: int) -> Image.Image:
    fill = FILL[image.mode]
    return image.rotate(sign * 30 * share, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def posterize(image: Image.Image, share: float, _: int) -> Image.Image:
    bits = 4 - int(4 * share)  # 0, at the highest level alone, leaves nothing; newer Pillows refuse it
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def solarize_add(image: Image.Image, share: float, _: int) -> Image.Image:
    add = min(128, int(110 * share))
    return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * len(image.getbands()))


def enhanced(by: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[..., Image.Image]:
    return lambda image, share, sign: by(image).enhance(max(0.1, 1 + sign * 0.9 * share))


OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {  # of image, level / 10, sign
    "autocontrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "invert": lambda image, *_: ImageChops.invert(image),
    "rotate": rotate,
    "posterize": posterize,
    "solarize": lambda image, share, _: ImageOps.solarize(image, 256 - min(256, int(256 * share))),
    "solarize_add": solarize_add,
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, share, sign: moved(image, (1, sign * 0.3 * share, 0, 0, 1, 0)),
    "shear_y": lambda image, share, sign: moved(image, (1, 0, 0, sign * 0.3 * share, 1, 0)),
    "translate_x": lambda i, share, sign: moved(i, (1, 0, sign * 0.45 * share * i.size[0], 0, 1, 0)),
    "translate_y": lambda i, share, sign: moved(i, (1, 0, 0, 0, 1, sign * 0.45 * share * i.size[1])),
}
NAMES = tuple(OPERATIONS)


def draw_operations(seeds_B: Tensor, how: RandAugment, draw: int = 0) -> list[list[Operation]]:
    """The operations of each sample, in their order; seeds on the CPU."""
    u = draw_uniform(seeds_B, WORDS * how.layers, RAND_AUGMENT.of(draw)).view(-1, how.layers, WORDS)
    normal = (-2 * (1 - u[..., 3]).log()).sqrt() * (2 * math.pi * u[..., 4]).cos()
    level = (how.magnitude + how.deviation * normal).clamp(0, TOP).tolist()
    which, done = (u[..., 0] * len(NAMES)).long().tolist(), (u[..., 1] < how.probability).tolist()
    sign = torch.where(u[..., 2] < 0.5, 1, -1).tolist()
    rows = zip(which, done, level, sign, strict=True)
    return [
        [Operation(NAMES[i], lv, s) for i, is_done, lv, s in zip(*row, strict=True) if is_done]
        for row in rows
    ]


def augmented(pixels_HWC: np.ndarray, operations: Sequence[Operation]) -> np.ndarray:
    """One crop after its operations. uint8, one or three channels."""
    gray = pixels_HWC.shape[2] == 1
    image = Image.fromarray(pixels_HWC[..., 0] if gray else pixels_HWC)
    for operation in operations:
        image = OPERATIONS[operation.name](image, operation.level / TOP, operation.sign)
    return np.asarray(image).reshape(pixels_HWC.shape)


@cache
def pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process: one that was forked has none of its parent's."""
    return ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), thread_name_prefix="rand_augment")


def apply_operations(pixels_BHWC: Tensor, operations: Sequence[Sequence[Operation]]) -> Tensor:
    """uint8 `[B, H, W, C]` after each sample's operations, on the device where it was."""
    crops = list(pixels_BHWC.cpu().numpy())
    done = pool(os.getpid()).map(augmented, crops, operations)
    return torch.from_numpy(np.stack(list(done))).to(pixels_BHWC.device)
