"""Features of images in a file, with their ids, names and labels: Parquet or safetensors.

    Parquet       a row per image: id, path, label if there is one, and a fixed-size list for each feature;
                  written batch by batch. Patches are N * D values in a row, the metadata has the shape
    safetensors   tensors id `[N]`, label `[N]`, and each feature `[N, ...]`; held in memory until the end;
                  the metadata has paths and classes as JSON

A file appears under its name when it is whole.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".parquet", ".safetensors")


def check_suffix(path: Path) -> None:
    """ValueError for a file of another kind."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--out: want a file that ends in {' or '.join(SUFFIXES)}, got {path}")


def write_features(
    path: Path,
    batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]],
    *,
    names: Sequence[str],
    labels: Any | None,
    classes: Sequence[str],
    about: Mapping[str, str],
) -> int:
    """Write (ids, features by name) of each batch; `names` and `labels` are by id. Gives the number of rows.

    ValueError for another suffix than those above.
    """
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    write = write_parquet if path.suffix == ".parquet" else write_safetensors
    try:
        rows = write(partial, batches, names, labels, {**about, "classes": json.dumps(list(classes))})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return rows


def write_parquet(
    path: Path,
    batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]],
    names: Sequence[str],
    labels: Any | None,
    about: Mapping[str, str],
) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, rows = None, 0
    try:
        for ids_B, found in batches:
            ids = ids_B.tolist()
            columns = {"id": pa.array(ids, pa.int64()), "path": pa.array([names[i] for i in ids])}
            if labels is not None:
                columns["label"] = pa.array([int(labels[i]) for i in ids], pa.int64())
            shapes = {}
            for name, value in found.items():
                flat = value.detach().cpu().contiguous().flatten(1)
                shapes[f"{name}_shape"] = json.dumps(list(value.shape[1:]))
                values = pa.array(flat.flatten().numpy())
                columns[name] = pa.FixedSizeListArray.from_arrays(values, flat.shape[1])
            table = pa.table(columns)
            if writer is None:
                schema = table.schema.with_metadata({**about, **shapes})
                writer = pq.ParquetWriter(path, schema)
            writer.write_table(table.cast(writer.schema))
            rows += len(ids)
    finally:
        if writer is not None:
            writer.close()
    return rows


def write_safetensors(
    path: Path,
    batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]],
    names: Sequence[str],
    labels: Any | None,
    about: Mapping[str, str],
) -> int:
    from safetensors.torch import save_file

    ids: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {}
    for ids_B, found in batches:
        ids.append(ids_B)
        for name, value in found.items():
            parts.setdefault(name, []).append(value.detach().cpu())
    id_N = torch.cat(ids)
    tensors = {"id": id_N} | {name: torch.cat(values) for name, values in parts.items()}
    if labels is not None:
        tensors["label"] = torch.from_numpy(labels[id_N.numpy()]).long()
    paths = json.dumps([names[i] for i in id_N.tolist()])
    save_file(tensors, path, {**about, "paths": paths})
    return len(id_N)
