"""What is known of a set without reading its images: names, labels, places. Kept in the cache folder.

    index file = MAGIC, SHA-256 of the rest, length of the header, JSON header, arrays at multiples of 8 bytes
    stamp      = (ctime in ns, bytes) of a shard or list, (ctime in ns, 0) of a folder

An index is used while every folder or shard it was made from has its stamp: no file of a folder is asked.
Adding, removing and renaming change a folder's ctime, and unlike mtime no tool sets it back. A folder that
changed less than SETTLED_NS before it was read may change again within one tick of its clock, so the index
of such a set is not kept. A file that is not whole, or of another version, path or kind is not used.

Place   $FASTMIM_CACHE/index, else $XDG_CACHE_HOME/fastmim/index, else ~/.cache/fastmim/index: data sets are
        often read-only. Written beside and renamed, so any number of ranks may write at once.
Bytes   of 1.28 million names: the names, 8 each for where they end and 4 for the label; no string each.
"""

import errno
import hashlib
import json
import os
import stat
import struct
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmim.data.decode.header import EXTENSIONS
from fastmim.data.sources.left_out import LeftOut

MAGIC = b"fastmim index 1\n"
HEAD = struct.Struct("<32sQ")  # SHA-256 of what follows it, bytes of the header
SETTLED_NS = 2_000_000_000  # file systems count in ticks of up to two seconds
STALE_S = 3600.0  # a file half written for so long belongs to nobody
RULES = [2, *EXTENSIONS]  # other rules of what is an image, or how it is named, make another index


class Names(Sequence[str]):
    """Strings as one run of bytes and the places where they end."""

    def __init__(self, blob: bytes | memoryview, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return str(self.blob[self.ends[i - 1] if i else 0 : self.ends[i]], "utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start, blob = 0, self.blob
        for end in self.ends.tolist():
            yield str(blob[start:end], "utf-8", "surrogateescape")
            start = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return np.array_equal(self.ends, other.ends) and self.blob == other.blob
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Names({', '.join(map(repr, self[:3]))}{', ...' if len(self) > 3 else ''})"


@dataclass(frozen=True, eq=False)
class Stamps:
    """The folders or files that an index was made from, relative to a root, and int64 `[len, 2]` stamps."""

    parts: Names
    values: np.ndarray

    @classmethod
    def of(cls, root: Path, parts: Names) -> "Stamps":
        """As they are now. OSError if one cannot be asked."""
        values = np.zeros((len(parts), 2), dtype=np.int64)
        for i, part in enumerate(parts):
            values[i] = stamp(os.stat(os.path.join(root, part)))
        return cls(parts, values)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Stamps)
            and self.parts == other.parts
            and np.array_equal(self.values, other.values)
        )

    def settled(self, now_ns: int) -> bool:
        """Whether every change after `now_ns` will show; a file system without times shows none."""
        ctimes = self.values[:, 0]
        return bool(ctimes.size and ctimes.min() > 0 and ctimes.max() < now_ns - SETTLED_NS)


def stamp(status: os.stat_result) -> tuple[int, int]:
    folder = stat.S_ISDIR(status.st_mode)
    return status.st_ctime_ns, 0 if folder else status.st_size


@dataclass(frozen=True)
class Index:
    """What is known of a set of images of one kind; `arrays` say where they are, as their kind has it."""

    kind: str
    names: Names
    classes: tuple[str, ...]
    labels: np.ndarray | None
    stamps: Stamps
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)


def cache_folder() -> Path:
    """$FASTMIM_CACHE, else $XDG_CACHE_HOME/fastmim, else ~/.cache/fastmim. OSError where there is no home."""
    try:
        if named := os.environ.get("FASTMIM_CACHE"):
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmim"
    except RuntimeError:  # HOME is not set, and nobody is registered by the number of this user
        raise FileNotFoundError(errno.ENOENT, "there is no home folder, nor $FASTMIM_CACHE") from None


def index_file(path: Path) -> Path:
    """Where the index of the set at `path`, which may be a pattern, is kept."""
    return cache_folder() / "index" / f"{hashlib.sha256(_key(path).encode()).hexdigest()[:32]}.index"


def _key(path: Path) -> str:
    return os.fsencode(os.path.abspath(path)).decode("utf-8", "backslashreplace")


def load(path: Path, kind: str) -> Index | None:
    """The kept index of the set at `path`, or None; whether its stamps are still right is for the caller."""
    try:
        file = index_file(path)
        if not is_own(file):
            return None
        return read_index(file.read_bytes(), path, kind)
    except Exception:  # whatever a file that is none makes of itself: the index is made anew
        return None


def is_own(path: Path) -> bool:
    """Whether a file or folder is of this user, or of root, and not for everybody to write to."""
    status = os.lstat(path)
    owner = status.st_uid in (os.getuid(), 0)
    return owner and not status.st_mode & 0o002 and not stat.S_ISLNK(status.st_mode)


def read_index(data: bytes, path: Path, kind: str) -> Index | None:
    """The index of the set at `path`; None if it is of another set or version. Any error if it is damaged."""
    header, arrays = unpack(data)
    if header.get("path") != _key(path) or header.get("kind") != kind or header.get("rules") != RULES:
        return None
    names, parts = (Names(arrays.pop(f"{k}.blob").data, arrays.pop(f"{k}.ends")) for k in ("names", "parts"))
    stamps = Stamps(parts, arrays.pop("stamps"))
    labels = arrays.pop("labels").copy() if "labels" in arrays else None  # torch wants memory to write to
    left_out = LeftOut(header["left_out"])
    index = Index(kind, names, tuple(header["classes"]), labels, stamps, arrays, left_out)
    check_index(index)
    return index


def check_index(index: Index) -> None:
    """ValueError for an index that does not hold together, or names what its set cannot have."""
    n = len(index.names)
    for strings in (index.names, index.stamps.parts):
        check_names(strings, inside=index.kind != "list" or strings is not index.names)
    if index.stamps.values.shape != (len(index.stamps.parts), 2):
        raise ValueError("stamps of another number of parts")
    if index.labels is not None:
        check_labels(index.labels, n, len(index.classes))
    if not all(isinstance(name, str) for name in index.classes):
        raise ValueError("classes that are no names")


def check_names(strings: Names, *, inside: bool) -> None:
    """ValueError for ends that do not ascend to the last byte, and paths that lead out of their folder."""
    ends = strings.ends
    if ends.ndim != 1 or ends.dtype != np.int64 or np.any(np.diff(ends, prepend=0) < 0):
        raise ValueError("names that do not follow one another")
    if (int(ends[-1]) if len(ends) else 0) != len(strings.blob):
        raise ValueError("names of other lengths")
    if not inside or not len(strings.blob):
        return
    letters, starts = np.frombuffer(strings.blob, np.uint8), np.concatenate(([0], ends[:-1]))
    absolute = (letters[starts[starts < ends]] == ord("/")).any()  # of a million names, none is made a string
    if absolute or (b".." in bytes(strings.blob) and any(".." in name.split("/") for name in strings)):
        raise ValueError("a name that leads out of its folder")


def check_labels(labels: np.ndarray, images: int, classes: int) -> None:
    if labels.shape != (images,) or labels.dtype != np.int32:
        raise ValueError("labels of another number of images")
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError("labels of no class")


def save(path: Path, index: Index, read_ns: int) -> bool:
    """Keep an index made from what was there at `read_ns`; False, and a warning, where it cannot be written.

    False without one where the set changed just before: the next start makes it again.
    """
    if not index.stamps.settled(read_ns):
        return False
    arrays = {"stamps": index.stamps.values} | index.arrays
    for name, strings in (("names", index.names), ("parts", index.stamps.parts)):
        arrays |= {f"{name}.blob": np.frombuffer(strings.blob, np.uint8), f"{name}.ends": strings.ends}
    if index.labels is not None:
        arrays["labels"] = index.labels
    header = {
        "path": _key(path),
        "kind": index.kind,
        "rules": RULES,
        "classes": index.classes,
        "left_out": index.left_out.as_json(),
    }
    place = "the cache folder"
    try:
        file = index_file(path)
        place = str(file.parent)
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_remains(file.parent, older_s=STALE_S)
        write_whole(file, pack(header, arrays))
    except OSError as error:
        warnings.warn(
            f"cannot keep the index of {path} in {place}: {error.strerror}; it is made again at every"
            " start. Set FASTMIM_CACHE to a folder that can be written",
            stacklevel=2,
        )
        return False
    return True


def fresh(path: Path, kind: str, root: Path, parts: Names) -> tuple[Index | None, Stamps, int]:
    """The kept index if every part has its stamp; the stamps now; and when that was."""
    now_ns = time.time_ns()
    stamps = Stamps.of(root, parts)
    index = load(path, kind)
    return (index if index is not None and index.stamps == stamps else None), stamps, now_ns


def pack(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """An index file; `unpack` gives its parts back."""
    described = header | {"arrays": [[k, a.dtype.str, list(a.shape)] for k, a in arrays.items()]}
    text = json.dumps(described, sort_keys=True).encode()
    pieces = [text, *(np.ascontiguousarray(a).tobytes() for a in arrays.values())]
    body = b"".join(piece + bytes(-len(piece) % 8) for piece in pieces)
    length = struct.pack("<Q", len(text))
    return MAGIC + hashlib.sha256(length + body).digest() + length + body


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of an index file. ValueError if it is none, of another version, or damaged."""
    start = len(MAGIC) + HEAD.size
    if len(data) < start or not data.startswith(MAGIC):
        raise ValueError("no index of this version")
    digest, length = HEAD.unpack_from(data, len(MAGIC))
    if hashlib.sha256(memoryview(data)[len(MAGIC) + 32 :]).digest() != digest:
        raise ValueError("the checksum differs")
    header = json.loads(data[start : start + length])
    arrays, place = {}, start + length + -length % 8
    for name, dtype, shape in header.pop("arrays"):
        array = np.frombuffer(data, dtype, int(np.prod(shape)), place).reshape(shape)
        arrays[name] = array
        place += array.nbytes + -array.nbytes % 8
    return header, arrays


def remove_remains(folder: Path, older_s: float) -> None:
    """What writers that were killed left half written in a folder, if nobody touched it for `older_s`."""
    for path in folder.glob(".?*.*"):
        with suppress(FileNotFoundError):  # its writer is alive after all, or another removes it
            if path.stat().st_mtime <= time.time() - older_s:
                path.unlink()


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` in the place of the file at once and durably: a reader sees the old or the new."""
    handle, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(new, 0o644)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # its list of names too
    finally:
        os.close(folder)
