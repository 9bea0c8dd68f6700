"""The embedded sample set: 2,400 + 600 procedural JPEG files in 12 classes, made once in the cache folder.

    <cache>/sample-v1/{train,test}/<class>/<index>.jpg   and   manifest.json

Made in a folder beside, by one child process per core, then renamed: there is no half set. The children run
scenes.py by its path: they import neither torch nor the caller's __main__.
"""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastmim.data.sources import scenes
from fastmim.data.sources.index import cache_folder, is_own
from fastmim.data.sources.scenes import CLASSES, COUNTS, SEED, VERSION

STALE_S = 3600.0  # a temporary folder this old belongs to nobody


def sample_set(folder: Path | None = None) -> Path:
    """The sample set's folder (`train/` and `test/` within), made now if it is absent or not whole.

    It lies in `folder`, else $FASTMIM_CACHE, else $XDG_CACHE_HOME/fastmim, else ~/.cache/fastmim. Any number
    of processes may ask at once: one makes it, the others wait. Raises OSError where it cannot be written.
    """
    root = cache_folder() if folder is None else Path(folder)
    made = root / VERSION
    try:
        if _whole(made):
            if not is_own(made):
                raise PermissionError(errno.EPERM, f"{made} is another user's, or others may write to it")
            return made
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{VERSION}.lock"):
            if not _whole(made):  # nobody made it while we waited
                _make(root, made)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot make the embedded sample set in {root}: {error.strerror or error}; "
            "set FASTMIM_CACHE to a folder that can be written and has 40 MB free",
        ) from error
    return made


def _whole(made: Path) -> bool:
    """Whether the manifest is this version's and every class has its number of files."""
    try:
        if json.loads((made / "manifest.json").read_text()) != _manifest():
            return False
        return all(
            len(os.listdir(made / split / name)) == count // len(CLASSES)
            for split, count in COUNTS.items()
            for name in CLASSES
        )
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def _manifest() -> dict[str, object]:
    return {"version": VERSION, "seed": SEED, "counts": COUNTS, "classes": list(CLASSES)}


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process of the machine at a time; the kernel lets go of it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(root: Path, made: Path) -> None:
    print(
        f"making the embedded sample set ({COUNTS['train']:,} images) in {made}", file=sys.stderr, flush=True
    )
    for stale in root.glob(f".{VERSION}-*"):
        if time.time() - stale.stat().st_mtime > STALE_S:
            shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{VERSION}-", dir=root))
    try:
        new = temporary / "new"
        for split in COUNTS:
            for name in CLASSES:
                (new / split / name).mkdir(parents=True)
        _render_in_children(new)
        (new / "manifest.json").write_text(json.dumps(_manifest(), indent=1) + "\n")
        if made.exists():
            made.rename(temporary / "old")
        try:
            new.rename(made)
        except OSError:  # a file system whose locks do not reach other machines: theirs is as good
            if not _whole(made):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _render_in_children(new: Path) -> None:
    num = min(len(os.sched_getaffinity(0)), 32)
    command = [sys.executable, "-P", scenes.__file__, str(new), str(num)]  # -P: fastmim/data hides no package
    children = []
    try:
        for k in range(num):
            children.append(subprocess.Popen([*command, str(k)], stderr=subprocess.PIPE, text=True))
        for child in children:
            _, stderr = child.communicate()
            if child.returncode:
                raise OSError(f"a child that renders ended with {child.returncode}: {stderr.strip()[-500:]}")
    finally:
        for child in children:
            child.kill()
            child.wait()
