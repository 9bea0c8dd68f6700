"""Where the time of a training step goes: kernels by device time, launches, host time, clocks, power, memory.

python -m benchmarks.step_profile --method mae --model vit_base --batch 1024 --fit

The step is that of throughput.py, checked in the same way and by the same engine. It is timed without the
profiler; the profiler then records a few steps for the kernels alone. Host time is the wall time of a step so
small that the device waits for the host. One row goes to benchmarks/results/step_profile.jsonl.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engines import (
    Engine,
    check_step,
    first,
    make_engine,
    repeated,
    step,
    synthetic,
    time_steps,
)
from benchmarks.flops import step_flops
from benchmarks.provenance import DEVICE, append, environment
from benchmarks.step_rows import describe, fractions, rates
from benchmarks.throughput import checked, configured, fitting, parser, peak_gib, steps_within
from fastmim.views import Batch

HOST_IMAGES = 16  # more, and the host waits for room in the device's queue, not for its own work
STEPS = 4  # recorded by the profiler
TOP = 40  # kernels shown
ASKED = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "utilization.gpu")


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def host_ms(engine: Engine, batch: Batch) -> float:
    """Milliseconds in which the host queues a step of a few images, each on an idle device: the median."""
    few = first(batch, HOST_IMAGES, DEVICE)
    times = []
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        step(engine, few)
        times.append((time.perf_counter() - start) * 1e3)
    synchronize()
    return median(times[3:])


def kernels(engine: Engine, batch: Batch) -> list[dict[str, Any]]:
    """Name, launches and microseconds in a step of each kernel, the longest first; on a CPU, of each op."""
    activities = [ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            step(engine, batch)
        synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in recorded.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device == (DEVICE == "cuda"):
            found[event.name].append(event.device_time if on_device else event.self_cpu_time_total)
    rows = [
        {"kernel": name, "launches": len(times) / STEPS, "us": sum(times) / STEPS}
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


@contextmanager
def watched(figures: dict[str, Any]) -> Iterator[None]:
    """Clocks (MHz), power (W), temperature while this lasts, ten a second: least, median and most."""
    if DEVICE == "cpu" or shutil.which("nvidia-smi") is None:
        yield
        return
    with tempfile.TemporaryFile("w+") as said:
        command = [
            "nvidia-smi",
            f"--query-gpu={','.join(ASKED)}",
            "--format=csv,noheader,nounits",
            "-lms",
            "100",
        ]
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        lines = [line.split(", ") for line in said.read().splitlines()]
    for name, values in zip(ASKED, zip(*lines, strict=False), strict=False):
        numbers = [float(value) for value in values if value.strip().replace(".", "").isdigit()]
        if numbers:
            figures[name] = [min(numbers), median(numbers), max(numbers)]


def measure(engine: Engine, batch: Batch, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of a step of this engine on this batch."""
    batches = repeated(batch)
    count = steps_within(engine, batches, arguments)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    state: dict[str, Any] = {}
    with watched(state):
        whole, *stages = time_steps(engine, batches, count)
    names = ("ms_waiting", "ms_forward", "ms_backward", "ms_update")
    figures: dict[str, Any] = rates(whole, arguments.batch)
    figures |= {name: median(times) for name, times in zip(names, stages, strict=True)}
    figures |= {"peak_gib": peak_gib(), "host_ms": host_ms(engine, batch), "state": state}
    found = kernels(engine, batch)
    return figures | {
        "launches": sum(row["launches"] for row in found),
        "kernel_ms": sum(row["us"] for row in found) / 1e3,
        "kernels": found[:TOP],
        "kernels_left_out": len(found[TOP:]),
    }


def page(row: dict[str, Any]) -> str:
    """What to read of a row."""
    name = f"{row['method']} {row['model']} {row['provider']} batch {row['batch']}"
    lines = [
        f"{name}: {row['images_per_s']:.1f} img/s",
        f"  {row['ms']:.2f} ms: forward {row['ms_forward']:.2f}, backward {row['ms_backward']:.2f}, "
        f"update {row['ms_update']:.2f}; host {row['host_ms']:.2f}; kernels {row['kernel_ms']:.2f} "
        f"in {row['launches']:.0f} launches; {row['peak_gib']:.1f} GiB",
        *(
            f"  {name}: {low:g} to {high:g}, median {mid:g}"
            for name, (low, mid, high) in row["state"].items()
        ),
    ]
    whole = max(row["kernel_ms"], 1e-9) * 1e3
    for found in row["kernels"]:
        share = 100 * found["us"] / whole
        lines.append(
            f"  {found['us']:9.1f} us {share:5.1f} % {found['launches']:7.1f} x  {found['kernel'][:110]}"
        )
    last = f"{name}: {row['ms']:.1f} ms, kernels {row['kernel_ms']:.1f}, host {row['host_ms']:.1f}"
    return "\n".join([*lines, f"{last}, {row['launches']:.0f} launches"])


def main(command: Sequence[str] | None = None) -> int:
    p = parser()
    p.description = __doc__
    a = p.parse_args(command)
    if a.sweep or a.data or a.warm:
        p.error("want none of --sweep, --data and --warm here")
    if len(a.method) != 1:
        p.error(f"--method: want one, got {' '.join(a.method)}")
    env = environment()
    (name,) = a.method
    config, model = configured(a, name)
    method, errors = checked(config, model, a.precision)
    if a.compile:
        method.compile(dynamic=False)
    engine = make_engine(method, config, model, a)
    why_batch = None
    if a.fit:
        a.batch, why_batch = fitting(engine, method, model.channels, a.batch)
    batch = synthetic(method, model.channels, a.batch)
    loss = check_step(engine, method, batch, a.precision)
    row = {"provider": engine.name, **describe(config, model, a), "batch": a.batch, "why_batch": why_batch}
    row |= {"loss": loss, **errors, **measure(engine, batch, a)}
    tflop_per_s = row["images_per_s"] * step_flops(config, model) / 1e12
    row |= {"tflop_per_s": tflop_per_s, **fractions(tflop_per_s, a.precision)}
    append(a.results / "step_profile.jsonl", row | env)
    print(page(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
