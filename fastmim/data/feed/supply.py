"""The contract between the loader, which knows what a micro-batch is of, and what makes its crops.

    loader:  step -> sample ids, seeds, images          (order.py)
    supply:  images, seeds -> crops                     from files.py, or from the decoded images of cache.py

A supply decides nothing: from any of them the same place has the same crops.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """One micro-batch of B samples that is to be, and which image each sample shows."""

    step: int
    epoch: int
    ids_B: Tensor  # int64, CPU
    seeds_B: Tensor  # int64, CPU
    images_B: np.ndarray  # int64: sample ids, modulo the number of images


class Served(NamedTuple):
    """A place and what is shown there."""

    place: Place
    crops: tuple[Tensor, ...]  # uint8 [B, H, W, C], on the training device, in the order asked for
    shown_B: np.ndarray  # int64: the image in each slot, another than the place's where that one is bad


class Supply(Protocol):
    def serve(self, places: Iterator[Place]) -> Iterator[Served]:
        """The places, in the same order, with their crops.

        Takes places ahead of what it gives. BadImages when too many images cannot be decoded.
        """

    def close(self) -> None:
        """Give up threads and memory; may be called again."""
