"""Tar shards, WebDataset's or any other: every image member is a sample, read from where it lies.

    sample id  = place in the shards, sorted by path, in the order of each
    label      = the member KEY.cls (a number or a name), KEY being the path up to the first dot of its last
                 part, .cls in upper or lower case; else the first-level folder, if no image lies beside
                 these; else none
    name       = the path of the member, relative: without "/", "./" and "../" before it

A shard is read once, for where its members are; `SHARD.tar.index` beside it, which `fastmim data pack`
writes, saves that. A read takes the header before the member with it and compares: bytes of another file that
came to lie there are an OSError, never an image. Hard links are the members that they link to. An archive
behind the end of another, as `cat a.tar b.tar` makes, is read too. Other members are counted in `left_out`.

Limits   a compressed shard cannot be read in the middle: ValueError. Two images of one key are two samples.
         Sparse members, whose holes are not stored, and symbolic links are left out.
"""

import codecs
import errno
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastmim.data.decode.header import EXTENSIONS
from fastmim.data.sources.folder import OF_SYSTEMS
from fastmim.data.sources.images import Images, check_fetched, distinct, labels_by_folder, labels_of, no_image
from fastmim.data.sources.index import Index, Names, check_names, fresh, pack, save, unpack
from fastmim.data.sources.left_out import LeftOut

BLOCK = tarfile.BLOCKSIZE
LABEL = ".cls"
CHUNK = 1 << 20  # bytes read at once where an archive ends
OPEN_SHARDS = 256  # files held open, well below the usual limit of 1024
PLACES = {"offset": np.int64, "size": np.int64, "crc": np.uint32}


Shard = tuple[list[str], list[str], dict[str, np.ndarray], LeftOut]  # names, labels ("": none), places
Member = tuple[str, int, int]  # name, byte where its content starts, bytes of it


class _Open:
    """A file descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class TarImages(Images):
    """Images that are members of tar shards."""

    def __init__(self, root: Path, index: Index):
        super().__init__(root, index)
        self._shards = index.stamps.parts
        self._open = lru_cache(OPEN_SHARDS)(lambda shard: _Open(os.path.join(root, self._shards[shard])))

    def read(self, sample_id: int) -> bytes:
        shard, offset, size, crc = (int(self.index.arrays[name][sample_id]) for name in ("shard", *PLACES))
        opened = self._open(shard)  # held by name, or another thread may close it
        data = os.pread(opened.descriptor, BLOCK + size, offset - BLOCK)
        if len(data) != BLOCK + size or zlib.crc32(data[:BLOCK]) != crc:
            raise OSError(errno.ESTALE, f"{self._shards[shard]} changed since it was indexed")
        return data[BLOCK:]

    def _identity(self) -> Iterator[bytes]:
        for name, size in zip(self.names, self.index.arrays["size"].tolist(), strict=True):
            yield f"{name}\0{size}\n".encode("utf-8", "surrogateescape")
        yield from self._labels_identity()


def open_tar(path: Path, root: Path, shards: list[str], classes: Sequence[str] = ()) -> TarImages:
    """The images of `shards`, relative to `root`; `path` is what was asked for, `classes` names its numbers.

    ValueError if there is no image, or a shard that cannot be indexed.
    """
    parts = Names.of(shards)
    index, stamps, read_ns = fresh(path, "tar", root, parts)
    if index is None:
        names: list[str] = []
        given: list[str] = []
        places = []
        left_out = LeftOut()
        for i, shard in enumerate(shards):
            shard_names, shard_labels, arrays, others = _shard(root / shard)
            left_out += others
            names += shard_names
            given += shard_labels
            places.append({"shard": np.full(len(shard_names), i, np.int32)} | arrays)
        if not names:
            raise no_image(f"the tar shards of {path} ({len(shards)})", left_out)
        whole = {key: np.concatenate([place[key] for place in places]) for key in places[0]}
        try:
            numbers = labels_by_folder(names) if "" in given else labels_of(given, classes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if count := sum(map(bool, given)) if "" in given else 0:
            left_out.add("label", f"{names[given.index('')]} of {len(given) - count:,}", count=count)
        if numbers[1] is None:
            left_out.add_folders(names)
        unique = distinct(names, [shards[i] for i in whole["shard"].tolist()])
        index = Index("tar", Names.of(unique), *numbers, stamps, whole, left_out)
        save(path, index, read_ns)
    return TarImages(root, index)


def write_shard_index(names: list[str], labels: list[str], arrays: dict[str, np.ndarray], size: int) -> bytes:
    """The content of the index that lies beside a shard of `size` bytes; "" is no label."""
    packed = dict(arrays)
    for key, strings in (("names", Names.of(names)), ("labels", Names.of(labels))):
        packed |= {f"{key}.blob": np.frombuffer(strings.blob, np.uint8), f"{key}.ends": strings.ends}
    return pack({"kind": "shard", "size": size}, packed)


def _shard(path: Path) -> Shard:
    """What one shard holds, by the index beside it or its headers."""
    try:
        header, arrays = unpack(path.with_name(f"{path.name}.index").read_bytes())
        if header.get("kind") == "shard" and header.get("size") == path.stat().st_size:
            names, labels = (
                Names(arrays.pop(f"{k}.blob").data, arrays.pop(f"{k}.ends")) for k in ("names", "labels")
            )
            check_names(names, inside=True)
            check_names(labels, inside=False)
            check_places(arrays, len(names), len(labels), header["size"])
            return list(names), list(labels), arrays, LeftOut()  # of our making: there is nothing else in it
    except Exception:  # none, damaged or not of this shard: the shard itself says
        pass
    return index_shard(path)


def check_places(arrays: dict[str, np.ndarray], names: int, labels: int, size: int) -> None:
    """ValueError for places that are not in a shard of `size` bytes, or of another number of images."""
    if labels != names or arrays.keys() != PLACES.keys():
        raise ValueError("an index of other columns")
    for name, dtype in PLACES.items():
        if arrays[name].shape != (names,) or arrays[name].dtype != dtype:
            raise ValueError("an index of another number of images")
    offset, length = arrays["offset"], arrays["size"]
    if names and (offset.min() < BLOCK or length.min() < 0 or length.max() > size):
        raise ValueError("places outside of the shard")
    if names and (offset > size - length).any():
        raise ValueError("places outside of the shard")


def index_shard(path: Path) -> Shard:
    """Names, labels ("" for none) and places of the images of a shard. ValueError if it is no whole tar."""
    names, labels, places, left_out = [], [], [], LeftOut()
    try:
        check_fetched(path)
        with open(path, "rb") as file:
            for _, group in groupby(_members(file, path, left_out), key=lambda member: key_of(member[0])):
                members = list(group)
                images = [member for member in members if not _is_label(member[0])]
                given = [member for member in members if _is_label(member[0])]
                for name, _, _ in given[max(1, len(images)) if images else 0 :]:
                    left_out.add("lone", name)
                texts = [_text(file, member) for member in given]
                if len(texts) != len(images):
                    texts = (texts[:1] or [""]) * len(images)
                names += [name for name, _, _ in images]
                labels += texts
                places += [(start, size, _crc(file, start)) for _, start, size in images]
    except tarfile.TarError as error:
        raise ValueError(f"cannot index {path} as a tar: {error}; want an uncompressed tar") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"cannot index {path}: it holds {twice} twice")
    columns = zip(*places, strict=True) if places else ((), (), ())
    arrays = {key: np.array(c, dtype) for (key, dtype), c in zip(PLACES.items(), columns, strict=True)}
    return names, labels, arrays, left_out


def _members(file: BinaryIO, path: Path, left_out: LeftOut) -> Iterator[Member]:
    """Images and labels of the archives of a file, one behind the other; other members are counted."""
    start: int | None = 0
    while start is not None:
        if start and not _is_header(os.pread(file.fileno(), BLOCK, start)):
            left_out.add("behind", path.name)
            return
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            yield from _members_of(tar, left_out)
            end = tar.offset
        start = _next_archive(file, end)


def _members_of(tar: tarfile.TarFile, left_out: LeftOut) -> Iterator[Member]:
    known: dict[str, tuple[int, int]] = {}  # where members lie that hard links may link to
    for member in tar:
        name = _relative(member.name)
        parts = name.split("/")
        target = _relative(member.linkname) if member.islnk() else name
        hidden = [part for part in parts if part.startswith(".")]
        system = [part for part in parts[:-1] if part.lower() in OF_SYSTEMS]
        plain = member.isreg() and not member.issparse()
        if plain:
            known[name] = member.offset_data, member.size
        if member.isdir():
            continue
        if hidden:
            left_out.add_hidden(hidden[0])
        elif system:
            left_out.add("system", sort=system[0])
        elif not name.lower().endswith((*EXTENSIONS, LABEL)):
            left_out.add_file(name)
        elif member.issparse():
            left_out.add("sparse", name)
        elif member.issym():
            left_out.add("symbolic", name)
        elif (plain or member.islnk()) and target in known:
            yield name, *known[target]
        else:
            left_out.add("nowhere" if member.islnk() else "special", name)


def _relative(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _next_archive(file: BinaryIO, end: int) -> int | None:
    """Where another archive starts behind one that ends at byte `end`. TarError if that is no end."""
    file.seek(end)
    block = file.read(BLOCK)
    if block.strip(b"\0") or len(block) < BLOCK:
        raise tarfile.ReadError(f"no end of archive at byte {end:,}: truncated or damaged")
    place = end + BLOCK
    while data := file.read(CHUNK):
        if rest := data.lstrip(b"\0"):
            return (place + len(data) - len(rest)) // BLOCK * BLOCK
        place += len(data)
    return None


def _is_label(name: str) -> bool:
    return name.lower().endswith(LABEL)


def key_of(name: str) -> str:
    """What WebDataset's readers call a sample: members of one key belong together."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _text(file: BinaryIO, member: Member) -> str:
    _, start, size = member
    data = os.pread(file.fileno(), size, start).removeprefix(codecs.BOM_UTF8)
    return data.decode("utf-8", "surrogateescape").strip()


def _crc(file: BinaryIO, offset: int) -> int:
    return zlib.crc32(os.pread(file.fileno(), BLOCK, offset - BLOCK))
