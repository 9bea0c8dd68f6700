"""What a round leaves behind, on disk as it comes: rows, what became of each part, the log, the table.

Rows are appended to the results folder by what measures them. Here they are copied, each with the name of its
file, to `rows.jsonl` of the folder OUT, a second later at most; `--keep rows.jsonl` puts them back into a
results folder elsewhere. What became of each part is a row like any other, of `round.jsonl`: from there, or
from the rows.jsonl of an earlier call, the next call knows where to go on.
"""

import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.provenance import NULL_DEVICE, append, environment

ROUND = "round.jsonl"
HEAD_BYTES, TAIL_BYTES = 200_000, 30_000  # of what a part says, its begin and its end
LOG_BYTES = 12_000_000  # of the whole log: what brings it home may have a limit of its own


@dataclass
class Record:
    """Where rows are read from, and where all goes."""

    results: Path
    home: Path | None  # OUT, if it is named
    sizes: dict[Path, int] = field(default_factory=dict)  # bytes of each row file that were seen
    rows: list[dict[str, Any]] = field(default_factory=list)  # of this round, with "file"
    logged: int = 0

    def __post_init__(self) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        self.sizes = {path: path.stat().st_size for path in self.results.glob("*.jsonl")}
        if self.home:
            self.home.mkdir(parents=True, exist_ok=True)
            for name in ("rows.jsonl", "log.txt", "table.txt"):
                (self.home / name).write_bytes(b"")

    def collect(self) -> None:
        """Take over the rows that were written since, whole lines alone."""
        new = []
        for path in sorted(self.results.glob("*.jsonl")):
            seen = self.sizes.get(path, 0)
            if path.stat().st_size == seen:
                continue
            with path.open("rb") as file:
                file.seek(seen)
                whole, newline, _ = file.read().rpartition(b"\n")
            self.sizes[path] = seen + len(whole) + len(newline)
            new += [{"file": path.name, **json.loads(line)} for line in whole.splitlines()]
        self.rows += new
        if self.home and new:
            add(self.home / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in new).encode())

    def log(self, said: bytes) -> None:
        if self.home and self.logged < LOG_BYTES:
            self.logged += len(said)
            add(self.home / "log.txt", said)

    def table(self, text: str) -> None:
        if self.home:
            new = self.home / "table.new"
            new.write_text(text)
            os.replace(new, self.home / "table.txt")


def add(path: Path, content: bytes) -> None:
    """Append, and leave it to no cache."""
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# --- going on, and bringing home --------------------------------------------------------------------


def earlier(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """What became of the parts of earlier rounds: rows of round.jsonl, alone or among others."""
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path.name}: want a row of JSON in line {number}, got {line[:40]!r}"
                ) from error
            if path.name == ROUND or row.get("file") == ROUND:
                rows.append(row)
    return rows


def keep(path: Path, results: Path) -> int:
    """Append the rows of a round's rows.jsonl to the files they belong to; returns how many.

    Rows of the very code that stands here bear its commit: where they were measured git may know none.
    ValueError for rows of a device that runs nothing: they are no measurements.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    null = sum(row.get("device") == NULL_DEVICE for row in rows)
    if null:
        raise ValueError(f"keep: want rows of a device that computes, got {null} of {NULL_DEVICE!r}")
    here = environment()
    for row in rows:
        if row.get("sources") == here["sources"] and not here["dirty"]:
            row |= {key: here[key] for key in ("commit", "dirty")}
        append(results / Path(row.pop("file")).name, row)
    return len(rows)


# --- to read ----------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]], troubles: Sequence[str]) -> str:
    """What was measured, what was done, and what was not; what matters most comes last."""
    parts = [row for row in rows if row["file"] == ROUND]
    figures = [row for row in rows if row["file"] != ROUND]
    steps = ("throughput.jsonl", "step_profile.jsonl", "rivals.jsonl")
    figures.sort(key=lambda row: steps.index(row["file"]) if row["file"] in steps else -1)
    lines = ["", "measured", *(f"  {described(row)}" for row in figures)]
    lines += ["", "   took  of      part"]
    lines += [
        f"{row['seconds']:6.1f} {row['limit_s']:5.0f} s  {row['stage']}, {row['part']}: {row['outcome'][:90]}"
        for row in parts
    ]
    if troubles:
        lines += ["", "failed, cut short or skipped", *(f"  {trouble}" for trouble in troubles)]
    return "\n".join(lines) + "\n"


def described(row: dict[str, Any]) -> str:
    """One figure in about a hundred columns."""
    keys = ("op", "mode", "method", "model", "dtype", "precision")
    name = " ".join(str(row[key]) for key in keys if row.get(key)) or row["file"].removesuffix(".jsonl")
    shape = " ".join(f"{k}={v}" for k, v in row.get("shape", {}).items())
    batch = f"batch {row['batch']}" if "batch" in row else ""
    head = " ".join(filter(None, (name, shape or batch, row.get("provider"))))
    head += "" if row.get("images", "synthetic") == "synthetic" else f" {row['images']}"
    head += f" ({row['why_batch']})" if row.get("why_batch") else ""
    if "failed" in row:
        return f"{head}: {row['failed']}"
    if "verdict" in row:
        return f"{head}: {row['verdict']}"
    if "images_per_s" not in row:
        rate = f"{row['gb_per_s']:.4g} of {row['copy_gb_per_s']:.4g} GB/s"
        return f"{head}: {row['ms']:.4g} ms, {rate}{foreseen(row)}"
    if "mfu_of_matmul" not in row:
        return f"{head}: {row['images_per_s']:.1f} img/s"
    share = f"{100 * row['mfu_of_matmul']:.1f} % of {row['matmul_tflop_per_s']:.4g} TFLOP/s"
    return f"{head}: {row['images_per_s']:.1f} img/s, {share}{foreseen(row)}"


def exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def foreseen(row: dict[str, Any]) -> str:
    """What bytes, FLOP and machine code let expect of this figure."""
    if row.get("foreseen_images_per_s"):
        return f", foreseen {row['foreseen_images_per_s']:.1f}"
    ahead = row.get("foreseen_code_ms") or row.get("foreseen_ms")
    return f", foreseen {ahead:.4g} ms" if ahead else ""
