"""Frozen features of a run's encoder, read by kNN or by ridge regression: `fastmim knn`, `fastmim ridge`."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmim.data import find_images
from fastmim.data.feed.center import FRACTION, center_crops, spread_ids
from fastmim.evals.features import Feature, features_of
from fastmim.evals.knn import knn
from fastmim.evals.ridge import ridge
from fastmim.models.swin import SwinEncoder
from fastmim.models.vit import Encoder

PROBES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Iterator[tuple[str, float]]]] = {
    "knn": knn,
    "ridge": ridge,
}


def labeled_features(
    encoder: Encoder | SwinEncoder,
    path: Path,
    *,
    fraction: float = FRACTION,
    most: int | None = None,
    device: torch.device,
    threads: int,
) -> tuple[dict[Feature, Tensor], Tensor, tuple[str, ...]]:
    """Features of a labeled set's center crops, its labels `[N]` and classes. ValueError without labels.

    Of `most` images, if there are more: evenly spaced over the ids, so of each class its share where the
    images of a class lie together.
    """
    images = find_images(path)
    if images.left_out:
        print(f"left out of {path}: {images.left_out}", file=sys.stderr)
    if images.labels is None:
        raise ValueError(f"want images with labels, a folder of each class or shards that name it, in {path}")
    config, ids = encoder.config, spread_ids(len(images), most)
    crops = center_crops(
        images, config.size, ids=ids, channels=config.channels, fraction=fraction, threads=threads
    )
    found = features_of(encoder, (pixels for pixels, _ in crops), device)
    return found, torch.from_numpy(images.labels[ids]).long().to(device), images.classes


def evaluate(
    name: str,
    encoder: Encoder | SwinEncoder,
    train: Path,
    test: Path,
    *,
    fraction: float,
    most: int | None = None,
    threads: int,
) -> Iterator[tuple[str, float]]:
    """(feature/name, accuracy) for the class token and for the mean of the patches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how: dict[str, Any] = {"fraction": fraction, "most": most, "device": device, "threads": threads}
    known, labels, classes = labeled_features(encoder, train, **how)
    asked, truth, other = labeled_features(encoder, test, **how)
    if classes != other:
        raise ValueError(
            f"want the same classes in both sets, got {len(classes)} and {len(other)}, or others"
        )
    for feature in known:
        for what, value in PROBES[name](known[feature], labels, asked[feature], truth):
            yield f"{feature}/{what}", value
