"""A folder of images, or a list of them: one file each.

    sample id  = index in the sorted relative POSIX paths; of a list, the line
    label      = index of the first-level folder, if no image lies beside these folders; of a list, what
                 follows a tab: a class number on every line, or a name on every line; else none

What is an image is said by its name, in upper or lower case. Links are followed, except into a folder that is
being walked already. Whatever else is there is counted in `left_out`.

A list is UTF-8, with or without a byte order mark; its paths are relative to its folder, or absolute. A path
that exists is taken as it is; else quotes and blanks around it do not count, and what begins with # is a
comment. Empty lines do not count.
"""

import codecs
import errno
import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fastmim.data.decode.header import EXTENSIONS
from fastmim.data.sources.images import (
    IS_POINTER,
    Images,
    check_fetched,
    is_pointer,
    labels_by_folder,
    labels_of,
    no_image,
)
from fastmim.data.sources.index import Index, Names, Stamps, fresh, load, save, stamp
from fastmim.data.sources.left_out import LeftOut

STAT_THREADS, STAT_CHUNK = 16, 4096
WORTH_KEEPING = 4096  # names: fewer are walked or parsed in no time
SHARDS = (".tar", ".parquet")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
NO_SHARDS = "metadata.parquet"  # captions and the like beside images, as Hugging Face has them
# what macOS, Synology and QNAP, Windows and ext4 make, in lower case: thumbnails and what was deleted
OF_SYSTEMS = ("__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information",
              "lost+found")  # fmt: skip
QUOTES = ('"', "'")


class Files(Images):
    """Images that are files below `root`, or at absolute paths."""

    def path(self, sample_id: int) -> Path:
        return self.root / self.names[sample_id]

    def read(self, sample_id: int) -> bytes:
        path = os.path.join(self.root, self.names[sample_id])
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "a pipe, socket or device, no file")
            data = file.read()
        if is_pointer(data):
            raise OSError(errno.ENODATA, IS_POINTER)
        return data

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


def _open_at_once(path: str, flags: int) -> int:
    """A list may name a pipe, which would have us wait for ever for somebody to write."""
    return os.open(path, flags | os.O_NONBLOCK)


def kept_folder(path: Path) -> Files | None:
    """The images of a folder by its kept index, if no folder of it changed since."""
    index = load(path, "folder")
    if index is None:
        return None
    try:
        unchanged = Stamps.of(path, index.stamps.parts) == index.stamps and not _opened(path, index)
    except OSError:
        return None
    return Files(path.absolute(), index) if unchanged else None


def open_folder(path: Path, found: "Found") -> Files:
    """All images below the folder `path`, nested or flat, as found there. ValueError if there is none."""
    names, left_out = found.images, found.left_out
    if not names:
        raise no_image(f"{path} and below", left_out)
    names.sort()
    values = np.array(found.stamps, dtype=np.int64)
    classes, labels = labels_by_folder(names)
    if classes:
        tops = {folder.partition("/")[0] for folder in found.folders if folder}
        for name in tops.difference(classes):
            left_out.add("empty", name)
    else:
        left_out.add_folders(names)
    arrays = {}
    if found.closed:
        closed = Names.of(found.closed)
        arrays = {"closed.blob": np.frombuffer(closed.blob, np.uint8), "closed.ends": closed.ends}
    stamps = Stamps(Names.of(found.folders), values)
    index = Index("folder", Names.of(names), classes, labels, stamps, arrays, left_out)
    if len(names) >= WORTH_KEEPING:
        save(path, index, found.read_ns)
    return Files(path.absolute(), index)


def _opened(path: Path, index: Index) -> bool:
    """Whether something can be read now that could not be: a link's target shows in no folder's stamp."""
    if "closed.ends" not in index.arrays:
        return False
    closed = Names(index.arrays["closed.blob"].data, index.arrays["closed.ends"])
    return any(os.access(os.path.join(path, name), os.R_OK, effective_ids=True) for name in closed)


def open_list(path: Path) -> Files:
    """The images of a list file. ValueError if it names none, or a line is not as the others."""
    root = path.absolute().parent
    index, stamps, read_ns = fresh(path, "list", root, Names.of([path.name]))
    if index is None:
        check_fetched(path)
        left_out = LeftOut()
        names, classes, labels = _parse(path, left_out)
        index = Index("list", Names.of(names), classes, labels, stamps, left_out=left_out)
        if len(names) >= WORTH_KEEPING:
            save(path, index, read_ns)
    if not os.path.lexists(first := root / index.names[0]):
        raise ValueError(
            f"the first image of {path} is not there: {first}; paths are relative to the list, and a label"
            " follows a tab"
        )
    return Files(root, index)


def _parse(path: Path, left_out: LeftOut) -> tuple[list[str], tuple[str, ...], np.ndarray | None]:
    rows, root = {}, str(path.parent)
    for i, line in enumerate(_lines(path), 1):
        name, *label = line.split("\t")
        name = _meant(root, name)
        if name.startswith("#") and not os.path.lexists(os.path.join(root, name)):
            left_out.add("comment")
        elif line.strip():
            rows[i] = [name, *label]
    if not rows:
        raise ValueError(f"no image in {path}: want a path per line, and after a tab its label if it has one")
    first, width = next((i, min(2, len(row))) for i, row in rows.items())
    for i, row in rows.items():
        if len(row) != width or not row[0] or "\0" in row[0]:
            want = "a path alone" if width == 1 else "a path, a tab and a label"
            raise ValueError(f"{path}, line {i}: want {want} as in line {first}, got {row!r:.200}")
    names = [row[0] for row in rows.values()]
    if width == 1:
        return names, (), None
    try:
        return names, *labels_of([row[1].strip() for row in rows.values()])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _lines(path: Path) -> list[str]:
    """Lines of a list without their ends. ValueError for UTF-16 and UTF-32, which some editors write."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise ValueError(f"want {path} in UTF-8, got UTF-16 or UTF-32: it starts with {data[:4]!r}")
    text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _meant(root: str, name: str) -> str:
    """A path as it is written, if it exists or looks like one; else without what is around it."""
    bare = name.strip()
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in QUOTES:
        bare = bare[1:-1]
    return name if bare == name or "\0" in name or os.path.lexists(os.path.join(root, name)) else bare


# --- what lies in a folder ---------------------------------------------------------------------------


@dataclass
class Found:
    """What lies in a folder and below: paths relative to it. A folder's ends with a slash, its own is ""."""

    images: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    stamps: list[tuple[int, int]] = field(default_factory=list)  # of the folders
    closed: list[str] = field(default_factory=list)  # what could not be looked at: it may be one day
    left_out: LeftOut = field(default_factory=LeftOut)
    read_ns: int = field(default_factory=time.time_ns)


def only_shards(root: Path) -> Found | None:
    """What lies in a folder of shards; None if there are none, or folders or images beside them."""
    found = Found()
    with os.scandir(root) as entries:
        for entry in entries:
            if _sort(entry, "", found) or found.images:
                return None
    return found if found.shards else None


def walk(root: Path) -> Found:
    """What lies in a folder and below."""
    found = Found()
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # prefix, the folders it lies in
    while todo:
        prefix, above = todo.pop()
        folder = os.path.join(root, prefix)
        try:
            status = os.stat(folder)
            here = status.st_dev, status.st_ino
            if here in above:  # a link to a folder around it
                found.left_out.add("circle", prefix[:-1])
                continue
            entries = os.scandir(folder)
        except OSError as error:
            if not prefix or (why := _why_not(error)) is None:
                raise
            _leave_out(prefix[:-1], why, found)
            continue
        found.folders.append(prefix)
        found.stamps.append(stamp(status))  # of before it is read: what changes meanwhile shows later
        with entries:
            for entry in entries:
                if _sort(entry, prefix, found):
                    todo.append((f"{prefix}{entry.name}/", (*above, here)))
    return found


def _sort(entry: os.DirEntry[str], prefix: str, found: Found) -> bool:
    """Put an entry where it belongs; True for a folder that is to be walked."""
    name, lower = entry.name, entry.name.lower()
    what = "hidden" if name.startswith(".") else _what(entry)
    if what == "hidden":
        found.left_out.add_hidden(name)
    elif what == "folder":
        if lower not in OF_SYSTEMS:
            return True
        found.left_out.add("system", sort=name)
    elif what != "file":
        _leave_out(prefix + name, what, found)
    elif lower.endswith(EXTENSIONS):
        found.images.append(prefix + name)
    elif lower.endswith((*SHARDS, *COMPRESSED)) and lower != NO_SHARDS:
        found.shards.append(prefix + name)
    elif not lower.endswith(".tar.index"):  # of the shard beside it
        found.left_out.add_file(name)
    return False


What = Literal["folder", "file", "nowhere", "circle", "denied", "special"]


def _what(entry: os.DirEntry[str]) -> What:
    """What an entry is, or what a link leads to; asks the file system of links only."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError as error:
        if (why := _why_not(error)) is None:
            raise
        return why
    return "nowhere" if entry.is_symlink() and not os.path.exists(entry.path) else "special"


def _why_not(error: OSError) -> What | None:
    """Why an entry cannot be looked at; None for a fault of the disk and the like, which is raised."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return "denied"
    if error.errno == errno.ELOOP:
        return "circle"
    return "nowhere" if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG) else None


def _leave_out(name: str, what: What, found: Found) -> None:
    if what != "special":
        found.closed.append(name)
    maybe_class = what == "nowhere" and "/" not in name and not name.lower().endswith(EXTENSIONS)
    found.left_out.add("class" if maybe_class else what, name)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
