"""Real tar and Parquet files for the tests of the sources."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from .conftest import encode

CLASSES = ("cat", "dog", "eel")
# the order of sorted names; one class of each size
PICTURES = {
    f"{name}/{i}.jpg": encode(10 * c + i, size=(40 + 5 * i, 60 - 3 * c))
    for c, name in enumerate(CLASSES)
    for i in range(2 + c)
}
LABELS = [CLASSES.index(name.split("/")[0]) for name in PICTURES]


def write_folder(root: Path, files: Mapping[str, bytes] = PICTURES) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: int) -> Path:
    """As Python's tarfile writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def with_labels(labels: Iterable[object], files: Mapping[str, bytes] = PICTURES) -> list[tuple[str, bytes]]:
    """Members in WebDataset's layout: KEY.jpg, KEY.cls."""
    pairs = zip(files.items(), labels, strict=True)
    return [
        member
        for (name, data), label in pairs
        for member in ((name, data), (f"{name.rsplit('.', 1)[0]}.cls", str(label).encode()))
    ]


def write_parquet(
    path: Path, files: Mapping[str, bytes | None], labels: Iterable[int] | None = None, **options: object
) -> Path:
    """Hugging Face's layout: a struct of bytes and path, a ClassLabel named in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array([{"bytes": d, "path": n} for n, d in files.items()], image)}
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"_type": "ClassLabel", "names": list(CLASSES)}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(described), path, **options)
    return path
