"""Draw the rows of one op: `python -m benchmarks.plot attention`. Reads benchmarks/results; measures nothing.

One panel per device, mode and dtype; a group of bars per shape, a bar per provider, the newest row of each.
The line over a bar reaches from the 20th to the 80th percentile.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS

Rows = dict[tuple[str, str], dict[str, Any]]  # by shape and provider


def panels(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], Rows]:
    """The newest sound row of every device, mode, dtype, shape and provider."""
    found: dict[tuple[str, str, str], Rows] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        if "failed" in row:
            continue
        shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
        key = row["device"], row["mode"], row["dtype"]
        found.setdefault(key, {})[shape, row["provider"]] = row
    return found


def draw(rows: Iterable[dict[str, Any]], title: str, path: Path) -> None:
    """Write the picture. ValueError if there is nothing to draw."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = panels(rows)
    if not found:
        raise ValueError(f"want rows of {title}, got none that measured anything")
    figure, axes = plt.subplots(len(found), 1, figsize=(9, 3.2 * len(found)), squeeze=False)
    for axis, (key, cells) in zip(axes[:, 0], found.items(), strict=True):
        shapes = list(dict.fromkeys(shape for shape, _ in cells))
        providers = list(dict.fromkeys(provider for _, provider in cells))
        for i, provider in enumerate(providers):
            at = [(j, cells[shape, provider]) for j, shape in enumerate(shapes) if (shape, provider) in cells]
            bars = [j + (i - (len(providers) - 1) / 2) * 0.8 / len(providers) for j, _ in at]
            ms = [row["ms"] for _, row in at]
            below = [row["ms"] - row["ms_p20"] for _, row in at]
            above = [row["ms_p80"] - row["ms"] for _, row in at]
            axis.bar(bars, ms, 0.8 / len(providers), yerr=[below, above], label=provider)
        axis.set_xticks(range(len(shapes)), shapes, fontsize=8)
        axis.set_ylabel("ms")
        axis.set_title(", ".join(key), fontsize=9)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", help="a file of the results, without its ending")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--out", type=Path, help="the picture; by default beside the rows")
    a = parser.parse_args(arguments)
    path = a.results / f"{a.op}.jsonl"
    if not path.is_file():
        parser.error(f"want rows in {path}, got no such file")
    out = a.out or path.with_suffix(".png")
    draw(map(json.loads, path.read_text().splitlines()), a.op, out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
