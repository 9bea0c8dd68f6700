"""Tar shards, WebDataset's or any other: every image member is a sample, read from where it lies.

    sample id  = place in the shards, sorted by path, in the order of each
    label      = the member KEY.cls (a number or a name), KEY being the path up to the first dot of its last
                 part; else the first-level folder, if no image lies beside these; else none

A shard is read once, for where its members are; `SHARD.tar.index` beside it, which `fastmim data pack`
writes, saves that. A read takes the header before the member with it and compares: bytes of another file that
came to lie there are an OSError, never an image.

Limits   a compressed shard cannot be read in the middle: ValueError. Two images of one key are two samples.
"""

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

from fastmim.data.header import EXTENSIONS
from fastmim.data.images import Images, distinct, labels_by_folder, labels_of
from fastmim.data.index import Index, Names, fresh, pack, save, unpack

BLOCK = tarfile.BLOCKSIZE
OPEN_SHARDS = 256  # files held open, well below the usual limit of 1024
PLACES = {"offset": np.int64, "size": np.int64, "crc": np.uint32}


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
        for i, shard in enumerate(shards):
            shard_names, shard_labels, arrays = _shard(root / shard)
            names += shard_names
            given += shard_labels
            places.append({"shard": np.full(len(shard_names), i, np.int32)} | arrays)
        if not names:
            raise ValueError(
                f"no image in the tar shards of {path} ({len(shards)}): looked for {' '.join(EXTENSIONS)}"
            )
        whole = {key: np.concatenate([place[key] for place in places]) for key in places[0]}
        try:
            numbers = labels_by_folder(names) if "" in given else labels_of(given, classes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        unique = distinct(names, [shards[i] for i in whole["shard"].tolist()])
        index = Index("tar", Names.of(unique), *numbers, stamps, whole)
        save(path, index, read_ns)
    return TarImages(root, index)


def write_shard_index(names: list[str], labels: list[str], arrays: dict[str, np.ndarray], size: int) -> bytes:
    """The content of the index that lies beside a shard of `size` bytes; "" is no label."""
    packed = dict(arrays)
    for key, strings in (("names", Names.of(names)), ("labels", Names.of(labels))):
        packed |= {f"{key}.blob": np.frombuffer(strings.blob, np.uint8), f"{key}.ends": strings.ends}
    return pack({"kind": "shard", "size": size}, packed)


def _shard(path: Path) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """Names, labels and places of the images of one shard, from the index beside it or its headers."""
    try:
        header, arrays = unpack(path.with_name(f"{path.name}.index").read_bytes())
        if header.get("kind") == "shard" and header.get("size") == path.stat().st_size:
            names, labels = (
                list(Names(arrays.pop(f"{k}.blob").data, arrays.pop(f"{k}.ends")))
                for k in ("names", "labels")
            )
            return names, labels, arrays
    except (OSError, ValueError):
        pass  # none, or not of this shard: the shard itself says
    return index_shard(path)


def index_shard(path: Path) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """Names, labels ("" for none) and places of the images of a shard. ValueError if it is no whole tar."""
    names, labels, places = [], [], []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            for _, group in groupby(filter(_counts, tar), key=lambda member: key_of(member.name)):
                members = list(group)
                images = [member for member in members if not member.name.endswith(".cls")]
                given = [_text(file, member) for member in members if member.name.endswith(".cls")]
                if len(given) != len(images):
                    given = (given[:1] or [""]) * len(images)
                names += [member.name.removeprefix("./") for member in images]
                labels += given
                places += [(m.offset_data, m.size, _crc(file, m.offset_data)) for m in images]
            file.seek(tar.offset)
            end = file.read(BLOCK)
        if end.strip(b"\0") or len(end) < BLOCK:
            raise tarfile.ReadError(f"no end of archive at byte {tar.offset:,}: truncated or damaged")
    except tarfile.TarError as error:
        raise ValueError(f"cannot index {path} as a tar: {error}; want an uncompressed tar") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"cannot index {path}: it holds {twice} twice")
    columns = zip(*places, strict=True) if places else ((), (), ())
    arrays = {key: np.array(c, dtype) for (key, dtype), c in zip(PLACES.items(), columns, strict=True)}
    return names, labels, arrays


def _counts(member: tarfile.TarInfo) -> bool:
    hidden = any(part.startswith(".") for part in member.name.removeprefix("./").split("/"))
    return member.isreg() and not hidden and member.name.lower().endswith((*EXTENSIONS, ".cls"))


def key_of(name: str) -> str:
    """What WebDataset's readers call a sample: members of one key belong together."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _text(file: BinaryIO, member: tarfile.TarInfo) -> str:
    data = os.pread(file.fileno(), member.size, member.offset_data)
    return data.decode("utf-8", "surrogateescape").strip()


def _crc(file: BinaryIO, offset: int) -> int:
    return zlib.crc32(os.pread(file.fileno(), BLOCK, offset - BLOCK))
