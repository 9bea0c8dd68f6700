"""What every source of images is to the loader: names, labels, and encoded bytes by sample id."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from fastmim.data.decode.header import EXTENSIONS
from fastmim.data.sources.index import Index
from fastmim.data.sources.left_out import LeftOut

MAX_CLASS = 1 << 20  # a label beyond this is no class number
POINTER = b"version https://git-lfs.github.com/spec/"
IS_POINTER = "a Git LFS pointer, not the file itself: run `git lfs pull`"


class Images(ABC):
    """Encoded images, the i-th of which is sample i; `root` is what it is called when it is reported.

    `labels` are int32 `[len(self)]` numbers of `classes`; None and () for an unlabeled set. `left_out` is
    what lies beside them and is not read.
    """

    def __init__(self, root: Path, index: Index):
        self.root, self.index = root, index
        self.names, self.classes, self.labels = index.names, index.classes, index.labels
        self.left_out = index.left_out

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, sample_id: int) -> bytes:
        """The encoded bytes. OSError if they cannot be read (any more)."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what a checkpoint remembers of its data: names, sizes or their like, labels."""
        digest = hashlib.sha256()
        for piece in self._identity():
            digest.update(piece)
        return digest.hexdigest()

    @abstractmethod
    def _identity(self) -> Iterator[bytes]:
        """What the fingerprint is of."""

    def _labels_identity(self) -> Iterator[bytes]:
        if self.labels is not None:
            yield "\0".join(self.classes).encode("utf-8", "surrogateescape")
            yield self.labels.tobytes()


def labels_by_folder(names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Classes and labels from first-level folders, if no image lies beside these."""
    folders = [name.partition("/")[0] for name in names if "/" in name]
    if len(folders) < len(names):
        return (), None
    classes = sorted(set(folders))
    number = {name: i for i, name in enumerate(classes)}
    return tuple(classes), np.array([number[name] for name in folders], dtype=np.int32)


def labels_of(given: Sequence[str], classes: Sequence[str] = ()) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes and labels from one string each: numbers of `classes`, or else, names.

    ValueError for a number that is none of a class.
    """
    if not all(label.isascii() and label.removeprefix("-").isdigit() for label in given):
        names = sorted(set(given))
        number = {name: i for i, name in enumerate(names)}
        return tuple(names), np.array([number[label] for label in given], dtype=np.int32)
    numbers = np.array([int(label) for label in given], dtype=object)
    low, high = min(numbers), max(numbers)
    limit = len(classes) or MAX_CLASS
    if low < 0 or high >= limit:
        raise ValueError(f"want labels from 0 to {limit - 1}, got {low if low < 0 else high}")
    return tuple(classes) or tuple(str(i) for i in range(high + 1)), numbers.astype(np.int32)


def no_image(where: str, left_out: LeftOut) -> ValueError:
    """Says where there is none, what was looked for, and what was there."""
    beside = f"; left out: {left_out}" if left_out else ""
    return ValueError(f"no image in {where}: looked for {' '.join(EXTENSIONS)}{beside}")


def check_fetched(path: Path) -> None:
    """ValueError for the lines that Git leaves in the place of a large file. OSError if it cannot be read."""
    with open(path, "rb") as file:
        if is_pointer(file.read(len(POINTER))):
            raise ValueError(f"{path} is {IS_POINTER}")


def is_pointer(data: bytes) -> bool:
    return data.startswith(POINTER)


def distinct(names: list[str], prefixes: Sequence[str]) -> list[str]:
    """The names, each with its prefix if one is there twice."""
    if len(set(names)) == len(names):
        return names
    return [f"{prefix}/{name}" for prefix, name in zip(prefixes, names, strict=True)]
