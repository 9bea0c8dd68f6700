"""Packing: a source becomes tar shards, WebDataset's layout, that are read image by image.

    DST/shard-000000.tar, ...   per image its name in the source, and KEY.cls with the number of its class;
                                an image whose key an earlier one has gets its sample id before its name
    DST/shard-000000.tar.index  where its images lie, see tar.py
    DST/manifest.json           of which source, with which options, SHA-256 of every shard, classes
    DST/bad_samples.jsonl       what could not be decoded and was left out

An image whose short side is larger than `short_side` is resized to it by Pillow's bicubic filter, which is
antialiased and the filter of the crops, and encoded in its own format; of what is not pixels it keeps its
orientation. Any other is stored byte for byte. The bytes of a shard are a function of source, options and the
versions of Pillow and its codecs, not of the number of threads.

A shard begins where the one before it ended, so a run that was killed continues after the last whole shard.
The source's fingerprint and the options must be those that it began with.
"""

import fcntl
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from PIL import __version__

from fastmim.data.decode.bad_image import BadImage
from fastmim.data.decode.header import EXTENSIONS
from fastmim.data.decode.resize import resized
from fastmim.data.sources.images import Images
from fastmim.data.sources.index import Names, remove_remains, write_whole
from fastmim.data.sources.scan import in_order, read_image
from fastmim.data.sources.source import MANIFEST, read_manifest
from fastmim.data.sources.tar import PLACES, key_of, write_shard_index

BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
SUFFIX |= {"PPM": ".ppm", "JPEG2000": ".jp2"}  # of names that have none

Packed = tuple[bytes, str] | BadImage  # bytes and suffix of their format, or why there are none


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What becomes of an image, and how many make a shard."""

    short_side: int | None = None
    """Pixels; images whose short side is larger are resized to it. Without it: none is."""
    quality: int = 90
    """Of resized JPEG and WebP, 1 to 100."""
    shard_mb: int = 256
    """Largest shard, in 10^6 bytes, unless one image is larger."""

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"want short-side >= 1, got {self.short_side}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"want quality from 1 to 100, got {self.quality}")
        if self.shard_mb < 1:
            raise ValueError(f"want shard-mb >= 1, got {self.shard_mb}")


def pack_images(
    images: Images,
    folder: Path,
    config: PackConfig,
    threads: int,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Pack into `folder`, or go on with it; returns the manifest. `progress` hears of images that are done.

    ValueError if the folder holds something else, is being packed, or was begun otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        manifest = _begin(images, folder, config)
        remove_remains(folder, older_s=0)
        known = {entry["first"]: entry for entry in manifest["shards"]}
        names = _member_names(images.names)
        shards: list[dict[str, Any]] = []
        coming: Iterator[tuple[int, Packed]] | None = None
        start = 0
        while start < len(images):
            entry = known.get(start)
            if entry is None or not is_as_packed(folder, entry):
                coming = coming or _packed(images, config, threads, start)
                entry, coming = _write_shard(folder, len(shards), coming, images, names, config, progress)
                if not entry["images"] and not shards:
                    raise ValueError(f"none of the {len(images)} images can be decoded: {entry['bad'][0][2]}")
                _record(folder, manifest, [*shards, entry, *_after(entry, known)])
            else:
                coming = None  # what was read ahead is there already
                progress(entry["next"] - start)
            shards.append(entry)
            start = entry["next"]
        return _record(folder, manifest | {"complete": True}, shards)


def is_as_packed(folder: Path, entry: dict[str, Any]) -> bool:
    """Whether a shard and its index are those that the manifest names."""
    try:
        for name, key in ((entry["name"], "sha256"), (f"{entry['name']}.index", "index_sha256")):
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry[key]:
                    return False
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another process is packing into {folder}") from None
    finally:
        os.close(handle)


def _begin(images: Images, folder: Path, config: PackConfig) -> dict[str, Any]:
    """The manifest, new or of the run to go on with. ValueError if that was another."""
    source = {"images": len(images), "fingerprint": images.fingerprint, "classes": list(images.classes)}
    wanted = {"source": source, "options": asdict(config)}
    manifest = read_manifest(folder)
    if manifest is None:
        if others := sorted(name for name in os.listdir(folder) if not name.startswith(".")):
            raise ValueError(
                f"want a folder that is empty or was begun by pack, got {folder} with {others[0]}"
            )
        manifest = {
            "format": "fastmim pack 1",
            "complete": False,
            "pillow": __version__,
            **wanted,
            "shards": [],
        }
        return _record(folder, manifest, [])
    differences = [
        f"{part}.{key} was {manifest[part].get(key)!r:.100}, is {value!r:.100}"
        for part, values in wanted.items()
        for key, value in values.items()
        if manifest[part].get(key) != value
    ]
    if differences:
        raise ValueError(f"{folder} was packed otherwise: {'; '.join(differences)}. Choose another folder")
    return manifest | {"complete": False}


def _record(folder: Path, manifest: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Write down what is done: `shards` and the bad samples of them."""
    manifest = manifest | {"shards": shards}
    bad = [
        {"path": path, "sample_id": sample_id, "reason": reason}
        for entry in shards
        for sample_id, path, reason in entry["bad"]
    ]
    if bad:
        lines = "".join(json.dumps(row) + "\n" for row in bad)
        write_whole(folder / "bad_samples.jsonl", lines.encode())
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def _after(entry: dict[str, Any], known: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Shards packed before that follow one which is made again."""
    return [other for first, other in sorted(known.items()) if first >= entry["next"]]


# --- one shard ---------------------------------------------------------------------------------------


def _write_shard(
    folder: Path,
    number: int,
    coming: Iterator[tuple[int, Packed]],
    images: Images,
    names: Names,
    config: PackConfig,
    progress: Callable[[int], object],
) -> tuple[dict[str, Any], Iterator[tuple[int, Packed]]]:
    """A shard of what comes, as far as it goes: its entry in the manifest, and what is still to come."""
    name = f"shard-{number:06d}.tar"
    new, digest = folder / f".{name}.new", hashlib.sha256()
    placed: list[tuple[int, int, int]] = []
    members: list[str] = []
    labels: list[str] = []
    bad: list[tuple[int, str, str]] = []
    first = following = None
    position = 0
    with open(new, "wb") as file:
        for sample_id, packed in coming:
            first = sample_id if first is None else first
            if isinstance(packed, BadImage):
                bad.append((sample_id, images.names[sample_id], str(packed)))
                progress(1)
                continue
            data, suffix = packed
            member = names[sample_id]
            member += "" if member.lower().endswith(EXTENSIONS) else suffix
            label = "" if images.labels is None else str(images.labels[sample_id])
            head, tail = _header(member, len(data)), _label_member(member, label)
            length = len(head) + _padded(len(data)) + len(tail)
            if members and position + length + 2 * BLOCK > config.shard_mb * 10**6:
                following = sample_id, packed
                break
            for piece in (head, data, bytes(_padded(len(data)) - len(data)), tail):
                file.write(piece)
                digest.update(piece)
            placed.append((position + len(head), len(data), crc32(head[-BLOCK:])))
            members.append(member)
            labels.append(label)
            position += length
            progress(1)
        end = bytes(-(position + 2 * BLOCK) % RECORD + 2 * BLOCK)
        file.write(end)
        digest.update(end)
        file.flush()
        os.fsync(file.fileno())
    columns = zip(*placed, strict=True) if placed else ((), (), ())
    places = {key: np.array(c, dtype) for (key, dtype), c in zip(PLACES.items(), columns, strict=True)}
    index = write_shard_index(members, labels, places, position + len(end))
    write_whole(folder / f"{name}.index", index)
    os.replace(new, folder / name)
    entry = {
        "name": name,
        "first": first,
        "next": len(images) if following is None else following[0],
        "images": len(members),
        "bytes": position + len(end),
        "sha256": digest.hexdigest(),
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "bad": bad,
    }
    return entry, coming if following is None else chain([following], coming)


def _header(name: str, size: int) -> bytes:
    """The header of a member: nothing in it but name and size differs between two runs."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _label_member(member: str, label: str) -> bytes:
    if not label:
        return b""
    return _header(f"{key_of(member)}.cls", len(label)) + label.encode().ljust(BLOCK, b"\0")


def _padded(size: int) -> int:
    return size + -size % BLOCK


def _member_names(names: Names) -> Names:
    """What the images are called in the shards: relative, visible, and no two of one key."""
    seen = {""}
    members = []
    for sample_id, name in enumerate(names):
        member = "/".join(part for piece in name.split("/") if (part := piece.lstrip(".")))
        while key_of(member) in seen:
            folder, slash, last = member.rpartition("/")
            member = f"{folder}{slash}{sample_id:08d}-{last}"
        seen.add(key_of(member))
        members.append(member)
    return Names.of(members)


def _packed(images: Images, config: PackConfig, threads: int, start: int) -> Iterator[tuple[int, Packed]]:
    def work(sample_id: int) -> tuple[int, Packed]:
        try:
            data, image = read_image(images, sample_id, deep=True)
        except BadImage as error:
            return sample_id, error
        suffix = SUFFIX[image.format or ""]
        return sample_id, (resized(data, image, config.short_side, config.quality), suffix)

    return in_order(work, range(start, len(images)), threads)
