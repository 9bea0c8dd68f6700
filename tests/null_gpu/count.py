"""Launches, copies, waits, peak memory and host time of a training step, on the null CUDA device.

.venv-cuda/bin/python -m tests.null_gpu.run -m tests.null_gpu.count --method mae --engine deepspeed --top 20
.venv-cuda/bin/python -m tests.null_gpu.run -m tests.null_gpu.count --method rmae --engine plain --compile

The step is that of benchmarks/throughput.py, whose flags these are. Three steps warm up, two are counted and
must be equal, and `--timed` more give host times: the milliseconds until a stage has asked the device for all
that it wants, as medians, on the wall's clock and of the processor. `--json` writes what was found.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import throughput
from benchmarks.engines import Engine, make_engine, synthetic
from fastmim.engine.ranks import Ranks
from fastmim.views import Batch
from tests.null_gpu.counts import Counts, read, reset, total

STAGES = ("forward", "backward", "update")
WARM, TIMED = 3, 10


class Unsteady(RuntimeError):
    """Two steps in a row ask for different things."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step: what each stage asked of the device, and how long the host took."""

    counts: dict[str, Counts]
    wall_ms: dict[str, float]
    cpu_ms: dict[str, float]  # of all threads of the process
    peak_gib: float  # as torch's allocator counts


def stages(engine: Engine, batch: Batch) -> list[tuple[str, Callable[[], None]]]:
    loss: list[torch.Tensor] = []
    return [
        ("forward", lambda: loss.append(engine.forward(batch))),
        ("backward", lambda: engine.backward(loss.pop())),
        ("update", engine.update),
    ]


def counted(engine: Engine, batch: Batch) -> dict[str, Counts]:
    counts = {}
    for name, stage in stages(engine, batch):
        reset()
        stage()
        counts[name] = read()
    return counts


def timed(engine: Engine, batch: Batch) -> dict[str, tuple[float, float]]:
    """Milliseconds of the wall and of the processor, of each stage."""
    ms = {}
    for name, stage in stages(engine, batch):
        wall, cpu = time.perf_counter(), time.process_time()
        stage()
        ms[name] = (1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))
    return ms


def measure(engine: Engine, batch: Batch, steps: int) -> Step:
    """Raises Unsteady."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM):
        for _, stage in stages(engine, batch):
            stage()
    first, second = counted(engine, batch), counted(engine, batch)
    for name in STAGES:
        if first[name] != second[name]:
            raise Unsteady(f"{name}: {differences(first[name], second[name])}")
    times = [timed(engine, batch) for _ in range(steps)]
    wall, cpu = ({name: median(t[name][i] for t in times) for name in STAGES} for i in range(2))
    peak = torch.cuda.max_memory_allocated() / 2**30
    return Step(counts=second, wall_ms=wall, cpu_ms=cpu, peak_gib=peak)


def differences(before: Counts, after: Counts) -> str:
    """Every name of which there are more or fewer, a line each."""
    rows = [(before[key], after[key], *key) for key in sorted(before | after) if before[key] != after[key]]
    return "".join(f"\n  {b:5} -> {a:5}  {kind}  {name}" for b, a, kind, name in rows)


def run(arguments: argparse.Namespace, steps: int) -> Step:
    """The step of benchmarks/throughput.py for these flags."""
    config, model = throughput.configured(arguments, arguments.method)
    if arguments.depth is not None:
        model = replace(model, depth=arguments.depth)
    torch.manual_seed(0)
    method = config.build(model)
    method.share(Ranks.single())
    if arguments.compile:
        method.compile(dynamic=False)
    engine = make_engine(method, config, model, arguments)
    return measure(engine, synthetic(method, model.channels, arguments.batch), steps)


# --- words ------------------------------------------------------------------------------------------


def table(step: Step) -> str:
    """A line for each stage, and their sum."""
    lines = [f"{'':9}launches  memsets  copies  to host  waits   host ms    cpu ms"]
    whole: Counts = sum(step.counts.values(), start=Counts())
    for name, counts in [*step.counts.items(), ("step", whole)]:
        wall, cpu = (
            sum(v for k, v in ms.items() if name in (k, "step")) for ms in (step.wall_ms, step.cpu_ms)
        )
        copies, to_host = total(counts, "copy"), total(counts, "copy", "device to host")
        lines.append(
            f"{name:9}{total(counts, 'launch'):8}  {total(counts, 'memset'):7}  {copies - to_host:6}  "
            f"{to_host:7}  {total(counts, 'wait'):5}  {wall:8.1f}  {cpu:8.1f}"
        )
    return "\n".join([*lines, f"peak {step.peak_gib:.2f} GiB"])


def names(step: Step, top: int) -> str:
    """What each stage asks for most."""
    lines = []
    for stage, counts in step.counts.items():
        rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))[:top]
        lines += [stage, *(f"  {count:5}  {kind:10}  {name}" for (kind, name), count in rows)]
    return "\n".join(lines)


def as_rows(step: Step) -> dict[str, Any]:
    """For JSON: kind, tab, name as one key."""
    counts = {stage: {"\t".join(key): n for key, n in c.items()} for stage, c in step.counts.items()}
    return {"counts": counts, "wall_ms": step.wall_ms, "cpu_ms": step.cpu_ms, "peak_gib": step.peak_gib}


def parser() -> argparse.ArgumentParser:
    p = throughput.parser()
    p.description = __doc__
    p.set_defaults(batch=1024, precision="bf16", attention="sdpa")
    p.add_argument("--depth", type=int, help="blocks of the encoder, instead of the model's")
    p.add_argument("--timed", type=int, default=TIMED, help="steps for the host times")
    p.add_argument("--top", type=int, default=0, help="show so many names of each stage")
    p.add_argument("--json", type=Path, help="write what was found to this file")
    return p


def main() -> int:
    p = parser()
    a = p.parse_args()
    if a.timed < 1:
        p.error(f"want --timed of 1 or more, got {a.timed}")
    if len(a.method) != 1:
        p.error(f"--method: want one, got {' '.join(a.method)}")
    (a.method,) = a.method
    step = run(a, a.timed)
    print(f"{a.method} {a.model}, batch {a.batch}, {a.precision}, {a.attention}, {a.engine} zero {a.zero}")
    print(table(step))
    if a.top:
        print(names(step, a.top))
    if a.json:
        a.json.write_text(json.dumps(as_rows(step)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
