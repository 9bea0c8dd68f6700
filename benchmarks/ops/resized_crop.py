"""Random boxes of images of ImageNet's usual size, resized to a crop: DINO's small, BEiT's second, MAE's.

Question   what does one call for images of any sizes save over Pillow, image by image, whose pixels they are?
Expected   four products for each byte of the box, of Lanczos six, whatever it shrinks by: on a GPU less than
           the bytes cost. On a CPU up to twice Pillow's speed, and no more than that of Pillow where the crop
           is small: there most of the time goes into unpacking the box.
Baselines  "eager" is the reference, image by image; "pillow" is crop, resize and transpose, from arrays and
           back, on a CPU alone, rows first as the op takes them.
Check      the reference on the CPU; all agree to the last bit.
Bytes      the boxes read once, the crops written once.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from fastmim_kernels import resized_crop, sample_seeds
from fastmim_kernels.resized_crop import Filter, resized_crop_reference
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE
from fastmim.data.augment.crop import draw_boxes
from fastmim.views import Crop

HEIGHT, WIDTH = 375, 500
COUNT = 64 if DEVICE == "cuda" else 16
CROPS: tuple[tuple[int, Filter], ...] = (
    (96, "bicubic"),
    (112, "lanczos"),
    (224, "bicubic"),
)
Run = Callable[[Sequence[Tensor], Tensor, Tensor, int, Filter], Tensor]


def eager(images: Sequence[Tensor], boxes: Tensor, flips: Tensor, side: int, filter: Filter) -> Tensor:
    return resized_crop_reference(images, boxes, flips, side, side, filter)


def pillow(images: Sequence[Tensor], boxes: Tensor, flips: Tensor, side: int, filter: Filter) -> Tensor:
    from PIL import Image

    kind = Image.Resampling[filter.upper()]
    out = torch.empty(len(images), side, side, 3, dtype=torch.uint8)
    for b, (top, left, height, width) in enumerate(boxes.tolist()):
        x = Image.fromarray(images[b].numpy()).crop((left, top, left + width, top + height))
        x = x.resize((side, height), kind).resize((side, side), kind)
        x = x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips[b] else x
        out[b] = torch.from_numpy(np.array(x))
    return out


def fastmim(images: Sequence[Tensor], boxes: Tensor, flips: Tensor, side: int, filter: Filter) -> Tensor:
    return resized_crop(images, boxes, (side, side), flips_B=flips, filter=filter)


PROVIDERS: dict[str, Run] = {"eager": eager, "pillow": pillow, "fastmim": fastmim}


def absent(provider: str) -> str | None:
    if provider != "pillow":
        return None
    if DEVICE == "cuda":
        return "it works on the host"
    return None if importlib.util.find_spec("PIL") else "pillow is not installed"


def run(call: Run, *inputs: Any) -> tuple[Tensor, ...]:
    return (call(*inputs),)


def oracle(images: Sequence[Tensor], *inputs: Any) -> tuple[Tensor, ...]:
    return (eager([image.cpu() for image in images], *inputs).to(DEVICE),)


def cases() -> Iterator[list[Case]]:
    images = list(torch.randint(0, 256, (COUNT, HEIGHT, WIDTH, 3), dtype=torch.uint8).to(DEVICE))
    seeds, sizes = sample_seeds(0, 0, torch.arange(COUNT)), np.tile([[HEIGHT, WIDTH]], (COUNT, 1))
    for side, filter in CROPS:
        boxes, flips = map(torch.from_numpy, draw_boxes(seeds, sizes, Crop(size=(side, side))))
        inputs = images, boxes.long(), flips, side, filter
        read = int((inputs[1][:, 2] * inputs[1][:, 3]).sum()) * 3
        yield [
            Case(
                op="resized_crop",
                provider=provider,
                mode=filter,
                shape={"B": COUNT, "H": HEIGHT, "W": WIDTH, "side": side, "C": 3},
                dtype="uint8",
                bytes_moved=read + COUNT * side * side * 3,
                run=partial(run, call, *inputs),
                oracle=partial(oracle, *inputs),
                absent=absent(provider),
            )
            for provider, call in PROVIDERS.items()
        ]
