"""The run directory: whether it can be had, a name where none is given, and its config.json.

Imports no DeepSpeed: what is wrong with the directory is said before that starts.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from fastmim.engine import durable
from fastmim.engine.config import Run

CONFIG = "config.json"
RUNS = Path("runs")
PROBE = bytes(4096)  # a file system that is full takes an empty file


def place_of(run: Run) -> Path:
    """The run directory, or the folder for one, absolute and free of links."""
    return Path(os.path.realpath(RUNS if run.run_dir is None else run.run_dir))


def check_run_dir(run: Run) -> None:
    """ValueError where the run cannot be written, or where another is. Leaves nothing behind."""
    if run.run_dir is None and run.resume:
        raise ValueError("resume: want --run-dir, the directory of the run to continue")
    place = place_of(run)
    try:
        there = nearest(place)
        for folder in {there, nearest(place / "checkpoints")}:
            check_writable(folder)
        saved = run.run_dir is not None and any((place / "checkpoints").glob("step-*"))
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(f"run-dir: want a folder that can be written, got {place}: {why}") from None
    if saved and not run.resume:
        raise ValueError(
            f"run-dir: {place} holds checkpoints of a run; add --resume to continue it, or name another"
        )


def nearest(path: Path) -> Path:
    """The path if it is there, else the nearest of the folders it would be in."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def check_writable(folder: Path) -> None:
    """OSError where no file can be made and written; modes alone do not say so to root or of a full disk."""
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(PROBE)


def check_room(run_dir: Path, need_bytes: int) -> None:
    """OSError where a checkpoint of so many bytes does not fit beside what is there."""
    free = shutil.disk_usage(nearest(run_dir)).free
    if free < need_bytes:
        raise OSError(errno.ENOSPC, durable.full_disk(run_dir, need_bytes, free))


def claimed(name: str) -> Path:
    """A new directory `runs/NAME-DATE-TIME`, with a number behind it where another run was as quick."""
    first = Path(os.path.realpath(RUNS)) / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    first.parent.mkdir(parents=True, exist_ok=True)
    for k in count(1):
        path = first if k == 1 else first.with_name(f"{first.name}-{k}")
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("count ends")


@contextmanager
def no_empty_folder_left(run_dir: Path, *, ours: bool) -> Iterator[None]:
    """Whatever is raised, an empty run directory goes, if it is ours to make."""
    try:
        yield
    except BaseException:
        if ours:
            with suppress(OSError):  # there is something in it, or nothing was made
                run_dir.rmdir()
        raise


def write_configuration(run_dir: Path, content: dict[str, Any]) -> None:
    """Put config.json in its place at once, with the name that the directory has now."""
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**content, "run_dir": str(run_dir)}, indent=2)
    durable.replace_text(run_dir / CONFIG, text + "\n")


def saved_fingerprint(run_dir: Path) -> str | None:
    """That of the facts which the last start was allowed, if config.json says so."""
    try:
        return json.loads((run_dir / CONFIG).read_text()).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        return None
