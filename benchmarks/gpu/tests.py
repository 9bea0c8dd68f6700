"""Tests on many processes, each with a time limit, failures told at once: -m benchmarks.gpu.tests PATH...

Every process collects all tests and takes the next few that nobody has taken (`claims.py`). One whose test
outlasts its limit, dies, or finds the CUDA context broken is replaced; its test is named as lost, and the
others that it had taken are given to the next. Needs pytest alone. Files that passed with these sources, on
this device and in these results, are not run again. A row for every file goes to tests.jsonl as it is done.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.claims import FOLDER, LIMIT, OWN, PASSED, State
from benchmarks.gpu.worker import ROOT
from benchmarks.provenance import RESULTS, append, environment

PYTEST = (
    "-m", "pytest", "-q", "-p", "benchmarks.gpu.claims", "-p", "no:cacheprovider", "-p", "no:xdist",
    "--continue-on-collection-errors",
)  # fmt: skip
CAN_DIE = 40  # processes, before the rest is given up


class Crew:
    """The processes, what they have said so far, and what came of it."""

    def __init__(self, paths: Sequence[str], workers: int, each_s: float, folder: Path):
        self.paths, self.each_s, self.folder = paths, each_s, folder
        self.state = State(folder)
        self.names: list[str] | None = None  # of all tests, once one has collected them
        self.broken: list[str] = []  # files that cannot be collected, and why
        self.taken: dict[int, list[int]] = defaultdict(list)  # by process, not yet done
        self.running: dict[int, tuple[int, float]] = {}  # by process: which test, since when
        self.done: dict[int, dict[str, Any]] = {}
        self.processes: dict[int, subprocess.Popen] = {}
        self.read, self.died = 0, 0
        self.nothing: str | None = None  # why nothing could be collected
        for _ in range(workers):
            self.start([])

    def start(self, own: Sequence[int]) -> None:
        number = len(self.processes)
        told = os.environ | {
            FOLDER: str(self.folder),
            LIMIT: str(self.each_s),
            OWN: json.dumps([number, *own]),
        }
        self.taken[number] = list(own)
        with (self.folder / f"said{number}.txt").open("wb") as said:
            self.processes[number] = subprocess.Popen(
                [sys.executable, *PYTEST, *self.paths], cwd=ROOT, env=told, stdout=said, stderr=said
            )

    def alive(self) -> list[int]:
        return [number for number, process in self.processes.items() if process.poll() is None]

    def listen(self) -> list[int]:
        """Take in what was said since; the tests that were done."""
        new = []
        lines, self.read = self.state.events(self.read)
        for event in lines:
            number = event["process"]
            if "names" in event:
                self.names, self.broken = event["names"], event["broken"]
                print("".join(f"FAILED {line}\n" for line in self.broken), end="", flush=True)
            elif "took" in event:
                self.taken[number] += event["took"]
            elif "begins" in event:
                self.running[number] = (event["begins"], time.monotonic())
            elif "ended" in event:
                self.finish(number, event["ended"], event)
                new.append(event["ended"])
        return new

    def finish(self, number: int, test: int, event: dict[str, Any]) -> None:
        self.done[test] = event
        self.running.pop(number, None)
        if test in self.taken[number]:
            self.taken[number].remove(test)

    def tend(self) -> list[int]:
        """End what hangs, replace what died; the tests that were lost with it."""
        lost = []
        for number, process in list(self.processes.items()):
            since = self.running.get(number, (0, time.monotonic()))[1]
            if process.poll() is None and time.monotonic() - since > self.each_s + 5:
                process.kill()  # in a wait that no handler interrupts
                process.wait()
            status = process.poll()
            if status is None or number not in self.taken:
                continue
            if number in self.running:
                test, began = self.running[number]
                longer = time.monotonic() - began > self.each_s - 1
                why = f"longer than {self.each_s:g} s" if longer else f"its process ended with {status}"
                self.finish(
                    number, test, {"outcome": "lost", "why": why, "seconds": time.monotonic() - began}
                )
                lost.append(test)
                died = True
            else:
                died = status not in (0, 1, 5)
            left = self.taken.pop(number)
            if self.names is None:
                self.nothing = self.last_words(number)
            elif (left or died) and len(self.done) < len(self.names) and self.died < CAN_DIE:
                self.died += 1
                self.start(left)
        return lost

    def last_words(self, number: int) -> str:
        said = (self.folder / f"said{number}.txt").read_text(errors="replace").strip().splitlines()
        errors = [line for line in said if line.startswith(("E  ", "ERROR"))]
        return (errors or said or ["not a word"])[-1].strip()


def told(name: str, event: dict[str, Any]) -> str | None:
    """The line that a failure is worth."""
    if event["outcome"] in ("passed", "skipped"):
        return None
    return f"{'LOST' if event['outcome'] == 'lost' else 'FAILED'} {name}: {event['why']}"


def summary(crew: Crew) -> str:
    counts = Counter(event["outcome"] for event in crew.done.values())
    missing = len(crew.names or []) - len(crew.done)
    counts["failed"] += len(crew.broken)
    words = [f"{counts[kind]} {kind}" for kind in ("failed", "lost", "passed", "skipped") if counts[kind]]
    words += [f"{missing} not run"] if missing else []
    return ", ".join(words) or "no test was collected"


def files_done(crew: Crew, written: set[str], results: Path, about: dict[str, Any]) -> None:
    """A row for each file whose tests have all ended."""
    of_file: dict[str, list[int]] = defaultdict(list)
    for test, name in enumerate(crew.names or []):
        of_file[name.partition("::")[0]].append(test)
    for file, tests in of_file.items():
        if file in written or not all(test in crew.done for test in tests):
            continue
        written.add(file)
        names = crew.names or []
        events = [(names[test], crew.done[test]) for test in tests]
        bad = [line for name, event in events if (line := told(name, event))]
        counts = Counter(event["outcome"] for _, event in events)
        verdict = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
        row = {"provider": file, "verdict": verdict, "bad": bad, "passed": not bad}
        append(results / "tests.jsonl", row | {"seconds": sum(e["seconds"] for _, e in events)} | about)


def passed_before(results: Path, about: dict[str, Any]) -> set[str]:
    path, same = results / "tests.jsonl", ("sources", "device")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {r["provider"] for r in rows if r["passed"] and all(r[key] == about[key] for key in same)}


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="+", help="files or folders of tests")
    p.add_argument("--workers", type=int, default=min(12, len(os.sched_getaffinity(0))))
    p.add_argument("--each-s", type=float, default=60.0, help="seconds that one test may take")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    a = p.parse_args(arguments)
    about = environment()
    before = passed_before(a.results, about)
    os.environ[PASSED] = json.dumps(sorted(before))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the round's: say how far it came
    written: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        crew = Crew(a.paths, a.workers, a.each_s, Path(folder))
        try:
            while True:
                alive = crew.alive()
                for test in [*crew.listen(), *crew.tend()]:
                    if line := told((crew.names or [])[test], crew.done[test]):
                        print(line, flush=True)
                files_done(crew, written, a.results, about)
                if not alive and not crew.alive():
                    break
                time.sleep(0.1)
        finally:
            for number in crew.alive():
                crew.processes[number].kill()
            skipped = f"; {len(before)} files passed in an earlier round" if before else ""
            print((crew.nothing or summary(crew)) + skipped, flush=True)
    events = crew.done.values()
    good = all(event["outcome"] in ("passed", "skipped") for event in events) and not crew.broken
    return 0 if good and crew.names is not None and len(events) == len(crew.names) else 1


if __name__ == "__main__":
    sys.exit(main())
