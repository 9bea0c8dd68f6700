"""Time fused ops against their baselines. Right first, then fast: no number without a check.

python -m benchmarks.harness norm_pix_loss_image    appends to benchmarks/results/norm_pix_loss_image.jsonl
python -m benchmarks.plot norm_pix_loss_image       reads that file and draws; measures nothing

Providers take turns in rounds, so that a clock that drifts drifts for all. On CUDA the L2 is filled with
other data before each call, and the device kept busy while the host queues it, as long as that takes: the
time is the device's, without that of the host. Beside it stands what bytes and FLOP allow: `foreseen_ms`.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from fastmim_kernels import native
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.devices import known_device

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NULL = DEVICE == "cuda" and "NULL_CUDA" in os.environ  # a driver that runs nothing: values are garbage there
NULL_DEVICE = "a null device, which computes nothing"
if NULL:
    torch.backends.cuda.enable_cudnn_sdp(False)  # its plans want a real device
PACKAGES = (
    "torch",
    "triton",
    "xformers",
    "mslk-cuda",
    "deepspeed",
    "nvidia-dali-cuda130",
    "timm",
    "transformers",
)
SOURCES = ("fastmim/**/*.py", "kernels/**/*.py", "benchmarks/**/*.py", "csrc/*.cpp", "csrc/*.h")
QUANTILES = (0.2, 0.5, 0.8)

TOLERANCE = 2e-2  # of the largest value of each output: five steps of bf16
ROUNDS, QUICK_ROUNDS = 6, 2
ROUND_MS = 60.0  # of each provider's own time in a round
FLUSH_BYTES = 256 * 2**20  # more than any L2
HEAD_START = 2.0  # of the host's time to queue a call: as long as the device is kept busy before it
LEAST_HEAD_START_MS = 0.5
CALIBRATION_CYCLES = 20_000_000  # about ten milliseconds


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


# --- where a number was measured --------------------------------------------------------------------

CHANGES = ("status", "--porcelain", "--", ".", ":!benchmarks/results")  # rows are written while others come


def environment() -> dict[str, Any]:
    """Device, versions, state of the code, command and time: what every row ends with."""
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": None if (status := git(*CHANGES)) is None else bool(status),
        "sources": sources_digest(),
        "device": device_name(),
        "load": round(os.getloadavg()[0], 1),  # of the host: a busy one makes CPU figures worthless
        "versions": {"python": sys.version.split()[0], **versions()},
        "command": shlex.join(["python", *map(portable, sys.argv)]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name() -> str:
    if DEVICE == "cpu":
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return NULL_DEVICE if NULL else torch.cuda.get_device_name()


@cache
def import_torchvision() -> torch.library.Library | None:
    """Import it; beside a torch for CPUs its own ops lack even their schemas. What is returned must live."""
    library = None
    try:
        import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision")
    return library


def portable(argument: str) -> str:
    """An absolute path without the folders of one machine."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def git(*arguments: str) -> str | None:
    """What git says of this repository; None where there is no git or no repository."""
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


@cache
def sources_digest() -> str:
    """Twelve digits of the SHA-256 of the code, which names it where there is no commit to name."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def append(path: Path, row: dict[str, Any]) -> None:
    """One more line, whole and on disk before the next measurement begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())


# --- time -------------------------------------------------------------------------------------------


def quantiles(values: Sequence[float]) -> list[float]:
    """The 20th, 50th and 80th percentile."""
    return (
        torch.tensor(values, dtype=torch.float64)
        .quantile(torch.tensor(QUANTILES, dtype=torch.float64))
        .tolist()
    )


@cache
def flush_buffer() -> Tensor:
    return torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def flush() -> None:
    """Fill the L2 with what no call wants, by reading: what is written leaves it in the call's own time."""
    flush_buffer().amax()


@cache
def cycles_per_ms() -> float:
    """Of the device's clock, as `torch.cuda._sleep` counts it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first may be of a clock that has yet to rise
        start.record()
        torch.cuda._sleep(CALIBRATION_CYCLES)
        end.record()
        torch.cuda.synchronize()
    return CALIBRATION_CYCLES / start.elapsed_time(end)


def host_ms(run: Callable[[], object]) -> float:
    """Milliseconds until the call returns to the host with an empty queue; the second of two calls."""
    taken = 0.0
    for _ in range(2):  # the first may compile
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        taken = (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    return taken


def samples(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of `count` calls."""
    if DEVICE == "cpu":
        times = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    head_start = int(max(LEAST_HEAD_START_MS, HEAD_START * host_ms(run)) * cycles_per_ms())
    events = []
    for _ in range(count):
        flush()
        torch.cuda._sleep(head_start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def take_turns(
    runs: Sequence[Callable[[], object]], rounds: int, round_ms: float | None = None
) -> list[list[float]]:
    """Milliseconds of the calls of each, taken in rounds whose order is turned each time.

    In a round each is called for `round_ms` of its own time (None: ROUND_MS), 3 to 100 times.
    """
    own_ms = ROUND_MS if round_ms is None else round_ms
    counts = [max(3, min(100, round(own_ms / min(samples(run, 3))))) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for i in range(len(runs))[:: 1 if turn % 2 == 0 else -1]:
            times[i] += samples(runs[i], counts[i])
    return times


@cache
def copy_gb_per_s() -> float:
    """Bytes read and written per second by a copy, of random values too large for any cache."""
    source = torch.randint(0, 256, (2**30 if DEVICE == "cuda" else 2**26,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / quantiles(samples(lambda: target.copy_(source), 20))[1] / 1e6


@cache
def matmul_tflop_per_s(dtype: torch.dtype) -> float:
    """What the library reaches on one large square product of random values."""
    n = 8192 if DEVICE == "cuda" else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    samples(lambda: a @ b, 5)
    return 2 * n**3 / quantiles(samples(lambda: a @ b, 30))[1] / 1e9


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


def module_exists(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


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
