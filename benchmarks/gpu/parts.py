"""One part of the round: a process with a limit of its own, and what became of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks.gpu.record import HEAD_BYTES, TAIL_BYTES, Record, exists
from benchmarks.gpu.shares import Want
from benchmarks.gpu.worker import ROOT, Order

READY = ("torch", "fastmim_kernels", "fastmim.engine.deepspeed", "benchmarks.engines", "benchmarks.flops")
SKIPPED = 3  # exit status of a part that names what it lacks
POLL_S = 0.2
GRACE_S = 3.0  # between SIGTERM, on which a part may say how far it came, and SIGKILL
WARNING = re.compile(r"\bwarn", re.IGNORECASE)  # what libraries say at exit is no one's last word
MARK = "FASTMIM_ROUND"  # in the environment of all that a part starts


@dataclass(frozen=True)
class Part:
    """One process. `needs` are modules without which it is not begun."""

    name: str
    command: tuple[str, ...]  # behind the interpreter
    needs: tuple[str, ...] = ()
    share: float = 1.0  # of its stage


@dataclass(frozen=True)
class Stage:
    """Parts that share a share of the round."""

    name: str
    share: float
    parts: tuple[Part, ...]
    least_s: float = 8.0  # of each part
    always: bool = False  # what a fresh machine wants done, however often it was done elsewhere

    def want(self) -> Want:
        return Want(self.share, self.least_s * len(self.parts))


@dataclass
class Outcome:
    """What became of a part."""

    what: str  # "ok", or the reason
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.what.partition(":")[0].partition(" ")[0]  # ok, failed, stopped, skipped


def remaining(
    stages: Sequence[Stage], done: Sequence[dict[str, Any]], sources: str, device: str
) -> list[Stage]:
    """What is still to do after the rounds that `done` tells of, what was never answered first.

    A part that went well with these sources on this device is not repeated. One that went well with others
    comes behind all that never did; one that failed with these very sources, behind both.
    """
    ranks: dict[tuple[str, str], int | None] = {}
    for row in done:
        same = (row["sources"], row["device"]) == (sources, device)
        key, kind = (row["stage"], row["part"]), row["outcome"].partition(":")[0].split()[0]
        if kind == "ok":
            ranks[key] = None if same or (key in ranks and ranks[key] is None) else 1
        elif kind == "failed" and same and key not in ranks:
            ranks[key] = 2
    again: list[Stage] = []
    for rank in (0, 1, 2):
        for stage in stages:
            parts = tuple(p for p in stage.parts if ranks.get((stage.name, p.name), 0) == rank)
            if stage.always:
                parts = stage.parts if rank == 0 else ()
            if parts:
                again.append(replace(stage, parts=parts))
    return again


def missing(part: Part) -> str | None:
    """The first module that the part needs and this machine lacks."""
    return next((name for name in part.needs if not exists(name)), None)


class Runner:
    """Runs parts one after another, each in a process that was made ready while the last one worked."""

    def __init__(
        self, record: Record, scratch: Path, search: Sequence[str] = (), ready: Sequence[str] = READY
    ):
        self.record, self.scratch, self.ready = record, scratch, ready
        self.search = [str(ROOT), str(ROOT / "kernels"), *search]
        self.mark = uuid4().hex
        self.count = 0
        self.next: subprocess.Popen | None = self.make_ready()

    def make_ready(self) -> subprocess.Popen:
        inherited = filter(None, [os.environ.get("PYTHONPATH")])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*self.search, *inherited]),
            "PYTHONUNBUFFERED": "1",
            # the C++ ops serve a CPU: to build them would take half a minute, and checks use the references
            "FASTMIM_NATIVE": os.environ.get("FASTMIM_NATIVE", "0"),
            MARK: self.mark,
        }
        self.count += 1
        with (self.scratch / f"ready{self.count}.txt").open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.worker", *self.ready],
                cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip

    def run(self, part: Part, limit_s: float) -> Outcome:
        """Run it to its end or to its limit; nothing it started lives on."""
        if lacking := missing(part):
            return Outcome(f"skipped: {lacking} is not installed")
        log = self.scratch / f"part{self.count}.txt"
        log.touch()
        start = time.monotonic()
        process, self.next = self.next or self.make_ready(), None
        command = list(part.command)
        if len(command) > 1 and command[1].startswith("benchmarks."):
            command += ["--results", str(self.record.results)]
        order: Order = {"command": command, "log": str(log)}
        self.record.log(f"\n=== {part.name}: python {' '.join(part.command)}\n".encode())
        try:
            give(process, order)
            self.next = self.make_ready()
            status = self.watch(process, log, start + limit_s, min(GRACE_S, limit_s / 4))
        finally:
            end(process)
            self.sweep()
        seconds = time.monotonic() - start
        said = log.read_bytes().decode(errors="replace").strip().splitlines()
        if not said:  # it fell before its turn came
            said = log.with_name(log.name.replace("part", "ready")).read_text(errors="replace").splitlines()
        return Outcome(verdict(status, said, limit_s), seconds, said)

    def watch(self, process: subprocess.Popen, log: Path, deadline: float, grace_s: float) -> int | None:
        """Take over rows and words as they come; the exit status, or None if it had to be stopped."""
        copied, asked = 0, False
        while True:
            try:
                status = process.wait(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                status = None
            copied = self.take_over(log, copied)
            if status is not None:
                break
            if time.monotonic() > deadline:
                break
            if not asked and time.monotonic() > deadline - grace_s:
                process.send_signal(signal.SIGTERM)
                asked = True
        size = log.stat().st_size
        if size > copied:
            with log.open("rb") as file:
                file.seek(max(copied, size - TAIL_BYTES))
                self.record.log(b"\n[...]\n" + file.read())
        return None if asked and status else status

    def take_over(self, log: Path, copied: int) -> int:
        """Rows, and the begin of what is said; failures of tests are shown at once."""
        self.record.collect()
        with log.open("rb") as file:
            file.seek(copied)
            new = file.read(max(0, HEAD_BYTES - copied))
        self.record.log(new)
        for line in new.decode(errors="replace").splitlines():
            if line.startswith(("FAILED ", "LOST ")):
                print(f"    {line[:300]}", flush=True)
        return copied + len(new)

    def sweep(self) -> None:
        """End what left the process group of its part: all of this round that is not the one in waiting."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            spare = self.next.pid if self.next else None
            left = [pid for pid in marked(self.mark) if pid != spare and os.getpgid(pid) != spare]
            if not left:
                return
            for pid in left:
                kill(os.kill, pid)
            time.sleep(0.05)

    def close(self) -> None:
        if self.next:
            end(self.next)
        self.next = None
        self.sweep()


def give(process: subprocess.Popen, order: Order) -> None:
    assert process.stdin
    try:
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:  # it is gone; its status tells
        pass


def kill(by: Callable[[int, int], None], pid: int) -> None:
    with suppress(ProcessLookupError):
        by(pid, signal.SIGKILL)


def end(process: subprocess.Popen) -> None:
    """The process and its group."""
    kill(os.killpg, process.pid)
    process.wait()
    if process.stdin:
        with suppress(BrokenPipeError):
            process.stdin.close()


def marked(mark: str) -> Iterator[int]:
    """Living processes whose environment bears this mark; zombies have none."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue
            if f"{MARK}={mark}".encode() in environment.split(b"\0"):
                yield int(folder.name)


def verdict(status: int | None, said: Sequence[str], limit_s: float) -> str:
    lines = [line.strip() for line in said if line.strip() and not WARNING.search(line)]
    last = lines[-1][:200] if lines else "not a word"
    if status is None:
        return f"stopped after {limit_s:.0f} s; last: {last}"
    if status == SKIPPED:
        return last if last.startswith("skipped: ") else f"skipped: {last}"
    if status == 0:
        return f"ok: {last}" if lines else "ok"
    return f"failed with {status}: {last}"
