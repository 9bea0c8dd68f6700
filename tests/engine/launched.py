"""Real runs under `deepspeed` on two ranks, and in one process: signals to each process, and what is left.

runner  ->  launch.py  ->  rank 0, rank 1
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.engine.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))


def command_of(run_dir: Path, images: Path, *flags: str, ranks: int = 1) -> list[str]:
    """The command line of a run that does not end by itself."""
    start = [sys.executable]
    if ranks > 1:
        port = 29500 + hash((os.getpid(), str(run_dir))) % 3000
        start = [LAUNCHER, "--num_gpus", str(ranks), "--master_port", str(port)]
    given = ["--data.path", str(images), "--run-dir", str(run_dir), "--steps", "100000"]
    return [*start, "fastmim/train.py", *TINY, *given, "--save-every", "5000", *flags]


@dataclass
class Launched:
    """A run in a session of its own, and its processes by their roles."""

    run_dir: Path
    child: subprocess.Popen
    said: Path
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, run_dir: Path, command: Sequence[str], **options) -> "Launched":
        run_dir.mkdir(parents=True, exist_ok=True)
        said = run_dir.with_name(f"{run_dir.name}.said")
        with said.open("w") as file:
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=heed_signals, **options,
            )  # fmt: skip
        return cls(run_dir, child, said)

    def wait_for_steps(self, more: int = 3, seconds: float = 240) -> int:
        """Return the steps done once there are `more` than now."""
        first, deadline = self.steps(), time.monotonic() + seconds
        while (now := self.steps()) < first + more:
            assert self.child.poll() is None, self.text()[-3000:]
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.05)
        return now

    def steps(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def text(self) -> str:
        return self.said.read_text(errors="replace")

    def roles(self) -> dict[str, int]:
        """Process ids: runner and launch where DeepSpeed started it, and every rank."""
        found = {}
        for pid in self.left():
            command = words_of(pid)
            if "deepspeed.launcher.launch" in command:
                found["launch"] = pid
            elif "fastmim/train.py" in command and LAUNCHER not in command:
                local = [word for word in command if word.startswith("--local_rank=")]
                found[f"rank{local[0].partition('=')[2] if local else 0}"] = pid
            elif LAUNCHER in command:
                found["runner"] = pid
        return found

    def left(self) -> list[int]:
        """Processes whose command line names the run and that are no zombies."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            if pid != os.getpid() and str(self.run_dir) in words_of(pid) and state_of(pid) not in "ZX":
                found.append(pid)
        return found

    def end(self, seconds: float) -> tuple[int, float]:
        """Exit status of the command, and the seconds until nothing was left of it (at most `seconds`)."""
        start = time.monotonic()
        while (self.child.poll() is None or self.left()) and time.monotonic() < start + seconds:
            time.sleep(0.05)
        return self.child.returncode, time.monotonic() - start

    def kill(self) -> None:
        for pid in self.left():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()

    def saved(self) -> int:
        """The newest step that has a checkpoint; 0 without one."""
        return max((int(p.name[5:13]) for p in (self.run_dir / "checkpoints").glob("step-*")), default=0)


def heed_signals() -> None:
    """As a terminal starts a command: tests in the background, or under nohup, ignore some of them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def words_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


@dataclass(frozen=True)
class Outcome:
    """What a signal left."""

    status: int
    seconds: float
    orphans: int
    steps_before: int
    saved: int
    text: str


def signalled(
    images: Path, run_dir: Path, number: int, target: str, *, ranks: int = 2, within: float = 60, **options
) -> Outcome:
    """A run whose `target` (runner, launch, rank0, rank1, group) gets a signal after a few steps."""
    run = Launched.start(run_dir, command_of(run_dir, images, ranks=ranks), **options)
    try:
        steps = run.wait_for_steps()
        if target == "group":
            os.killpg(run.child.pid, number)
        else:
            os.kill(run.roles()[target], number)
        status, seconds = run.end(within)
        return Outcome(status, seconds, len(run.left()), steps, run.saved(), run.text())
    finally:
        run.kill()


def rows_are_whole(run_dir: Path) -> bool:
    """Whether metrics.jsonl has each step once, in order."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows] == list(range(1, len(rows) + 1))
