"""Milliseconds of an op on a GPU that nobody has at hand: the longest of four times, from bounds.toml.

    bytes    the least that the op can move, over the bandwidth of a copy
    mma      cycles that the tensor cores take for what the kernels issue, padding and doubled work included
    issue    instructions of all warps, over the slots in which an SM can issue one
    launch   what its kernels take that do nothing

At best: latency, waits at barriers and a last wave that fills no GPU come on top. A kernel whose time is that
of `issue` has too many instructions, however it is written down: its bound in the table is where that begins.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("bounds.toml")
LANES, SCHEDULERS = 32, 4
FLOP_PER_CYCLE = 4096  # of an SM by wgmma in half precision: 989 TFLOP/s of the datasheet
FILLED = 0.8  # of the slots to issue in, what a kernel can hope to fill: an assumption, to be measured
LAUNCH_MS = 5e-3  # what a kernel takes that does nothing: an assumption as well
# what stands on one line of the table
GROUPS = {
    "work": ("elements", "flops", "traffic"),
    "holds": ("registers", "shared", "blocks"),
    "moves": ("load", "store", "cp_async", "tma", "barriers"),
    "issues": ("instructions", "mma", "mma_issued"),
}

SUMS = ("ms", "bytes_ms", "mma_ms", "issue_ms", "launch_ms")


@dataclass(frozen=True)
class Chip:
    sms: int
    ghz: float  # at which the datasheet counts its FLOP; less under the power limit
    bytes_per_s: float  # of a copy, measured


CHIPS = {"H200": Chip(132, 1.83, 4.3e12), "H100": Chip(132, 1.83, 3.0e12)}


@cache
def table() -> dict[str, Any]:
    """bounds.toml: "triton", "sm" and "cases"; what stands in groups there is flat here."""
    found = tomllib.loads(TABLE.read_text())
    for case in found["cases"]:
        case |= case.pop("row")
        for kernel in case["kernels"]:
            for group in GROUPS:
                kernel |= kernel.pop(group)
    return found


def estimate(case: Mapping[str, Any], chip: str, scale: float = 1.0) -> dict[str, Any]:
    """Times in ms of a case of the table, `scale` times as large; kernels of a case follow one another."""
    c = CHIPS[chip]
    issue = mma = 0.0
    for kernel in case["kernels"]:
        cycles = scale * kernel["elements"] * kernel["instructions"] / LANES / SCHEDULERS / c.sms
        issue += cycles / (c.ghz * 1e6)
        mma += cycles * kernel["mma_issued"] / (c.ghz * 1e6)
    times = {"bytes": scale * case["bytes"] / c.bytes_per_s * 1e3, "mma": mma, "issue": issue / FILLED}
    times["launch"] = LAUNCH_MS * len(case["kernels"])
    limit = max(times, key=lambda name: times[name])
    ms = times[limit]
    return {
        "ms": ms,
        "limit": limit,
        "share": times["bytes"] / ms,
        **{f"{k}_ms": v for k, v in times.items()},
    }


def forecasts(chip: str = "H200") -> dict[str, dict[str, Any]]:
    """Every case of the table by its name: ms, what limits it, its share of bandwidth."""
    return {case["name"]: estimate(case, chip) for case in table()["cases"]}


def forecast(
    op: str, mode: str, shape: Mapping[str, int], dtype: str = "bfloat16", chip: str = "H200"
) -> dict[str, Any] | None:
    """Of a row as `benchmarks/ops` write it; None where the table knows no case of that width.

    Number of images, rows or heads may be another: time grows with it. "forward_backward" adds the two.
    """
    halves = [mode.replace("forward_backward", half) for half in ("forward", "backward")]
    for modes in ([mode], halves):
        found = [_scaled(op, m, shape, dtype, chip) for m in modes]
        if all(found):
            total = {key: sum(f[key] for f in found) for key in SUMS}
            slowest = max(found, key=lambda f: f["ms"])
            return {**total, "limit": slowest["limit"], "share": total["bytes_ms"] / total["ms"]}
    return None


def _scaled(op: str, mode: str, shape: Mapping[str, int], dtype: str, chip: str) -> dict[str, Any] | None:
    for case in table()["cases"]:
        fixed = {k: v for k, v in case["shape"].items() if k not in case["rows"]}
        same = all(shape.get(k) == v for k, v in fixed.items()) and all(k in shape for k in case["rows"])
        if (case["op"], case["mode"], case["dtype"]) == (op, mode, dtype) and same:
            return estimate(case, chip, math.prod(shape[k] / case["shape"][k] for k in case["rows"]))
    return None


def most_instructions(case: Mapping[str, Any], kernel: Mapping[str, Any]) -> float:
    """For an element, at which issue takes no longer than bytes, products or a bare launch: the usual bound.

    On an H200. A kernel without bytes of its own has those of the case, by its share of the elements.
    """
    chip, elements = CHIPS["H200"], kernel["elements"]
    share = case["bytes"] / sum(k["elements"] for k in case["kernels"])
    seconds = max(elements * (kernel["traffic"] or share) / chip.bytes_per_s, LAUNCH_MS / 1e3)
    cycles = max(seconds * chip.sms * chip.ghz * 1e9 / elements, kernel["flops"] / FLOP_PER_CYCLE)
    return round(FILLED * LANES * SCHEDULERS * cycles, 1)
