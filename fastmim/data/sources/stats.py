"""What a data set is like: counts, sizes, mean and standard deviation of its channels, classes.

    mean_c = sum x / n,   std_c = sqrt(sum x^2 / n - mean_c^2)     over all pixels of the sample, x in 0..1

The sample is evenly spaced over the ids, so it is the same in every run, and of every class if these lie
together. Sums are of integers: no number of threads changes a digit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmim.data.decode.bad_image import BadImage
from fastmim.data.decode.pixels import as_array
from fastmim.data.sources.images import Images
from fastmim.data.sources.scan import in_order, read_image

SAMPLE = 2000  # images


@dataclass(frozen=True)
class One:
    """What is counted of one image."""

    size: tuple[int, int, int]  # bytes, height, width
    form: str
    sums: np.ndarray  # int64 [2, 3]: of the RGB values 0..255, and of their squares


def stats(images: Images, threads: int, progress: Callable[[int], object] = lambda n: None) -> dict[str, Any]:
    """Everything of a source that `fastmim data stats` prints, as JSON has it."""
    num = min(SAMPLE, len(images))
    sample = np.linspace(0, len(images) - 1, num).round().astype(int).tolist()
    good: list[One] = []
    for one in in_order(lambda sample_id: _one(images, sample_id), sample, threads):
        progress(1)
        if one is not None:
            good.append(one)
    report: dict[str, Any] = {
        "images": len(images),
        "kind": images.index.kind,
        "sample": num,
        "bad_in_sample": num - len(good),
        "classes": len(images.classes),
    }
    if good:
        report |= _of_pixels(good)
    if images.labels is not None:
        counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
        report["images_per_class"] = dict(zip(images.classes, counts, strict=True))
    return report


def _one(images: Images, sample_id: int) -> One | None:
    try:
        data, image = read_image(images, sample_id)
    except BadImage:
        return None
    form, pixels = image.format or "", as_array(image, 3).reshape(-1, 3)
    # exact: a histogram is integers, and small where the pixels are not
    histogram = np.stack([np.bincount(pixels[:, c], minlength=256) for c in range(3)])
    values = np.arange(256)
    sums = np.stack([histogram @ values, histogram @ values**2])
    return One((len(data), image.height, image.width), form, sums)


def _of_pixels(good: list[One]) -> dict[str, Any]:
    columns = np.array([one.size for one in good])
    sizes = dict(zip(("bytes", "height", "width"), columns.T, strict=True))
    sizes["short_side"] = columns[:, 1:].min(1)
    forms, counts = np.unique([one.form for one in good], return_counts=True)
    num_pixels = int((columns[:, 1] * columns[:, 2]).sum())
    first, second = sum(one.sums for one in good) / num_pixels / np.array([[255.0], [255.0**2]])
    return {
        name: {"min": int(x.min()), "median": float(np.median(x)), "max": int(x.max())}
        for name, x in sizes.items()
    } | {
        "formats": dict(zip(forms.tolist(), counts.tolist(), strict=True)),
        "mean": first.tolist(),
        "std": np.sqrt(second - first**2).tolist(),
    }
