"""A path in, images out: what a path is decides how it is read.

    folder                   of images, nested or flat                                     folder.py
    .txt .tsv .lst .list     a path per line, and after a tab its label                    folder.py
    .tar                     one, a folder of them, `*` or `{0..9}`; also WebDataset's     tar.py
    .parquet                 one, a folder of them, `*` or `{0..9}`; Hugging Face's        parquet.py

The in-memory source is `memory.MemoryImages`. Sample ids are stable: a function of names, or of the order in
the file. What was found is kept, see index.py.
"""

import glob
import json
import os
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from fastmim.data.folder import kept_folder, open_folder, open_list
from fastmim.data.header import EXTENSIONS
from fastmim.data.images import Images
from fastmim.data.index import index_file
from fastmim.data.parquet import open_parquet
from fastmim.data.tar import open_tar

LISTS, SHARDS = (".txt", ".tsv", ".lst", ".list"), (".tar", ".parquet")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
MANIFEST = "manifest.json"  # of a folder that `fastmim data pack` wrote
ACCEPTED = (
    f"a folder of images, a list of paths ({' '.join(LISTS)}), or tar or Parquet shards: one file, a folder"
    " of them or a pattern"
)
BRACES = re.compile(r"\{([^{}]*)\}")
SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")  # as Hugging Face names files


def find_images(path: Path, *, refresh: bool = False) -> Images:
    """The images of a folder, a list, or shards. ValueError if it is none of these, or without an image.

    `refresh` makes the kept index anew, whether or not something changed.
    """
    path = Path(path)
    if refresh:
        index_file(path).unlink(missing_ok=True)
    elif kept := kept_folder(path):  # first: a look at what a large folder is takes as long as a walk
        return kept
    try:
        return _open(path)
    except OSError as error:
        raise ValueError(f"cannot read {error.filename or path}: {error.strerror}") from None


def _open(path: Path) -> Images:
    if not path.exists():
        files = sorted(_matching(str(path)))
        if not files:
            raise ValueError(f"want {ACCEPTED}, got {path}: it does not exist")
        return _open_shards(path, files)
    if path.is_dir():
        shards = _shards_in(path)
        return _open_shards(path, shards) if shards else open_folder(path)
    if path.name.lower().endswith(LISTS):
        return open_list(path)
    return _open_shards(path, [str(path)])


def _open_shards(path: Path, files: list[str]) -> Images:
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise ValueError(f"want shards of one kind, got {' and '.join(sorted(kinds))} files in {path}")
    full = [os.path.abspath(file) for file in files]
    root = Path(os.path.commonpath([os.path.dirname(file) for file in full]))
    names = [os.path.relpath(file, root) for file in full]
    if kinds == {".tar"}:
        manifest = read_manifest(root)
        if manifest and not manifest["complete"]:
            raise ValueError(f"{root} is not packed to its end: run the same `fastmim data pack` again")
        return open_tar(path, root, names, manifest["source"]["classes"] if manifest else ())
    splits = {match[1] for name in names if (match := SPLIT.fullmatch(os.path.basename(name)))}
    if len(splits) > 1:
        raise ValueError(
            f"{path} holds the splits {', '.join(sorted(splits))}: name one, as"
            f" {root / (min(splits) + '-*.parquet')}"
        )
    return open_parquet(path, root, names)


def _kind(file: str) -> str:
    """.tar or .parquet. ValueError for any other file."""
    lower = file.lower()
    if lower.endswith(COMPRESSED):
        raise ValueError(f"want an uncompressed tar, which can be read anywhere, got {file}: decompress it")
    for kind in SHARDS:
        if lower.endswith(kind):
            return kind
    start = ""
    if os.path.isfile(file):
        with open(file, "rb") as opened:
            start = f" that starts with {opened.read(8)!r}"
    raise ValueError(f"want {ACCEPTED}, got {file}: it is a file of another format{start}")


def _shards_in(path: Path) -> list[str]:
    """Shards directly in a folder, sorted; none if it is one of images. ValueError if it may be both."""
    shards: list[str] = []
    others: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            lower = entry.name.lower()
            if entry.name.startswith("."):
                continue
            if lower.endswith((*SHARDS, *COMPRESSED)) and not entry.is_dir():
                shards.append(entry.path)
            elif (not shards or not others) and (lower.endswith(EXTENSIONS) or entry.is_dir()):
                others.append(entry.name)
    if shards and others:
        pattern = path / f"*{Path(min(shards)).suffix}"
        raise ValueError(
            f"{path} holds {len(shards)} shards, and beside them {min(others)}: name the shards by a pattern,"
            f" as {pattern}, or the images by their folder"
        )
    return sorted(shards)


def _matching(pattern: str) -> Iterator[str]:
    """Files of a pattern with `{0..9}`, `{a,b}`, `*`, `?`, `[]`. ValueError if one of a range is missing."""
    for plain in _braces(pattern):
        found = glob.glob(plain) if glob.has_magic(plain) else [plain]
        if plain != pattern and not (found and os.path.exists(found[0])):
            raise ValueError(f"want every shard of {pattern}, got none at {plain}")
        yield from (file for file in found if os.path.exists(file))


def _braces(pattern: str) -> list[str]:
    """Every string that the braces of a pattern stand for, as a shell has it."""
    pieces = BRACES.split(pattern)  # plain, inner, plain, ...
    choices = [_choices(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(choice) for choice in product(*choices)]


def _choices(inner: str) -> list[str]:
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        width = len(ends[1]) if ends[1].startswith("0") else 0
        return [f"{i:0{width}d}" for i in range(int(ends[1]), int(ends[2]) + 1)]
    return inner.split(",") if "," in inner else [f"{{{inner}}}"]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `fastmim data pack` wrote of a folder; None if it is not one of its own."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == "fastmim pack 1" else None
