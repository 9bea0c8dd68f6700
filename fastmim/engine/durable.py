"""Files that are whole and on the disk, or said not to be: fsync, atomic replacement, checksums."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")

NEARLY_FULL = 1 << 20  # bytes: a write that fails with less than this left failed for want of room


class Damaged(Exception):
    """A file is not what was written; the message names it."""


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Put `text` in the place of the file at once and durably: a reader sees the old or the new."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    fsync(path.parent)


def open_to_add(path: Path) -> IO[str]:
    """Open a file of text to add lines to. OSError for a link, which may lead anywhere."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "a")


def file_names(folder: Path) -> list[str]:
    """Every file below a folder, relative, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def describe(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def check(path: Path, entry: dict[str, Any]) -> None:
    """Damaged if the file is not the one that `describe` gave `entry` for."""
    if not path.is_file():
        raise Damaged(f"{path} is missing")
    size = path.stat().st_size
    if size != entry["size"]:
        raise Damaged(f"{path} has {size:,} bytes, {entry['size']:,} were written")
    if describe(path) != entry:
        raise Damaged(f"{path} is not what was written: its SHA-256 differs")


def seal(body: dict[str, Any]) -> str:
    """JSON with its own SHA-256. TypeError or ValueError for what JSON cannot hold."""
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    return json.dumps(
        {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": json.loads(text)}, indent=1
    )


def unseal(path: Path) -> dict[str, Any]:
    """What `seal` wrote. Damaged if it is not."""
    try:
        content = json.loads(path.read_text())
        body = content["body"]
        if json.loads(seal(body))["sha256"] != content["sha256"]:
            raise Damaged(f"{path} is not what was written: its SHA-256 differs")
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is not what was written: {error}") from None
    return body


def explain_full_disk(path: Path, need_bytes: int | None, fn: Callable[[], T]) -> T:
    """`fn()`; a failure for want of room becomes an OSError with the path, the bytes needed and those free.

    torch reports a full disk as an error of its file format, so any failure on a disk with next to nothing
    left is taken for one.
    """
    try:
        return fn()
    except Exception as error:
        free = shutil.disk_usage(existing(path)).free + size_below(path)  # as it was before this write
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or shutil.disk_usage(existing(path)).free < NEARLY_FULL:
            raise OSError(errno.ENOSPC, full_disk(path, need_bytes, free)) from error
        raise


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return path if path.exists() or path == path.parent else existing(path.parent)


def size_below(folder: Path) -> int:
    """Bytes of all files in a folder, 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def full_disk(path: Path, need_bytes: int | None, free: int) -> str:
    needed = "more bytes than there are" if need_bytes is None else f"{need_bytes:,} bytes"
    return f"disk full: {path} needs {needed}, {free:,} are free"
