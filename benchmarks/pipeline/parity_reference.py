"""The other side of `parity`: Pillow and torchvision on PIL images, and what two results differ by.

Nothing here knows an op of ours: the oracle is what a training script of MAE, SimSiam or BYOL calls.
"""

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from fastmim.data.augment.color import ColorDraws
from fastmim.views import Crop

Box = tuple[int, int, int, int]  # top, left, height, width
STAGES = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
_libraries: list[torch.library.Library] = []  # schemas live as long as these


@cache
def torchvision(module: str) -> ModuleType:
    """A module of torchvision. Its compiled ops may be for another build of torch: none is called here."""
    try:
        return importlib.import_module(f"torchvision.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(f"want torchvision to compare with, got none ({error})") from None
    except RuntimeError:  # "operator torchvision::nms does not exist"
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _libraries[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module(f"torchvision.{module}")


# --- the stages ---------------------------------------------------------------------------------------


def decoded(data: bytes, mode: str = "RGB") -> Image.Image:
    with Image.open(BytesIO(data)) as image:
        return image.convert(mode)


def cropped(image: Image.Image, box: Box, size: tuple[int, int], filter: str) -> Image.Image:
    """torchvision's own function: one call of Pillow's `resize`, which chooses the order of the axes."""
    mode = torchvision("transforms").InterpolationMode[filter.upper()]
    return torchvision("transforms.functional").resized_crop(image, *box, list(size), mode)


def cropped_rows_first(image: Image.Image, box: Box, size: tuple[int, int], filter: str) -> Image.Image:
    """Rows, then columns: two calls of Pillow's `resize`."""
    top, left, height, width = box
    kind = Image.Resampling[filter.upper()]
    image = image.crop((left, top, left + width, top + height))
    return image.resize((size[1], height), kind).resize(size[::-1], kind)


def flipped(image: Image.Image) -> Image.Image:
    return torchvision("transforms.functional").hflip(image)


def colored(image: Image.Image, draws: ColorDraws, b: int) -> Image.Image:
    """What is drawn for sample `b`: jitter in its order, grayscale, PIL's Gaussian blur, solarized."""
    F = torchvision("transforms.functional")
    for stage in draws.order_B4[b].tolist():
        if stage >= 0:
            image = getattr(F, STAGES[stage])(image, draws.factors_B4[b, stage].item())
    if draws.gray_B[b]:
        image = F.rgb_to_grayscale(image, 3)
    if draws.sigmas_B[b] > 0:
        image = image.filter(ImageFilter.GaussianBlur(draws.sigmas_B[b].item()))
    return F.solarize(image, 128) if draws.solarize_B[b] else image


def sampled_blur(image: Image.Image, sigma: float) -> Image.Image:
    """torchvision's GaussianBlur with BYOL's 23 taps: another blur than PIL's, for comparison."""
    return torchvision("transforms.functional").gaussian_blur(image, [23, 23], [sigma, sigma])


def boxes_of(sizes_B2: np.ndarray, crop: Crop) -> np.ndarray:
    """Boxes int64 `[B, 4]` of RandomResizedCrop itself, from torch's generator."""
    draw = torchvision("transforms").RandomResizedCrop.get_params
    images = (torch.empty(1, int(height), int(width), device="meta") for height, width in sizes_B2)
    return np.array([draw(image, list(crop.scale), list(crop.ratio)) for image in images])


# --- differences --------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """One stage against one reference, image by image; errors in levels of 255."""

    stage: str
    reference: str
    expect_equal: bool  # to the last bit; else the difference is what is asked
    images: int = 0
    values: int = 0
    equal: int = 0  # images
    absolute: float = 0.0
    squared: float = 0.0
    worst_mae: float = -1.0
    worst: dict[str, Any] | None = None

    def add(self, name: str, ours: np.ndarray, theirs: Image.Image | np.ndarray) -> None:
        """ValueError if they are not uint8 images of one shape."""
        theirs = np.asarray(theirs)
        theirs = theirs[..., None] if theirs.ndim == 2 else theirs
        if ours.shape != theirs.shape or {ours.dtype, theirs.dtype} != {np.dtype(np.uint8)}:
            got = f"{ours.dtype} {ours.shape} and {theirs.dtype} {theirs.shape}"
            raise ValueError(f"want two uint8 images of one shape for {self.stage} of {name}, got {got}")
        error = np.abs(ours.astype(np.int16) - theirs)
        self.images, self.values = self.images + 1, self.values + error.size
        self.equal += not error.any()
        self.absolute += float(error.sum())
        self.squared += float((error.astype(np.int64) ** 2).sum())
        if error.mean() > self.worst_mae:
            self.worst_mae = float(error.mean())
            at = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
            self.worst = {"image": name, "at": at, "ours": int(ours[at]), "theirs": int(theirs[at])}

    def row(self) -> dict[str, Any]:
        mean_square = self.squared / self.values
        return {
            "kind": "stage",
            "stage": self.stage,
            "reference": self.reference,
            "expect_equal": self.expect_equal,
            "images": self.images,
            "mae": self.absolute / self.values,
            "psnr_db": 10 * math.log10(255**2 / mean_square) if mean_square else None,  # None: no difference
            "equal_share": self.equal / self.images,
            "worst_mae": self.worst_mae,
            "worst": self.worst if self.worst_mae else None,
        }


class Comparisons:
    """All stages, in order of their first use."""

    def __init__(self) -> None:
        self._by_name: dict[tuple[str, str], Comparison] = {}

    def add(
        self, stage: str, reference: str, name: str, ours: torch.Tensor, theirs: Any, equal: bool = True
    ) -> None:
        key = stage, reference
        comparison = self._by_name.setdefault(key, Comparison(stage, reference, equal))
        comparison.add(name, ours.cpu().numpy(), theirs)

    def rows(self) -> Iterator[dict[str, Any]]:
        for comparison in self._by_name.values():
            yield comparison.row()
