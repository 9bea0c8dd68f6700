"""Numbers of a run: kept on the device between log steps, then written as JSON lines, events and a bar.

Rows      `metrics.jsonl`, one row per step: step, epoch, loss, the method's own metrics, grad_norm, skipped
          (1 where the step was left out, since its gradients were not finite), lr; after some epochs those of
          the probe. The last row of an interval also has images_per_s (per rank), data_wait (share of the
          time spent waiting for data), seconds. Loss and metrics are means over micro-batches and ranks; what
          is not finite is null.
          A step that was left out is said, and its samples are named in `nonfinite.jsonl`.
Resume    rows after the checkpoint's step are dropped: the resumed run writes them again, the same.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastmim.engine import durable
from fastmim.engine.config import Plan
from fastmim.engine.durable import explain_full_disk, open_to_add
from fastmim.engine.judge import Judge, is_bad, strict
from fastmim.engine.ranks import Ranks
from fastmim.engine.trackers import tensorboard
from fastmim.methods.base import Output


class Stopwatch:
    """Adds up the time spent inside it, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start

    def take(self) -> float:
        """The seconds so far; starts again from zero."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Metrics:
    """Collects on every rank, writes on the first, and warns there of what `diagnose` says, once."""

    def __init__(
        self,
        run_dir: Path,
        plan: Plan,
        ranks: Ranks,
        *,
        log_every: int,
        batch: int,
        start_step: int,
        diagnose: Callable[[Mapping[str, float]], str | None],
        samples: Callable[[int], Sequence[str]] = lambda step: (),
    ):
        self.plan, self.ranks, self.log_every = plan, ranks, log_every
        self.images_per_rank = batch / plan.world
        self.pending: list[tuple[int, float, dict[str, Tensor], Tensor]] = []
        self.judge, self.samples, self.run_dir = Judge(), samples, run_dir
        self.report = Report(run_dir, plan, start_step) if ranks.is_main else None
        self.diagnose, self.warned = diagnose, False
        self.extras: dict[int, dict[str, float]] = {}
        self.restart_clock()

    def add(
        self, step: int, rate: float, outputs: Sequence[Output], norm: Tensor, skipped: Tensor, left: Tensor
    ) -> None:
        """Take the outputs of one step's micro-batches, the norm of its gradients, and what `Finite` saw.

        No transfer, no wait.
        """
        rows = [{"loss": o.loss.detach(), **o.metrics} for o in outputs]
        means = {name: torch.stack([row[name].float() for row in rows]).mean() for name in rows[0]}
        self.pending.append((step, rate, {**means, "grad_norm": norm, "skipped": skipped}, left))

    def also(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that join the row of a step which is not written yet; they are on the host already."""
        self.extras[step] = dict(values)

    def events(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that have a file of their own, among TensorBoard's."""
        if self.report:
            for name, value in values.items():
                self.report.events.add_scalar(name, value, step)

    def due(self, step: int) -> bool:
        return step % self.log_every == 0

    def flush(self, *, seconds_waiting: float) -> None:
        """Bring the interval to the host and write it. A call for all ranks at once; raises `NonFinite`."""
        if not self.pending:
            return
        values = torch.stack([torch.stack([*means.values(), left]) for _, _, means, left in self.pending])
        if self.ranks.world > 1:
            torch.distributed.all_reduce(values)
            values /= self.ranks.world
        *columns, left = zip(*values.tolist(), strict=True)  # the one wait for the device
        seconds = time.perf_counter() - self.clock
        names = list(self.pending[0][2])
        rows: list[dict[str, Any]] = [
            {
                "step": step,
                "epoch": step / self.plan.steps_per_epoch,
                **dict(zip(names, line, strict=True)),
                "lr": rate,
                **self.extras.pop(step, {}),
            }
            for (step, rate, *_), line in zip(self.pending, zip(*columns, strict=True), strict=True)
        ]
        rows[-1]["images_per_s"] = self.images_per_rank * len(rows) / seconds
        rows[-1]["data_wait"] = min(seconds_waiting / seconds, 1.0)
        rows[-1]["seconds"] = seconds
        self.pending.clear()
        self.restart_clock()
        bad = [row for row in rows if is_bad(row)]
        if self.report:
            self.report.write(rows)
            for row in bad:
                self.report.name_samples(row, self.samples(row["step"]))
        self.judge(rows, left)
        if self.report and not self.warned and (warning := self.diagnose(rows[-1])):
            self.report.warn(rows[-1]["step"], warning)
            self.warned = True

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Let so much of the time that just passed count as none: it was spent on something else."""
        self.clock += seconds

    def close(self) -> None:
        if self.report:
            self.report.close()


class Report:
    """The first rank's files and its progress bar: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, run_dir: Path, plan: Plan, start_step: int):
        self.run_dir = run_dir
        self.total, self.start = plan.total_steps, time.monotonic()
        self.first_step = start_step
        self.unit = "GPU" if plan.device == "cuda" else "rank"
        path = run_dir / "metrics.jsonl"
        keep_rows_up_to(path, start_step)
        self.path, self.file = path, open_to_add(path)
        self.events = tensorboard(run_dir, start_step)
        self.bar = None
        if getattr(sys.stderr, "isatty", bool)():  # what notebooks and tests put there may have none
            self.bar = tqdm(total=self.total, initial=start_step, unit="step", dynamic_ncols=True)

    def write(self, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(strict(row), allow_nan=False) + "\n" for row in rows)
        explain_full_disk(self.path, len(text), lambda: self.add(text))
        for row in rows:
            for name in row.keys() - {"step", "epoch", "seconds"}:
                self.events.add_scalar(name, row[name], row["step"])
        last = rows[-1]
        mean_loss = sum(row["loss"] for row in rows) / len(rows)
        words = (
            f"loss {mean_loss:.4f}  lr {last['lr']:.2e}  {last['images_per_s']:.1f} img/s per {self.unit}  "
            f"waiting for data {100 * last['data_wait']:.0f} %"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(words, refresh=False)
            self.bar.update(last["step"] - self.bar.n)
            return
        done = last["step"] - self.first_step
        left = (time.monotonic() - self.start) / done * (self.total - last["step"])
        print(f"step {last['step']}/{self.total}  {words}  ETA {clock(left)}", flush=True)

    def add(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()

    def name_samples(self, row: Mapping[str, Any], samples: Sequence[str]) -> None:
        """Write down what a step that was not finite was made of, and say so."""
        found = {name: row[name] for name in ("step", "epoch", "loss", "grad_norm", "lr")}
        with open_to_add(self.run_dir / "nonfinite.jsonl") as file:
            file.write(json.dumps(strict(found) | {"samples": list(samples)}, allow_nan=False) + "\n")
        done = "it was left out: the weights are as before" if row["skipped"] else "its gradients were"
        self.warn(row["step"], f"loss or gradients are not finite; {done}. nonfinite.jsonl has its samples")

    def warn(self, step: int, warning: str) -> None:
        """A line for who looks on, and a note in the events for who looks later."""
        tqdm.write(f"{'warning':>8}  step {step}: {warning}", file=sys.stdout)
        sys.stdout.flush()
        self.events.add_text("warning", warning, step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        finally:
            self.file.close()
            self.events.close()


def keep_rows_up_to(path: Path, step: int) -> None:
    """Drop the rows of `metrics.jsonl` after `step`, a last line cut short by a kill, and what is no row."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            if row["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
        except (ValueError, TypeError, KeyError):  # ValueError: no JSON, or no UTF-8
            continue
    durable.replace_text(path, b"".join(kept).decode())


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"
