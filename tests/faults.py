"""Faults put into real runs, many times each, and what became of them: one table.

    python -m tests.faults [FAULT ...] [--tries N] [--results FILE]

    kill     kill -9 of every process of a run on two ranks at a random moment; the same command with
             --resume then makes the rows that are missing, and none is lost or made twice
    signals  SIGTERM, SIGUSR1, SIGHUP, SIGINT to the runner, launch.py and a rank: saved, and nobody left
    launcher SIGKILL of the runner, of launch.py or of a rank: nobody left within a minute, status not 0
    numbers  a gradient that is not finite, at a random step of every ZeRO stage and precision: nothing moves
    files    a file of a run mutated: it resumes, or ends in one line
    images   mutated images of 21 kinds through both decoders, as `make fuzz-files`

A row is added to the file as each fault has been tried; `lost` counts rows of metrics, saves or processes.
Exit status 1 if anything was lost.
"""

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from benchmarks.provenance import RESULTS, environment
from tests.engine.conftest import write_images
from tests.engine.launched import Launched, command_of, rows_are_whole, signalled

ROOT = Path(__file__).resolve().parents[1]
ASKED = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
TARGETS = ("runner", "launch", "rank0", "rank1")


@dataclass
class Tried:
    """Of one fault: how often, how often nothing was lost, the longest time, and what went wrong."""

    tries: int = 0
    survived: int = 0
    seconds: float = 0.0
    lost: int = 0
    what: str = ""

    def add(self, problem: str, seconds: float = 0.0, lost: int = 1) -> None:
        self.tries += 1
        self.seconds = max(self.seconds, seconds)
        self.survived += not problem
        if problem:
            self.lost += lost
            self.what = problem


def kill(images: Path, folder: Path, tries: int, rng: random.Random) -> Tried:
    """All of one run, killed and resumed again and again."""
    found, run_dir = Tried(), folder / "run"
    flags = ("--save-every", "3", "--timeout", "30")
    for attempt in range(tries + 1):
        resume = ("--resume",) if any((run_dir / "checkpoints").glob("step-*")) else ()
        run = Launched.start(run_dir, command_of(run_dir, images, *flags, *resume, ranks=2))
        before, start = run.saved(), time.monotonic()
        try:
            run.wait_for_steps(1)
            if attempt:  # what the last one left was taken up
                problem = "" if rows_are_whole(run_dir) else "rows were lost or made twice"
                found.add(problem, time.monotonic() - start)
            while run.saved() <= before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.0))
        except AssertionError as error:
            found.add(str(error)[-300:])
        finally:
            os.killpg(run.child.pid, signal.SIGKILL)
            run.kill()
    return found


def signals(images: Path, folder: Path, tries: int, rng: random.Random) -> Tried:
    """Each to each process in turn."""
    pairs = [(name, target) for name in ASKED for target in TARGETS]
    return signal_all(images, folder, [pairs[i % len(pairs)] for i in range(tries)], 25.0)


def launcher(images: Path, folder: Path, tries: int, rng: random.Random) -> Tried:
    """kill -9 of each in turn."""
    targets = [TARGETS[i % len(TARGETS)] for i in range(tries)]
    return signal_all(images, folder, [("SIGKILL", target) for target in targets], 60.0)


def signal_all(images: Path, folder: Path, cases: list[tuple[str, str]], within: float) -> Tried:
    found = Tried()
    for i, (name, target) in enumerate(cases):
        out = signalled(images, folder / str(i), getattr(signal, name), target, within=90)
        problems = []
        if out.orphans or out.seconds > within:
            problems.append(f"{out.orphans} left after {out.seconds:.0f} s")
        if out.status == 0:
            problems.append("status 0")
        if not (name == "SIGKILL" and target.startswith("rank")) and out.saved < out.steps_before:
            problems.append(f"saved step {out.saved} of {out.steps_before}")
        found.add(f"{name} to {target}: {', '.join(problems)}" if problems else "", out.seconds)
    return found


def numbers(images: Path, folder: Path, tries: int, rng: random.Random) -> Tried:
    from tests.engine.finite_scenarios import STAGES, STEPS, Ending, ending

    found = Tried()
    for i in range(tries):
        case = STAGES[i % len(STAGES)]._replace(step=rng.randint(2, STEPS))
        case = case._replace(value=rng.choice([float("nan"), float("inf"), -float("inf")]))
        with quiet():
            got = ending(images, folder / str(i), case, rank=0)
        wanted = Ending([case.step], [case.step], True, [case.step], None)
        found.add("" if got == wanted else f"{case}: {got}")
    return found


def files(images: Path, folder: Path, tries: int, rng: random.Random) -> Tried:
    from tests.engine.mutations import outcomes

    class Captured:
        """What pytest's capsys is to the tests."""

        def readouterr(self):
            text = said.getvalue()
            said.seek(0)
            said.truncate()
            return type("Said", (), {"out": text, "err": text})

    found, start = Tried(), time.monotonic()
    with quiet() as said:
        counted = outcomes(images, folder, tries, Captured(), first=10**6)
    for outcome, count in counted.items():
        for _ in range(count):
            found.add("" if outcome in ("resumed", "refused") else outcome)
    found.seconds = (time.monotonic() - start) / tries
    return found


def images(_: Path, folder: Path, tries: int, rng: random.Random) -> Tried:
    command = [sys.executable, "-m", "tests.data.fuzz_files", "--count", str(tries), "--seed", "7"]
    start = time.monotonic()
    done = subprocess.run([*command, "--kept", str(folder)], cwd=ROOT, capture_output=True, text=True)
    seconds = (time.monotonic() - start) / tries
    lost = len(list(folder.glob("*"))) if done.returncode else 0
    what = done.stdout.strip().splitlines()[-1] if done.returncode else ""
    return Tried(tries, tries - lost, seconds, lost, what)


class quiet:
    """Takes what is printed meanwhile."""

    def __enter__(self):
        self.said = io.StringIO()
        self.both = redirect_stdout(self.said), redirect_stderr(self.said)
        for one in self.both:
            one.__enter__()
        return self.said

    def __exit__(self, *error):
        for one in self.both:
            one.__exit__(*error)


FAULTS: dict[str, tuple[Callable[[Path, Path, int, random.Random], Tried], int]] = {
    "kill": (kill, 200),
    "signals": (signals, 320),  # 20 of each
    "launcher": (launcher, 80),
    "numbers": (numbers, 200),
    "files": (files, 300),
    "images": (images, 1000),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], help="by default all")
    parser.add_argument("--tries", type=int, help="of each fault; by default as many as are promised")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "faults.jsonl")
    args = parser.parse_args()
    print(f"{'fault':<9} {'tries':>6} {'survived':>9} {'longest s':>10} {'lost':>5}", flush=True)
    lost = 0
    for name in args.faults or FAULTS:
        work, promised = FAULTS[name]
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            pictures = write_images(Path(folder) / "images")
            (Path(folder) / name).mkdir()
            tried = work(pictures, Path(folder) / name, args.tries or promised, random.Random(args.seed))
        row = {"fault": name, **vars(tried)}
        figures = f"{tried.tries:>6} {tried.survived:>9} {tried.seconds:>10.1f} {tried.lost:>5}"
        print(f"{name:<9} {figures}  {tried.what}", flush=True)
        with args.results.open("a") as file:
            file.write(json.dumps(row | environment()) + "\n")
        lost += tried.lost
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
