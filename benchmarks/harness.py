"""Time fused ops against their baselines. Right first, then fast: no number without a check.

python -m benchmarks.harness norm_pix_loss_image    appends to benchmarks/results/norm_pix_loss_image.jsonl
python -m benchmarks.plot norm_pix_loss_image       reads that file and draws; measures nothing

`clock.py` says how time is taken. Beside it stands what bytes and FLOP allow: `foreseen_ms`.
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from fastmim_kernels import native
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.clock import copy_gb_per_s, matmul_tflop_per_s, quantiles, take_turns
from benchmarks.devices import known_device
from benchmarks.provenance import DEVICE, NULL, RESULTS, ROOT, append, device_name, environment, module_exists

TOLERANCE = 2e-2  # of the largest value of each output: five steps of bf16
ROUNDS, QUICK_ROUNDS = 6, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured call. `run` returns what it computed, so that it can be checked."""

    op: str
    provider: str  # the first of a group is the baseline that the others are checked against
    mode: str  # "forward", "forward_backward"
    shape: dict[str, int]
    dtype: str
    bytes_moved: int  # the least traffic the op can do: the same number for every provider
    run: Callable[[], tuple[Tensor, ...]]
    flops: int = 0  # of the definition, likewise; 0 where bandwidth is the limit
    oracle: Callable[[], tuple[Tensor, ...]] | None = None  # of the first: what all are checked against
    absent: str | None = None  # why this provider cannot be had here
    served: Callable[[], str] | None = None  # what really computes it, asked when it has run


# --- check, then time -------------------------------------------------------------------------------


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error of any output in units of that output's largest value; inf where shapes differ."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        scale = e.abs().max().double().item()
        if not 0 < scale < float("inf"):
            raise ValueError(f"want a baseline that is finite and not zero, got a largest value of {scale}")
        error = (a.double() - e.double()).abs().max().item() / scale if a.shape == e.shape else float("inf")
        worst = max(worst, error if error == error else float("inf"))
    return worst


def extra_mib(run: Callable[[], object]) -> float:
    """Memory of torch's taken at most beyond what was there before and what is given back in the end.

    On a CPU every allocation and release is added up that torch's profiler records; what a library takes
    without torch is not among them.
    """
    if DEVICE == "cpu":
        live = peak = 0
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = run()
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        return (peak - size_of(result)) / 2**20
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - size_of(result)) / 2**20


def size_of(result: Any) -> int:
    """Bytes of the tensors of a result, each memory once."""
    storages = (x.untyped_storage() for x in result if isinstance(x, torch.Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(cases: Sequence[Case], rounds: int) -> Iterator[dict[str, Any]]:
    """Check every provider against the first, or its oracle, and time those that agree. A row for each.

    With no rounds nothing is timed, and rows tell of what failed alone.
    """
    expected = (cases[0].oracle or cases[0].run)()
    sound, errors = [], []
    for case in cases:
        try:
            actual = case.run()
            error = 0.0 if NULL else relative_error(actual, expected)
            failed = None if error <= TOLERANCE else f"off by {error:.2g} of the largest value"
        except Exception as exception:
            failed = f"{type(exception).__name__}: {str(exception).strip().splitlines()[0][:200]}"
        if failed is None:
            sound.append(case)
            errors.append(error)
        else:
            yield {**named(case), "failed": failed}
    if not rounds:
        return
    times = take_turns([case.run for case in sound], rounds)
    for case, error, taken in zip(sound, errors, times, strict=True):
        low, median, high = quantiles(taken)
        yield {
            **named(case),
            "served": served(case),
            "ms": median,
            "ms_p20": low,
            "ms_p80": high,
            "calls": len(taken),
            "gb_per_s": case.bytes_moved / median / 1e6,
            "tflop_per_s": case.flops / median / 1e9 if case.flops else None,
            "extra_mib": extra_mib(case.run),
            "error": error,
            "copy_gb_per_s": copy_gb_per_s(),
            "foreseen_ms": foreseen_ms(case),
            "foreseen_code_ms": machine_code_ms(case),
        }


def foreseen_ms(case: Case) -> float:
    """What its bytes, or its FLOP, take at the rates measured in this run: no provider can be faster."""
    by_bytes = case.bytes_moved / copy_gb_per_s() / 1e6
    if not case.flops:
        return by_bytes
    return max(by_bytes, case.flops / matmul_tflop_per_s(getattr(torch, case.dtype)) / 1e9)


def machine_code_ms(case: Case) -> float | None:
    """What our kernels' machine code allows on this device; None where no table knows the two."""
    chip, _ = known_device(device_name())
    if chip is None or case.provider != "fastmim" or not module_exists("benchmarks.machine_code"):
        return None
    known = import_module("benchmarks.machine_code")
    if chip.name not in known.CHIPS:
        return None
    found = known.forecast(case.op, case.mode, case.shape, case.dtype, chip.name)
    return None if found is None else found["ms"]


def served(case: Case) -> str:
    """What really computes it: behind "fastmim" Triton, C++ or the reference in Python."""
    if case.served is not None:
        return case.served()
    return back_end(case.op) if case.provider == "fastmim" else case.provider


def back_end(op: str) -> str:
    """Of one of our ops, on this device."""
    if DEVICE == "cuda":
        return "triton"
    return "C++" if native.ready() and hasattr(torch.ops.fastmim, f"native_{op}") else "reference"


def named(case: Case) -> dict[str, Any]:
    return {k: v for k, v in vars(case).items() if k not in ("run", "oracle", "absent", "served")}


def measure_groups(
    groups: Iterable[list[Case]], providers: Sequence[str] | None, rounds: int
) -> Iterator[dict[str, Any]]:
    """Rows of every group, with the providers that are asked for and can be had; the baseline always."""
    for group in groups:
        wanted = [c for i, c in enumerate(group) if i == 0 or providers is None or c.provider in providers]
        for case in wanted:
            if case.absent:
                print(f"{case.provider:>10}  absent: {case.absent}")
        present = [case for case in wanted if not case.absent]
        try:
            yield from measure(present, rounds)
        except torch.OutOfMemoryError as error:  # the other groups may fit
            torch.cuda.empty_cache()
            yield {**named(present[0]), "failed": str(error).splitlines()[0][:200]}


def sentence(row: dict[str, Any]) -> str:
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    head = f"{row['provider']:>10}  {row['mode']:<16}  {shape}  {row['dtype']}"
    if "failed" in row:
        return f"{head}  FAILED: {row['failed']}"
    tflops = f"  {row['tflop_per_s']:.3g} TFLOP/s" if row["tflop_per_s"] else ""
    rate = f"{row['gb_per_s']:.3g} of {row['copy_gb_per_s']:.3g} GB/s"
    code = f", {row['foreseen_code_ms']:.3f} by its machine code" if row["foreseen_code_ms"] else ""
    ms = f"{row['ms']:.3f} ms, {row['foreseen_ms']:.3f} foreseen{code}"
    return f"{head}  {ms}  {rate}{tflops}  {row['extra_mib']:.4g} MiB extra  ({row['served']})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", help="a module of benchmarks/ops")
    parser.add_argument("--providers", nargs="+", help="only these, beside the baseline")
    parser.add_argument("--quick", action="store_true", help="the last case alone, fewer rounds")
    parser.add_argument(
        "--rounds", type=int, help=f"in which providers take turns; {ROUNDS}, or {QUICK_ROUNDS}"
    )
    parser.add_argument("--warm", action="store_true", help="every case once; nothing is timed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    a = parser.parse_args(arguments)
    if not module_exists(f"benchmarks.ops.{a.op}"):
        known = sorted(path.stem for path in (ROOT / "benchmarks" / "ops").glob("*.py"))
        parser.error(f"want one of {', '.join(known)}, got {a.op!r}")
    torch.manual_seed(0)
    env, failures = environment(), 0
    groups = import_module(f"benchmarks.ops.{a.op}").cases()
    chosen = deque(groups, maxlen=1) if a.quick else groups
    rounds = 0 if a.warm else a.rounds or (QUICK_ROUNDS if a.quick else ROUNDS)
    for row in measure_groups(chosen, a.providers, rounds):
        append(a.results / f"{a.op}.jsonl", {**row, **env})
        print(sentence(row), flush=True)
        failures += "failed" in row
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
