"""Counts of training steps as text: a file for each method, a column for each engine, a row for each name.

stage     kind        plain  zero 0  ...  name
backward  launch         39      39  ...  add_layer_norm.py:_backward_kernel
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.null_gpu.counts import Counts

FOLDER = Path(__file__).resolve().parent / "golden"
Steps = Mapping[str, Mapping[str, Counts]]  # by column, then by stage


def write(path: Path, steps: Steps, versions: str) -> None:
    columns = list(steps)
    rows = sorted(
        {(stage, *key) for step in steps.values() for stage, counts in step.items() for key in counts},
        key=lambda row: (list(next(iter(steps.values()))).index(row[0]), row),
    )
    width = max(map(len, columns)) + 2
    lines = [
        f"# {versions}; recorded by: make null-gpu ARGS=--record",
        f"{'stage':10}{'kind':12}{''.join(c.rjust(width) for c in columns)}  name",
    ]
    for stage, kind, name in rows:
        counts = "".join(str(step[stage][kind, name]).rjust(width) for step in steps.values())
        lines.append(f"{stage:10}{kind:12}{counts}  {name}")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def read(path: Path, columns: Sequence[str]) -> tuple[str, dict[str, dict[str, Counts]]]:
    """The versions that a file was recorded with, and its steps. ValueError if its columns are others."""
    versions, head, *lines = path.read_text().splitlines()
    if head.split()[2:-1] != list(columns):
        raise ValueError(f"{path.name}: want columns {' '.join(columns)}, got {head}")
    steps: dict[str, dict[str, Counts]] = {column: {} for column in columns}
    for line in lines:
        stage, kind, *rest = line.split(None, 2 + len(columns))
        *numbers, name = rest
        for column, number in zip(columns, numbers, strict=True):
            counts = steps[column].setdefault(stage, Counts())
            if int(number):
                counts[kind, name] = int(number)
    return versions.removeprefix("# ").partition(";")[0], steps
