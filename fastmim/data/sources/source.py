"""A path in, images out: what a path is decides how it is read.

    folder                   of images, nested or flat; or of shards, there or below       folder.py
    .txt .tsv .lst .list     a path per line, and after a tab its label                    folder.py
    .tar                     one, a folder of them, `*` or `{0..9}`; also WebDataset's     tar.py
    .parquet                 one, a folder of them, `*` or `{0..9}`; Hugging Face's        parquet.py

A name that exists is taken as it is, whatever brackets are in it. Shards of several splits (train,
validation, test) are refused unless braces name them; shards beside images are refused. The in-memory source
is `memory.MemoryImages`. Sample ids are stable: a function of names, or of the order in the file. What was
found is kept, see index.py.
"""

import fnmatch
import glob
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from fastmim.data.sources.folder import (
    COMPRESSED,
    SHARDS,
    Found,
    kept_folder,
    only_shards,
    open_folder,
    open_list,
    walk,
)
from fastmim.data.sources.images import Images
from fastmim.data.sources.index import index_file
from fastmim.data.sources.left_out import plain
from fastmim.data.sources.parquet import open_parquet
from fastmim.data.sources.tar import open_tar

LISTS = (".txt", ".tsv", ".lst", ".list")
MANIFEST = "manifest.json"  # of a folder that `fastmim data pack` wrote
ACCEPTED = (
    f"a folder of images, a list of paths ({' '.join(LISTS)}), or tar or Parquet shards: one file, a folder"
    " of them or a pattern"
)
BRACES = re.compile(r"\{([^{}]*)\}")
OF_MANY = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.\w+")  # as Hugging Face names files
WORD = r"(?:^|[-._ /])({})(?=[-._ /\d])"  # in a path, as its readers look for it
SPLITS = {
    "train": re.compile(WORD.format("train|training")),
    "validation": re.compile(WORD.format("validation|valid|val|dev")),
    "test": re.compile(WORD.format("test|testing|eval|evaluation")),
}


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
        raise ValueError(f"cannot read {plain(str(error.filename or path))}: {error.strerror}") from None


def _open(path: Path) -> Images:
    if not path.exists():
        choices = [] if path.is_symlink() else list(_matching(str(path)))
        if not any(choices):
            why = "is a link that leads nowhere" if path.is_symlink() else "does not exist"
            raise ValueError(f"want {ACCEPTED}, got {plain(str(path))}: it {why}")
        for files in choices:  # of braces: they name what is to be mixed
            _check_splits(path, files)
        return _open_shards(path, sorted({file for files in choices for file in files}))
    if path.is_dir():
        found = only_shards(path) or walk(path)
        if found.images and all(shard.lower().endswith(COMPRESSED) for shard in found.shards):
            for shard in found.shards:  # what was downloaded and unpacked
                found.left_out.add_file(shard)
            return open_folder(path, found)
        if not found.shards:
            return open_folder(path, found)
        if found.images:
            raise ValueError(_mixed(path, found))
        files = sorted(os.path.join(path, shard) for shard in found.shards)
        _check_splits(path, files)
        images = _open_shards(path, files)
        if read_manifest(path) is None:
            images.left_out += found.left_out
        return images
    if path.name.lower().endswith(LISTS):
        _check_file(path)
        return open_list(path)
    return _open_shards(path, [str(path)])


def _mixed(path: Path, found: Found) -> str:
    shard = Path(min(found.shards))
    pattern = path / shard.with_name(f"*{shard.suffix}")
    return plain(
        f"{path} holds {len(found.shards)} shards, and beside them {min(found.images)}: name the shards by a"
        f" pattern, as {pattern}, or the images by their folder"
    )


def _open_shards(path: Path, files: list[str]) -> Images:
    for file in files:
        _check_file(Path(file))
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise ValueError(f"want shards of one kind, got {' and '.join(sorted(kinds))} files in {path}")
    root, names = _below(files)
    if kinds == {".tar"}:
        manifest = read_manifest(root)
        if manifest and not manifest["complete"]:
            raise ValueError(f"{root} is not packed to its end: run the same `fastmim data pack` again")
        return open_tar(path, root, names, manifest["source"]["classes"] if manifest else ())
    return open_parquet(path, root, names)


def _check_file(path: Path) -> None:
    """ValueError for what would have us wait for ever, or is a folder of a shard's name."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise ValueError(f"want {ACCEPTED}, got {plain(str(path))}: it is {what}")


def _below(files: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder that all lie in, and their paths relative to it."""
    full = [os.path.abspath(file) for file in files]
    root = os.path.commonpath([os.path.dirname(file) for file in full])
    return Path(root), [os.path.relpath(file, root) for file in full]


def _check_splits(path: Path, files: Sequence[str]) -> None:
    """ValueError if shards are of several splits: nobody asked for a test set among what is trained on."""
    if not files:
        return
    root, names = _below(files)
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(_split(name), name)
    if len(first) < 2:
        return
    # the one to train on as the example; a shard of no split may be the only other
    name = first.get("train") or first[min(filter(None, first))]
    folder, last = os.path.split(name)
    match = OF_MANY.fullmatch(last)
    start = f"{match[1]}-" if match else re.split(r"\d", Path(last).stem)[0] if not folder else ""
    example = os.path.join(root, folder, f"{start}*{Path(name).suffix}")
    said = ", ".join(sorted(filter(None, first))) + (f" and others ({first['']})" if "" in first else "")
    raise ValueError(
        plain(
            f"{path} holds the splits {said}: name one, as {example}, or several in braces, as {{train,test}}"
        )
    )


def _split(name: str) -> str:
    """The split that a shard is of by its path; "" if that says nothing."""
    for split, word in SPLITS.items():
        if word.search(name.lower()):
            return split
    match = OF_MANY.fullmatch(os.path.basename(name))
    return match[1] if match else ""


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


def _matching(pattern: str) -> Iterator[list[str]]:
    """Files of a pattern with `{0..9}`, `{a,b}`, `*`, `?`, `[]`, for each choice of its braces.

    ValueError if one of a range is missing.

    Names that exist are taken as they are, as far as they do: what is behind them is the pattern.
    """
    parts = pattern.split("/")
    known = max(i for i in range(len(parts)) if not i or os.path.lexists("/".join(parts[:i]) or "/"))
    folder = "/".join([*parts[:known], ""]) if known else ""
    rest = "/".join(parts[known:])
    for plain_rest in _braces(rest):
        found = list(_existing(folder, plain_rest.split("/")))
        if plain_rest != rest and not found:
            raise ValueError(
                f"want every shard of {plain(pattern)}, got none at {plain(folder + plain_rest)}"
            )
        yield found


def _existing(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """Paths in `folder` that a pattern stands for, part by part."""
    name, *rest = parts
    names = [name]
    if not os.path.lexists(folder + name) and glob.has_magic(name):
        names = (
            sorted(fnmatch.filter(os.listdir(folder or "."), name)) if os.path.isdir(folder or ".") else []
        )
        names = [n for n in names if not n.startswith(".") or name.startswith(".")]
    for each in names:
        if rest:
            yield from _existing(f"{folder}{each}/", rest)
        elif os.path.lexists(folder + each):
            yield folder + each


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
