"""What a fresh machine wants before anything is timed: -m benchmarks.gpu.prepare. Prints the machine, too.

Every Triton kernel is compiled that the later stages launch, on all cores at once:
each job is a process that runs an op or a method once and leaves its kernels in Triton's cache on disk. A job
that fails is named and costs nothing else: the stage that it prepared for will meet it again.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.worker import ROOT
from benchmarks.provenance import DEVICE, RESULTS, environment
from fastmim.methods import METHODS

ASKED = (
    ("nvidia-smi",),
    ("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"),
    ("nvcc", "--version"),
    ("c++", "--version"),
    ("compute-sanitizer", "--version"),
)
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}  # twelve jobs with sixteen each are slower than one
SMALL = "--batch 16 --engine plain --warm"


def machine() -> Iterator[str]:
    """What it is and what is on it, in the words of its own programs."""
    yield f"{environment()}"
    yield f"cores {len(os.sched_getaffinity(0))}"
    for command in ASKED:
        if shutil.which(command[0]) is None:
            yield f"{command[0]}: not on the path"
            continue
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
        yield f"$ {' '.join(command)}\n{(run.stdout or run.stderr).strip()}"


def jobs(models: Sequence[str], ops: Sequence[str], flags: str) -> dict[str, tuple[str, ...]]:
    """Commands behind the interpreter, in order of the stages that they prepare."""
    found: dict[str, tuple[str, ...]] = {}
    first = {op: ("-m", "benchmarks.harness", op, "--warm") for op in ops}
    for model in models:
        for method in METHODS:
            arguments = f"--method {method} --model {model} {flags}".split()
            found[f"{method} {model}"] = ("-m", "benchmarks.throughput", *arguments)
        found |= first  # the smallest model, the ops, the others
    return found


class Pool:
    """So many of the jobs at once; what each said is in a file of its own."""

    def __init__(self, commands: dict[str, tuple[str, ...]], width: int, scratch: Path):
        self.waiting, self.width, self.scratch = list(commands.items()), width, scratch
        self.running: dict[str, tuple[subprocess.Popen, float, Path]] = {}

    def start(self) -> None:
        while self.waiting and len(self.running) < self.width:
            name, command = self.waiting.pop(0)
            path = self.scratch / f"{name}.txt"
            rows = ["--results", str(self.scratch)] if command[0] == "-m" else []
            with path.open("wb") as said:
                process = subprocess.Popen(
                    [sys.executable, *command, *rows],
                    cwd=ROOT, stdout=said, stderr=said, env=os.environ | ONE_THREAD,
                )  # fmt: skip
            self.running[name] = (process, time.monotonic(), path)

    def ended(self) -> Iterator[tuple[str, int, float, str]]:
        """Name, status, seconds and last words of those that have ended since."""
        for name, (process, began, path) in list(self.running.items()):
            if (status := process.poll()) is not None:
                del self.running[name]
                said = path.read_text(errors="replace").strip().splitlines() or [""]
                yield name, status, time.monotonic() - began, said[-1]

    def left(self) -> list[str]:
        return [*self.running, *(name for name, _ in self.waiting)]


def run(commands: dict[str, tuple[str, ...]], width: int) -> list[str]:
    """Run all; the names of those that failed. SystemExit names those that there was no time for."""
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        pool = Pool(commands, width, Path(scratch))
        try:
            while pool.left():
                pool.start()
                for name, status, seconds, last in pool.ended():
                    print(
                        f"{name}: {'ok' if status == 0 else f'{status}: {last}'}, {seconds:.1f} s", flush=True
                    )
                    failed += [name] if status else []
                time.sleep(0.05)
        finally:
            for process, *_ in pool.running.values():
                process.kill()
            if pool.left():
                print(f"not prepared: {', '.join(pool.left())}", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="*", default=["vit_base", "vit_large"])
    p.add_argument("--ops", nargs="*", default=[], help="modules of benchmarks/ops")
    p.add_argument("--flags", default=SMALL, help="of benchmarks.throughput")
    p.add_argument("--jobs", type=int, default=min(12, len(os.sched_getaffinity(0))), help="at once")
    p.add_argument("--results", type=Path, default=RESULTS, help="of this nothing is kept")
    a = p.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for words in machine():
        print(words, flush=True)
    commands = jobs(a.models, a.ops if DEVICE == "cuda" else [], a.flags)
    failed = run(commands, a.jobs)
    print(
        f"{len(commands) - len(failed)} of {len(commands)} prepared" + "".join(f", not {n}" for n in failed)
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
