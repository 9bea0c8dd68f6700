"""Plant the listed faults one at a time and see a test turn red for each: `make mutants`.

python tests/mutants/run.py                  every group
python tests/mutants/run.py ema losses       these groups
python tests/mutants/run.py --list           what would be planted; runs nothing

A group is a file beside this one, with TESTS, the files that are run against it, and FAULTS, tuples of file,
old text, new text, what the fault is and, if it is known, a pytest -k expression that is enough. Its tests
are first run as they are: nothing is planted into a tree that is red. Each fault gets a copy of the working
tree, committed or not, so the tree itself is never touched. A run that hangs counts as caught, and is said.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CAUGHT, SURVIVED, NOT_APPLIED = "caught", "SURVIVED", "does not apply"
GRACE_S = 60  # beyond three times what all tests of the group take: then it hangs


@dataclass(frozen=True)
class Fault:
    path: str
    old: str
    new: str
    what: str
    only: str = ""

    def planted(self, text: str) -> str | None:
        """The text with the fault in it; None unless the old one is there exactly once."""
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


@dataclass(frozen=True)
class Group:
    name: str
    tests: tuple[str, ...]
    faults: tuple[Fault, ...]


def groups() -> dict[str, Group]:
    """Every group of this folder, by name."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        if path != Path(__file__).resolve():
            names = run_path(str(path))
            faults = tuple(Fault(*fields) for fields in names["FAULTS"])
            found[path.stem] = Group(path.stem, tuple(names["TESTS"]), faults)
    return found


class Runner:
    """Copies, plants and runs below one folder; `end` leaves no process of it alive."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.lock, self.ended = threading.Lock(), False
        self.alive: set[subprocess.Popen[str]] = set()

    def copy_tree(self) -> Path:
        """What git knows or would add, as it is on disk."""
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        tree = Path(tempfile.mkdtemp(dir=self.scratch))
        for name in filter(None, names.split("\0")):
            if (ROOT / name).exists():  # not deleted and still in the index
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
        return tree

    def run(self, tree: Path, arguments: Sequence[str], limit_s: float | None) -> tuple[int | None, str]:
        """Exit status, None after `limit_s`, and what was said, of Python on the code of `tree`."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # a graph of the code before would hide the fault
        }
        with self.lock:
            if self.ended:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=tree, env=environment, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            self.alive.add(process)
        try:
            said, _ = process.communicate(timeout=limit_s)
            if self.ended:  # killed, not failed
                raise KeyboardInterrupt
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            with self.lock:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                self.alive.discard(process)

    def end(self) -> None:
        with self.lock:
            self.ended = True
            for process in self.alive:
                os.killpg(process.pid, signal.SIGKILL)

    def seconds_when_green(self, group: Group) -> float:
        """How long the tests of the group take as they are. SystemExit if they are red."""
        tree = self.copy_tree()
        _, where = self.run(tree, ["-c", "import fastmim_kernels; print(fastmim_kernels.__file__)"], None)
        if not where.startswith(str(tree)):
            sys.exit(f"want the copy of fastmim_kernels in {tree}, got {where.strip()}")
        start = time.monotonic()
        status, said = self.run(tree, pytest_of(group, ""), None)
        shutil.rmtree(tree)
        if status != 0:
            sys.exit(
                f"{said[-3000:]}\n{group.name}: red without any fault (status {status}); nothing planted"
            )
        return time.monotonic() - start

    def plant(self, group: Group, fault: Fault, limit_s: float) -> tuple[str, str]:
        """What became of the fault, and by which test or why."""
        tree = self.copy_tree()
        try:
            path = tree / fault.path
            text = fault.planted(path.read_text()) if path.is_file() else None
            if text is None:
                return NOT_APPLIED, f"want the old text exactly once in {fault.path}"
            path.write_text(text)
            return verdict(*self.run(tree, pytest_of(group, fault.only), limit_s), limit_s)
        finally:
            shutil.rmtree(tree)


def pytest_of(group: Group, only: str) -> list[str]:
    flags = ["-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *group.tests]
    return [*flags, "-m", "", "-k", only] if only else flags  # long ones too, where they are named


def verdict(status: int | None, said: str, limit_s: float) -> tuple[str, str]:
    """Of a run of pytest: 0 is all green, 1 and 2 are red; 4 and 5 mean that nothing was tested."""
    if status is None:
        return CAUGHT, f"it hung: ended after {limit_s:.0f} s"
    if status < 0:
        return CAUGHT, f"the process died of signal {-status}"
    if status not in (1, 2):
        return SURVIVED, "every test passed" if status == 0 else f"no test was run (status {status})"
    red = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return CAUGHT, red[0].split(" - ")[0] if red else said.strip().splitlines()[-1]


def run_group(group: Group, runner: Runner, jobs: int) -> list[tuple[Fault, str, str]]:
    """Every fault of the group with what became of it, said as it comes."""
    green_s = runner.seconds_when_green(group)
    print(f"{group.name}: green in {green_s:.0f} s; {len(group.faults)} faults", flush=True)

    def one(fault: Fault) -> tuple[Fault, str, str]:
        start = time.monotonic()
        outcome, why = runner.plant(group, fault, 3 * green_s + GRACE_S)
        print(f"  {outcome:<14} {time.monotonic() - start:5.0f} s  {fault.what}  ({why})", flush=True)
        return fault, outcome, why

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, fault) for fault in group.faults]
        try:
            return [future.result() for future in futures]
        except BaseException:
            runner.end()
            pool.shutdown(cancel_futures=True)
            raise


def table(results: dict[str, list[tuple[Fault, str, str]]]) -> str:
    lines = [f"{'group':<12} {'faults':>7} {CAUGHT:>7} {SURVIVED:>9} {NOT_APPLIED:>15}"]
    for name, rows in results.items():
        count = Counter(outcome for _, outcome, _ in rows)
        lines.append(
            f"{name:<12} {len(rows):>7} {count[CAUGHT]:>7} {count[SURVIVED]:>9} {count[NOT_APPLIED]:>15}"
        )
    for name, rows in results.items():
        lines += [f"{name}: {o}: {f.path}: {f.what} ({why})" for f, o, why in rows if o != CAUGHT]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = groups()
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(known)}; all if none is named")
    parser.add_argument("--list", action="store_true", help="say what would be planted, and stop")
    parser.add_argument("--jobs", type=int, default=1, help="faults at one time")
    a = parser.parse_args(arguments)
    if unknown := set(a.groups) - set(known):
        parser.error(f"want groups of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if a.jobs < 1:
        parser.error(f"want --jobs of at least 1, got {a.jobs}")
    chosen = [known[name] for name in a.groups or known]
    if a.list:
        for group in chosen:
            print(group.name, *(f"  {fault.path}: {fault.what}" for fault in group.faults), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an interrupt: clean up
    results = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        runner = Runner(Path(scratch))
        try:
            for group in chosen:
                results[group.name] = run_group(group, runner, a.jobs)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        finally:
            runner.end()
    print(table(results))
    return int(any(outcome != CAUGHT for rows in results.values() for _, outcome, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
