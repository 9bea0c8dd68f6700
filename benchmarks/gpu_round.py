"""All that one GPU is asked for, in one call: tests, kernels, whole steps, rivals, JPEG to loss. Ten minutes.

python benchmarks/gpu_round.py                       on a machine with a GPU
python benchmarks/gpu_round.py --wheels FOLDER       packages it lacks, as wheels (carry.sh)
python benchmarks/gpu_round.py --quick               5 minutes: each question once, in its largest case
python benchmarks/gpu_round.py --rehearse            tiny shapes, on any machine: does every stage run?
python benchmarks/gpu_round.py --done rows.jsonl     goes on where the round that left these rows stopped
python benchmarks/gpu_round.py --keep rows.jsonl     appends the rows that a round brought home to results/

Each stage has a share of the time and each of its parts a process and a limit (`gpu/shares.py`); what is left
over flows on. A part that fails, is cut short or cannot be run stops no other and is named with its reason.
Rows are on disk as they come; where OUT names a folder, rows.jsonl, table.txt and log.txt are kept up to date
there, whatever ends the round. Needs PyTorch and nothing else: no network, and no package beside it.
"""

import os
import sys
from pathlib import Path

# Run as a script, this folder is sys.path[0], where a module of ours could hide another package.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "kernels"))

import argparse
import signal
import tempfile
import time
from collections.abc import Sequence

from benchmarks.gpu import wheels
from benchmarks.gpu.parts import Outcome, Runner, Stage, remaining
from benchmarks.gpu.record import ROUND, Record, earlier, exists, keep, table
from benchmarks.gpu.shares import Want, divide
from benchmarks.gpu.stages import full, quick, rehearsal
from benchmarks.provenance import DEVICE, RESULTS, append, environment

KINDS = {"round": (full, 570.0), "quick": (quick, 290.0), "rehearse": (rehearsal, 400.0)}
CLOSE_S = 5.0  # for ending the last part and the table
SECONDS = (20.0, 3600.0)  # that can be asked for


def process_began() -> float:
    """When, as time.monotonic() counts: importing torch is of the round's time."""
    ticks = int(
        Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    )  # since the machine booted
    return time.monotonic() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


class Round:
    """Stages, one after another, until they or the time are at their end."""

    def __init__(self, runner: Runner, record: Record, deadline: float):
        self.runner, self.record, self.deadline = runner, record, deadline
        self.began = process_began()
        self.about = environment()
        self.troubles: list[str] = []

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, stages: Sequence[Stage]) -> None:
        for i, stage in enumerate(stages):
            seconds = divide(self.left(), [later.want() for later in stages[i:]])[0]
            self.run_stage(stage, seconds or self.left())  # what not all of its parts fit in, some do

    def run_stage(self, stage: Stage, seconds: float) -> None:
        end = time.monotonic() + seconds
        for i, part in enumerate(stage.parts):
            left = max(0.0, end - time.monotonic())
            limit_s = divide(left, [Want(later.share, stage.least_s) for later in stage.parts[i:]])[0]
            if limit_s:
                outcome = self.runner.run(part, limit_s)
            else:
                outcome = Outcome(f"skipped: {left:.0f} s are left of the {stage.least_s:g} it wants")
            self.tell(stage.name, part.name, outcome, limit_s)

    def tell(self, stage: str, part: str, outcome: Outcome, limit_s: float) -> None:
        what = {"outcome": outcome.what, "seconds": outcome.seconds, "limit_s": limit_s}
        when = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        append(self.record.results / ROUND, {"stage": stage, "part": part, **what, **self.about, **when})
        if outcome.kind != "ok":
            self.troubles.append(f"{stage}, {part}: {outcome.what}")
        self.record.collect()
        self.record.table(table(self.record.rows, self.troubles))
        line = f"[{time.monotonic() - self.began:5.0f} s] {stage}, {part}: {outcome.what}"
        print(f"{line} ({outcome.seconds:.1f} of {limit_s:.0f} s)", flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="five minutes")
    p.add_argument("--rehearse", action="store_true", help="tiny shapes, on any machine")
    p.add_argument("--seconds", type=float, help="for all of it, from the start of the command")
    p.add_argument("--stages", nargs="+", metavar="NAME", help="these alone")
    p.add_argument(
        "--wheels", type=Path, nargs="+", metavar="FOLDER", help="packages to install for the round"
    )
    p.add_argument("--done", type=Path, nargs="+", default=[], metavar="ROWS", help="rows of earlier rounds")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    p.add_argument("--keep", type=Path, metavar="ROWS", help="append these to the results, and stop")
    return p


def chosen(stages: list[Stage], names: Sequence[str] | None) -> list[Stage]:
    """Those of these names, in order. ValueError names one that there is not."""
    known = [stage.name for stage in stages]
    for name in names or []:
        if name not in known:
            raise ValueError(f"stages: want some of {', '.join(known)}, got {name}")
    return [stage for stage in stages if names is None or stage.name in names]


def carried(folders: Sequence[Path] | None, site: Path) -> list[str]:
    """Install what came along; what is to be put on the path of every part."""
    if not folders:
        return []
    begin = time.monotonic()
    names = wheels.install(folders, site)
    print(f"installed in {time.monotonic() - begin:.1f} s: {', '.join(names) or 'nothing: all is here'}")
    sys.path.append(str(site))  # where `needs` are looked for
    return [str(site)]


def play(arguments: argparse.Namespace, kind: str, scratch: Path) -> None:
    a, (list_of, seconds) = arguments, KINDS[kind]
    stages = chosen(list_of(scratch), a.stages)
    results = a.results.absolute()
    before = [path for path in (results / ROUND, *a.done) if path.exists() or path in a.done]
    search = carried(a.wheels, scratch / "site")
    record = Record(results, Path(os.environ["OUT"]).absolute() if os.environ.get("OUT") else None)
    runner = Runner(record, scratch, search)
    try:
        r = Round(runner, record, process_began() + (a.seconds or seconds) - CLOSE_S)
        if not exists("deepspeed"):
            r.troubles.append("deepspeed is not installed: steps are those of the plain engine")
        r.run(remaining(stages, earlier(before), r.about["sources"], r.about["device"]))
    finally:
        runner.close()
        record.collect()
        text = table(record.rows, r.troubles)
        record.table(text)
        print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    a = p.parse_args(arguments)
    if a.keep:
        print(f"kept {keep(a.keep, a.results)} rows in {a.results}")
        return 0
    if not a.rehearse and DEVICE != "cuda":
        p.error("want a CUDA device, got none; --rehearse runs on a CPU")
    if a.quick and a.rehearse:
        p.error("want --quick or --rehearse, got both")
    if a.seconds is not None and not SECONDS[0] <= a.seconds <= SECONDS[1]:
        p.error(f"--seconds: want {SECONDS[0]:g} to {SECONDS[1]:g}, got {a.seconds:g}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(128 + signal.SIGTERM))
    kind = "rehearse" if a.rehearse else "quick" if a.quick else "round"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            play(a, kind, Path(scratch))
        except (ValueError, OSError) as error:  # of the arguments: a missing file, wheels that do not fit
            p.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
