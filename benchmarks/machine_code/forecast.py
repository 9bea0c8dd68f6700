"""Milliseconds of an op on a GPU that nobody has at hand: the longest of four times, from bounds.toml.

    bytes    the least that the op can move, over the bandwidth of a copy
    mma      cycles that the tensor cores take for what the kernels issue, padding and doubled work included
    issue    instructions of all warps, over what the SMs can issue, and of that a kernel's usual share
    launch   from one queued kernel to the next

At best: latency, waits at barriers and a last wave that fills no GPU come on top. A kernel whose time is that
of `issue` has too many instructions, however it is written down: its bound in the table is where that begins.
"""

import math
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.devices import DEVICES, GAP_MS, ISSUE

TABLE = Path(__file__).with_name("bounds.toml")
CHIPS = {name: DEVICES[name] for name in ("H200", "H100")}  # for which the table's code is compiled
LANES = 4 * 32  # that an SM can issue for in a cycle
# what stands on one line of the table
GROUPS = {
    "work": ("elements", "flops", "traffic"),
    "holds": ("registers", "shared", "blocks"),
    "moves": ("load", "store", "cp_async", "tma", "barriers"),
    "issues": ("instructions", "mma", "mma_issued"),
}

SUMS = ("ms", "bytes_ms", "mma_ms", "issue_ms", "launch_ms")


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
    device = CHIPS[chip]
    issue = mma = 0.0
    for kernel in case["kernels"]:
        full = scale * kernel["elements"] * kernel["instructions"] / device.issue_per_s * 1e3
        issue, mma = issue + full / ISSUE, mma + full * kernel["mma_issued"]
    moved = scale * case["bytes"] / device.copy_gb_per_s / 1e6
    times = {"bytes": moved, "mma": mma, "issue": issue, "launch": GAP_MS * len(case["kernels"])}
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
        parts = [_scaled(op, m, shape, dtype, chip) for m in modes]
        found = [part for part in parts if part]
        if len(found) == len(parts):
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
    device, elements = CHIPS["H200"], kernel["elements"]
    share = case["bytes"] / sum(k["elements"] for k in case["kernels"])
    seconds = max((kernel["traffic"] or share) / device.copy_gb_per_s / 1e9, GAP_MS / 1e3 / elements)
    products = kernel["flops"] / device.flop_per_cycle * LANES
    return round(ISSUE * max(seconds * device.issue_per_s, products), 1)
