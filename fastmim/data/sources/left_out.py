"""What a source does not read, counted by kind: one line, which is kept with the index.

12 files that are no images by name (.txt 10, .mp4 2), 1 link that leads nowhere: cat/x.jpg
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# in the order in which they are said: what one is called, and several
KINDS = {
    "name": ("file that is no image by its name", "files that are no images by name"),
    "hidden": ("hidden file or folder", "hidden files or folders"),
    "system": ("folder of an operating system", "folders of an operating system"),
    "class": ("link that leads nowhere and may be a class", "links that lead nowhere and may be classes"),
    "nowhere": ("link that leads nowhere", "links that lead nowhere"),
    "circle": ("link that leads in a circle", "links that lead in a circle"),
    "denied": ("entry that may not be looked at", "entries that may not be looked at"),
    "special": ("pipe, socket or device", "pipes, sockets or devices"),
    "empty": ("class folder without an image", "class folders without an image"),
    "sparse": ("sparse member", "sparse members"),
    "symbolic": ("symbolic link in a tar", "symbolic links in tars"),
    "behind": ("tar with bytes behind its end", "tars with bytes behind their end"),
    "lone": ("label (.cls) without an image beside it", "labels (.cls) without an image beside them"),
    "label": ("label, as others have none", "labels, as others have none"),
    "folders": ("class folder's label, as an image lies beside it", "class folders' labels, as images lie"
                " beside them"),
    "column": ("column that is no label by its type", "columns that are no labels by their type"),
    "comment": ("comment", "comments"),
}  # fmt: skip
NAMED = {"class": 20, "denied": 20, "empty": 20}  # how many of a kind are named
FEW = 3
OF_OTHERS = ("label", "folders")  # their names are not of what is counted
DETAILS = 8  # shown of those that are counted
PLAIN_SUFFIX = re.compile(r"\.[a-z][a-z0-9_+~-]{0,9}")


@dataclass
class Kind:
    """How many there are, of which sorts, and what the first in the order of names are called."""

    count: int = 0
    sorts: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)


class LeftOut:
    """A tally of what is not read; as a string, its line, which is empty if nothing was left out."""

    def __init__(self, kinds: dict[str, Any] | None = None):
        """Of what `as_json` gave."""
        self._kinds = {
            kind: Kind(one["count"], Counter(one["sorts"]), list(one["names"]))
            for kind, one in (kinds or {}).items()
        }

    def add(self, kind: str, name: str = "", *, sort: str = "", count: int = 1) -> None:
        """Count what is called `name`, or, where `sort` says more than names do, of which sort it is."""
        assert kind in KINDS
        one = self._kinds.setdefault(kind, Kind())
        one.count += count
        if sort:
            one.sorts[plain(sort)] += count
        elif name:
            one.names = sorted({*one.names, plain(name)})[: NAMED.get(kind, FEW)]

    def add_file(self, name: str) -> None:
        """Count a file by what its name ends with."""
        suffix = os.path.splitext(name)[1].lower()
        if suffix and not PLAIN_SUFFIX.fullmatch(suffix):
            suffix = "others"  # numbers, say, of which each is another
        self.add("name", sort=suffix or "no extension")

    def add_hidden(self, name: str) -> None:
        """Count a hidden file or folder by its name; those that macOS puts beside its files are one sort."""
        self.add("hidden", sort="._*" if name.startswith("._") else name)

    def add_folders(self, names: Iterable[str]) -> None:
        """Count the folders that are no classes, because images lie beside them: a set without labels."""
        folders: set[str] = set()
        first = ""
        for name in names:
            folder, slash, _ = name.partition("/")
            if slash:
                folders.add(folder)
            else:
                first = min(first or name, name)
        if len(folders) > 1 and first:
            self.add("folders", first, count=len(folders))

    def __add__(self, other: "LeftOut") -> "LeftOut":
        both = LeftOut(self.as_json())
        for kind, one in other._kinds.items():
            mine = both._kinds.setdefault(kind, Kind())
            mine.count += one.count
            mine.sorts += one.sorts
            mine.names = sorted({*mine.names, *one.names})[: NAMED.get(kind, FEW)]
        return both

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __str__(self) -> str:
        return ", ".join(_said(kind, self._kinds[kind]) for kind in KINDS if kind in self._kinds)

    def as_json(self) -> dict[str, Any]:
        return {
            kind: {"count": one.count, "sorts": dict(one.sorts), "names": one.names}
            for kind, one in self._kinds.items()
        }


def plain(text: str) -> str:
    """On one line and fit for a terminal, whatever bytes a file name has."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _said(kind: str, one: Kind) -> str:
    said = f"{one.count:,} {KINDS[kind][one.count > 1]}"
    if one.sorts:
        ranked = sorted(one.sorts.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{sort} {count:,}" for sort, count in ranked[:DETAILS]]
        if rest := sum(count for _, count in ranked[DETAILS:]):
            shown.append(f"of other sorts {rest:,}")
        said += f" ({', '.join(shown)})"
    if one.names:
        more = len(one.names) < one.count and kind not in OF_OTHERS
        said += f": {', '.join(one.names)}{', ...' if more else ''}"
    return said
