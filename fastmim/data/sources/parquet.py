"""Parquet files with a column of encoded images: Hugging Face's layout, or plain binary.

    sample id  = row, through the files sorted by path
    image      = the column that the schema's metadata calls an Image, else the one struct with `bytes`, else
                 the one binary column; of several the one called image or img
    label      = a ClassLabel of the metadata, with its names, else a column of integers or strings; the one
                 called label, labels, class or cls, else the first ClassLabel; else none
                 (names in upper or lower case; columns may be encoded as dictionaries)
    name       = `path` of the struct, else FILE/ROW

A row group is read whole to give one row, and the last few are kept. In shuffled order that is a row group
per image or nearly so: `fastmim data pack` makes shards of it that are read image by image.
"""

import errno
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from fastmim.data.sources.images import Images, check_fetched, distinct, labels_of
from fastmim.data.sources.index import Index, Names, fresh, save
from fastmim.data.sources.left_out import LeftOut

CACHED_BYTES = 512 << 20  # of row groups; one that is larger is kept alone
IMAGE, LABEL = ("image", "img"), ("label", "labels", "class", "cls")


class ParquetImages(Images):
    """Images that are rows of Parquet files."""

    def __init__(self, root: Path, index: Index):
        super().__init__(root, index)
        self._files, self._starts = index.stamps.parts, index.arrays["group_start"]
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, Future[Any]] = OrderedDict()

    def read(self, sample_id: int) -> bytes:
        sample_id = range(len(self))[sample_id]
        group = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        data = self._group(group)[sample_id - int(self._starts[group])].as_py()
        if data is None:
            raise OSError(errno.ENODATA, f"row {sample_id} has no bytes")
        return data

    def _group(self, group: int) -> Any:
        """The images of a row group. Read once however many threads ask; the others wait."""
        with self._lock:
            known = self._groups.get(group)
            if known is not None:
                self._groups.move_to_end(group)
            else:
                mine = self._groups[group] = Future()
        if known is not None:
            return known.result()
        try:
            mine.set_result(self._read_group(group))
        except BaseException as error:
            with self._lock:
                del self._groups[group]
            mine.set_exception(error)
            raise
        self._forget()
        return mine.result()

    def _forget(self) -> None:
        with self._lock:
            held = [
                (group, future.result().nbytes) for group, future in self._groups.items() if future.done()
            ]
            excess = sum(size for _, size in held) - CACHED_BYTES
            for group, size in held[:-1]:
                if excess <= 0:
                    break
                del self._groups[group]
                excess -= size

    def _read_group(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays = self.index.arrays
        path = os.path.join(self.root, self._files[int(arrays["group_file"][group])])
        try:
            with pq.ParquetFile(path) as file:
                _, column = image_column(file.schema_arrow, path)
                table = file.read_row_group(int(arrays["group_number"][group]), [column])
        except (pa.ArrowException, ValueError, OSError) as error:
            number = getattr(error, "errno", None) or errno.EIO
            raise OSError(number, f"row group {group} of {path}: {error}") from None
        images = table.column(0)
        images = images.combine_chunks() if pa.types.is_struct(images.type) else images
        if pa.types.is_struct(images.type):
            chunks = images.chunks if isinstance(images, pa.ChunkedArray) else [images]
            images = pa.chunked_array([chunk.flatten()[0] for chunk in chunks])
        if len(images) != int(np.diff(self._starts, append=len(self))[group]):
            raise OSError(errno.ESTALE, f"{path} changed since it was indexed")
        return images

    def _identity(self) -> Iterator[bytes]:
        """Sizes of single images are not known without reading all: those of files stand for them."""
        for name in self.names:
            yield f"{name}\n".encode("utf-8", "surrogateescape")
        yield np.ascontiguousarray(self.index.stamps.values[:, 1]).tobytes()
        yield from self._labels_identity()


def open_parquet(path: Path, root: Path, files: list[str]) -> ParquetImages:
    """The images of `files`, relative to `root`; `path` is what was asked for.

    ValueError if one is no Parquet with an image column; ModuleNotFoundError without pyarrow.
    """
    index, stamps, read_ns = fresh(path, "parquet", root, Names.of(files))
    if index is None:
        names: list[str] = []
        prefixes: list[str] = []
        labels: list[str | None] = []
        groups: list[tuple[int, int, int]] = []
        left_out = LeftOut()
        classes: tuple[str, ...] = ()
        for i, name in enumerate(files):
            paths, given, said, rows = _index_file(root / name, left_out)
            if i and said != classes:
                raise ValueError(
                    f"{path}: want the same classes in all files, got {len(classes)} in {files[0]} and"
                    f" {len(said)}, or others, in {name}"
                )
            classes = said
            start = len(names)
            places = [f"{name}/{row:06d}" for row in range(len(paths))]
            prefixes += places
            names += [place if p is None else p for place, p in zip(places, paths, strict=True)]
            labels += given
            groups += [(start + sum(rows[:g]), i, g) for g, count in enumerate(rows) if count]
        if not names:
            raise ValueError(f"no image in {path}: its {len(files)} Parquet files have no rows")
        columns = np.array(groups, dtype=np.int64).T
        arrays = dict(zip(("group_start", "group_file", "group_number"), columns, strict=True))
        known = [label for label in labels if label not in (None, "-1")]  # -1: Hugging Face's "not known"
        try:
            named, numbers = labels_of(known, classes) if len(known) == len(labels) else ((), None)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if 0 < len(known) < len(labels):
            first = next(i for i, label in enumerate(labels) if label in (None, "-1"))
            left_out.add("label", f"{names[first]} of {len(labels) - len(known):,}", count=len(known))
        unique = Names.of(distinct(names, prefixes))
        index = Index("parquet", unique, named, numbers, stamps, arrays, left_out)
        save(path, index, read_ns)
    return ParquetImages(root, index)


def _index_file(
    path: Path, left_out: LeftOut
) -> tuple[list[str | None], list[str | None], tuple[str, ...], list[int]]:
    """Paths and labels of all rows, names of the classes, rows of each group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        check_fetched(path)
        with pq.ParquetFile(path) as file:
            schema, meta = file.schema_arrow, file.metadata
            rows = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
            top, _ = image_column(schema, path)
            label, classes = _label_column(schema, left_out)
            kind = schema.field(top).type
            has_path = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
            wanted = [f"{top}.path"] * has_path + [label] * (label is not None)
            columns = file.read(wanted).to_pydict() if wanted else {}
            nothing = [None] * meta.num_rows
            paths = [row and row["path"] for row in columns.get(top, nothing)]
            values = columns.get(label, nothing)
    except pa.ArrowException as error:
        raise ValueError(f"cannot read {path} as Parquet: {error}".replace("\n", " ")) from None
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {os.strerror(error.errno) if error.errno else error}"
        ) from None
    return paths, [None if value is None else str(value) for value in values], classes, rows


def image_column(schema: Any, path: object) -> tuple[str, str]:
    """The column of encoded images and its leaf that holds the bytes. ValueError unless there is one."""
    import pyarrow as pa

    def binary(kind: Any) -> bool:
        kind = _decoded(kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)

    def has_bytes(kind: Any) -> bool:
        return (
            pa.types.is_struct(kind)
            and kind.get_field_index("bytes") >= 0
            and binary(kind.field("bytes").type)
        )

    found = {f.name: f"{f.name}.bytes" for f in schema if has_bytes(f.type)}
    named = {name for name, feature in _features(schema).items() if feature.get("_type") == "Image"}
    found = found or {f.name: f.name for f in schema if binary(f.type)}
    for choice in (named, set(IMAGE)):
        found = {name: leaf for name, leaf in found.items() if {name, name.lower()} & choice} or found
    if len(found) == 1:
        return next(iter(found.items()))
    columns = ", ".join(f"{f.name}: {f.type}" for f in schema)
    what = f"several may be ({', '.join(found)})" if found else "there is none"
    raise ValueError(
        f"want one image column in {path}, a struct with bytes or a binary column called"
        f" {' or '.join(IMAGE)}: {what} among {columns:.400}"
    )


def _decoded(kind: Any) -> Any:
    """The type of the values of a column, which may be encoded as a dictionary."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _label_column(schema: Any, left_out: LeftOut) -> tuple[str | None, tuple[str, ...]]:
    """The column of labels, if there is one, and the names of its classes, if they are said."""
    import pyarrow as pa

    features = _features(schema)
    named = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    called = sorted((n for n in schema.names if n.lower() in LABEL), key=lambda n: LABEL.index(n.lower()))
    for name in [*(name for name in called if name in named), *named]:
        if name in schema.names:
            return name, tuple(features[name].get("names") or ())
    is_text = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    for field in (schema.field(name) for name in called):
        kind = _decoded(field.type)
        if pa.types.is_integer(kind) or any(is_one(kind) for is_one in is_text):
            return field.name, ()
        left_out.add("column", sort=f"{field.name} {field.type}")
    return None, ()


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face's datasets wrote of the columns; nothing if another tool did."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
