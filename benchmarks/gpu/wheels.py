"""Packages that came along as wheels, installed into a folder of the round's own. Nothing is downloaded.

A file above what a transfer takes may have been cut into NAME.part-aa, NAME.part-ab, ...; its pieces may lie
in different folders. What this Python has already stays as it is, unless what came along is newer.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pip._vendor.packaging.version import Version  # pip is what installs; `packaging` may be lacking

PIECE = ".part-"


class NoWheels(ValueError):
    """What is wrong with the folders, in one line."""


def gather(folders: Sequence[Path], target: Path) -> list[Path]:
    """Every wheel of `folders` in `target`, linked or joined of its pieces."""
    target.mkdir(parents=True)
    pieces: dict[str, dict[str, Path]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise NoWheels(f"wheels: want a folder, got {folder}, which is none")
        for path in folder.iterdir():
            name, cut, letters = path.name.partition(PIECE)
            if cut and name.endswith(".whl"):
                pieces.setdefault(name, {})[letters] = path
            elif path.suffix == ".whl":
                (target / path.name).symlink_to(path.resolve())
    for name, parts in pieces.items():
        with (target / name).open("wb") as whole:
            for i, letters in enumerate(sorted(parts)):
                wanted = f"{chr(97 + i // 26)}{chr(97 + i % 26)}"
                if letters != wanted:
                    raise NoWheels(f"wheels: want {name}{PIECE}{wanted}, got {letters} in its place")
                with parts[letters].open("rb") as piece:
                    shutil.copyfileobj(piece, whole)
    found = sorted(target.glob("*.whl"))
    if not found:
        raise NoWheels(f"wheels: want *.whl in {', '.join(map(str, folders))}, got none")
    return found


def newer(wheel: Path) -> bool:
    """Whether this Python lacks the package, or has an earlier version."""
    name, carried = wheel.name.split("-")[:2]
    try:
        return Version(version(name)) < Version(carried)
    except PackageNotFoundError:
        return True


def install(folders: Sequence[Path], site: Path) -> list[str]:
    """Names of what was installed into `site`, which must be on the path before it is imported.

    NoWheels where a folder is missing, a piece is, or a package has no wheel that this Python can use.
    """
    found = gather(folders, site.with_name("wheels"))
    wanted = sorted({path.name.split("-")[0].replace("_", "-").lower() for path in found if newer(path)})
    if not wanted:
        return []
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--quiet"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--find-links", str(found[0].parent)]
    run = subprocess.run(
        [*command, "--target", str(site), *wanted], capture_output=True, text=True, env=os.environ
    )
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or ["no word of why"]
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        raise NoWheels(f"wheels: {python} cannot use what is there: {errors[-1].removeprefix('ERROR: ')}")
    return wanted
