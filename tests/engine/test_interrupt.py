"""Ctrl-C: within seconds a save and one line, status 130, nobody left behind; and a run that can go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--method mae --data.decoder pillow --data.threads 1 --recipe sample --model.width 16 --model.depth 1 "
    "--model.heads 2 --model.image-size 16 --model.patch 4 --method.decoder.width 16 "
    "--method.decoder.depth 1 --method.decoder.heads 2 --batch 8 --steps 100000 --log-every 1"
)
FLAGS = TINY.split()


def interrupt(command: list[str], run_dir: Path, *, steps: int) -> tuple[int, str, float]:
    """Exit status, stderr and seconds of a run that gets SIGINT, with all of its group, after `steps`."""
    child = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    rows, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    try:
        while not (rows.exists() and rows.read_text().count("\n") >= steps):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.02)
        start = time.monotonic()
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does it
        _, said = child.communicate(timeout=600)
    finally:
        if child.poll() is None:  # it has a hundred thousand steps to go
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return child.returncode, said, time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("save_every", ["3", "5000"])
def test_a_run_in_mid_step(images, tmp_path, save_every):
    shared = set(Path("/dev/shm").iterdir())
    flags = [*FLAGS, "--data.path", str(images), "--run-dir", str(tmp_path), "--save-every", save_every]
    status, said, seconds = interrupt([sys.executable, "fastmim/train.py", *flags], tmp_path, steps=8)
    assert status == 130, said[-3000:]
    assert seconds < 10
    last = said.strip().splitlines()[-1]
    step = max(int(path.name[5:13]) for path in (tmp_path / "checkpoints").glob("step-*"))
    assert last == f"fastmim: stopped after step {step}: SIGINT; --run-dir {tmp_path} --resume continues"
    assert "Traceback" not in said and said.count("stopped") == 1
    assert set(Path("/dev/shm").iterdir()) <= shared


@pytest.mark.slow
def test_two_ranks_under_the_launcher(images, tmp_path):
    port = str(29600 + os.getpid() % 1000)
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    flags = [*FLAGS, "--data.path", str(images), "--run-dir", str(tmp_path), "--save-every", "5000"]
    command = [launcher, "--num_gpus", "2", "--master_port", port, "fastmim/train.py", *flags]
    status, said, seconds = interrupt(command, tmp_path, steps=3)
    assert status != 0 and seconds < 20, (status, seconds)
    assert "fastmim/engine" not in said  # the launcher has a traceback of its own; the ranks have none
    assert not ranks_of(tmp_path)


def ranks_of(run_dir: Path) -> list[str]:
    """Processes whose command line names the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run_dir).encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(path.parent.name)
        except OSError:  # it ended meanwhile
            continue
    return found
