"""A folder of images, or a list of them: one file each.

    sample id  = index in the sorted relative POSIX paths; of a list, the line
    label      = index of the first-level folder, if no image lies beside these folders; of a list, what
                 follows a tab: a class number on every line, or a name on every line; else none

Hidden files and folders are skipped; links are followed, except into a folder that is being walked already.
Paths of a list are relative to its folder, or absolute. Its empty lines do not count.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastmim.data.header import EXTENSIONS
from fastmim.data.images import Images, labels_by_folder, labels_of
from fastmim.data.index import Index, Names, Stamps, fresh, load, save, stamp

STAT_THREADS, STAT_CHUNK = 16, 4096
WORTH_KEEPING = 4096  # names: fewer are walked or parsed in no time

Walked = tuple[list[str], list[str], list[tuple[int, int]]]  # images, folders, stamps of these


class Files(Images):
    """Images that are files below `root`, or at absolute paths."""

    def path(self, sample_id: int) -> Path:
        return self.root / self.names[sample_id]

    def read(self, sample_id: int) -> bytes:
        with open(os.path.join(self.root, self.names[sample_id]), "rb", buffering=0) as file:
            return file.read()

    def _identity(self) -> Iterator[bytes]:
        """Names and sizes as they are now: what changed in place shows here, not in the index."""
        with ThreadPoolExecutor(STAT_THREADS) as pool:  # a stat is a round trip on a network file system
            for lines in pool.map(self._names_and_sizes, range(0, len(self), STAT_CHUNK)):
                yield lines.encode("utf-8", "surrogateescape")
        if self.index.kind == "list":  # a folder's labels are in its names
            yield from self._labels_identity()

    def _names_and_sizes(self, start: int) -> str:
        names = self.names[start : start + STAT_CHUNK]
        return "".join(f"{name}\0{_size(os.path.join(self.root, name))}\n" for name in names)


def kept_folder(path: Path) -> Files | None:
    """The images of a folder by its kept index, if no folder of it changed since."""
    index = load(path, "folder")
    if index is None:
        return None
    try:
        unchanged = Stamps.of(path, index.stamps.parts) == index.stamps
    except OSError:
        return None
    return Files(path.absolute(), index) if unchanged else None


def open_folder(path: Path) -> Files:
    """All images below the folder `path`, nested or flat. ValueError if there is none."""
    read_ns = time.time_ns()
    names, folders, stamps = _walk(path)
    if not names:
        raise ValueError(f"no image in {path}: looked in it and below for {' '.join(EXTENSIONS)}")
    names.sort()
    values = np.array(stamps, dtype=np.int64)
    classes, labels = labels_by_folder(names)
    index = Index("folder", Names.of(names), classes, labels, Stamps(Names.of(folders), values))
    if len(names) >= WORTH_KEEPING:
        save(path, index, read_ns)
    return Files(path.absolute(), index)


def open_list(path: Path) -> Files:
    """The images of a list file. ValueError if it names none, or a line is not as the others."""
    root = path.absolute().parent
    index, stamps, read_ns = fresh(path, "list", root, Names.of([path.name]))
    if index is None:
        names, classes, labels = _parse(path)
        index = Index("list", Names.of(names), classes, labels, stamps)
        if len(names) >= WORTH_KEEPING:
            save(path, index, read_ns)
    if not os.path.lexists(first := root / index.names[0]):
        raise ValueError(f"the first image of {path} is not there: {first}; paths are relative to the list")
    return Files(root, index)


def _parse(path: Path) -> tuple[list[str], tuple[str, ...], np.ndarray | None]:
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    rows = {i: line.rstrip("\r").split("\t") for i, line in enumerate(lines, 1) if line.strip()}
    if not rows:
        raise ValueError(f"no image in {path}: want a path per line, and after a tab its label if it has one")
    first, width = next((i, min(2, len(row))) for i, row in rows.items())
    for i, row in rows.items():
        if len(row) != width or "\0" in row[0]:
            want = "a path alone" if width == 1 else "a path, a tab and a label"
            raise ValueError(f"{path}, line {i}: want {want} as in line {first}, got {row!r:.200}")
    names = [row[0] for row in rows.values()]
    if width == 1:
        return names, (), None
    try:
        return names, *labels_of([row[1] for row in rows.values()])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _walk(root: Path) -> Walked:
    images, folders, stamps = [], [], []
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # prefix, the folders it lies in
    while todo:
        prefix, above = todo.pop()
        folder = os.path.join(root, prefix)
        status = os.stat(folder)
        here = status.st_dev, status.st_ino
        if here in above:  # a link to a folder around it
            continue
        folders.append(prefix)
        stamps.append(stamp(status))  # before it is read: what changes meanwhile shows later
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    todo.append((f"{prefix}{entry.name}/", (*above, here)))
                elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    images.append(prefix + entry.name)
    return images, folders, stamps


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
