"""A folder of images: stable sample ids, labels from folders, encoded bytes.

    sample id  = index in the sorted relative POSIX paths
    label      = index of the first-level folder, if no image lies beside these folders; else none

Hidden files and folders are skipped; links are followed, except into a folder that is being walked already.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from fastmim.data.header import EXTENSIONS

STAT_THREADS, STAT_CHUNK = 16, 4096


class Images:
    """Encoded images below `root`, `names` being their sorted relative POSIX paths."""

    def __init__(self, root: Path, names: list[str]):
        self.root, self.names = root, names
        self._prefix = f"{root}{os.sep}"

    def __len__(self) -> int:
        return len(self.names)

    def path(self, sample_id: int) -> Path:
        return self.root / self.names[sample_id]

    def read(self, sample_id: int) -> bytes:
        """The encoded bytes. OSError if the file cannot be read (any more)."""
        with open(self._prefix + self.names[sample_id], "rb", buffering=0) as file:
            return file.read()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the first-level folders, sorted; empty for an unlabelled set."""
        if any("/" not in name for name in self.names):
            return ()
        return tuple(sorted({name.partition("/")[0] for name in self.names}))

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Class of every sample, int32 `[len(self)]`, or None for an unlabelled set."""
        if not self.classes:
            return None
        index = {name: i for i, name in enumerate(self.classes)}
        return np.array([index[name.partition("/")[0]] for name in self.names], dtype=np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of relative names and sizes in bytes: what a checkpoint remembers of its data."""
        digest = hashlib.sha256()
        with ThreadPoolExecutor(STAT_THREADS) as pool:  # a stat is a round trip on a network file system
            for lines in pool.map(self._names_and_sizes, range(0, len(self), STAT_CHUNK)):
                digest.update(lines.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _names_and_sizes(self, start: int) -> str:
        names = self.names[start : start + STAT_CHUNK]
        return "".join(f"{name}\0{_size(self._prefix + name)}\n" for name in names)


def find_images(path: Path) -> Images:
    """All images below the folder `path`, nested or flat. ValueError if there is no such folder or image."""
    if not path.exists():
        raise ValueError(f"want a folder of images, got {path}: it does not exist")
    if not path.is_dir():
        raise ValueError(f"want a folder of images, got {path}: it is a file")
    names = sorted(_walk(path))
    if not names:
        raise ValueError(f"no image in {path}: looked in it and below for {' '.join(EXTENSIONS)}")
    return Images(path.absolute(), names)


def _walk(root: Path) -> Iterator[str]:
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # prefix, the folders it lies in
    while todo:
        prefix, above = todo.pop()
        folder = os.path.join(root, prefix)
        status = os.stat(folder)
        here = status.st_dev, status.st_ino
        if here in above:  # a link to a folder around it
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    todo.append((f"{prefix}{entry.name}/", (*above, here)))
                elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    yield prefix + entry.name


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
