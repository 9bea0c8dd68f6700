"""A resumed run equals one never stopped to the last bit, on 1 and 2 ranks, in every ZeRO stage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmim.engine.checkpoint import CheckpointError
from fastmim.engine.config import Run
from fastmim.engine.pretrain import prepare, train
from tests.engine.conftest import tiny_run
from tests.engine.forked import run_script

ROOT = Path(__file__).resolve().parents[2]
STAGES = (0, 1, 2, 3)


def train_and_resume(
    images: Path, folder: Path, *, zero: int, total: int, stop: int, make: Callable[..., Run] = tiny_run
) -> None:
    """Two runs of `total` steps in folder/whole and folder/resumed; the second restarts after `stop`."""
    settings = {"zero": zero, "steps": total, "save_every": stop, "keep": 100}
    p = prepare(make(images, folder / "whole", **settings))
    train(p)
    if p.ranks.is_main:  # as a kill after the checkpoint of `stop` leaves it: later rows, no later checkpoint
        shutil.copytree(folder / "whole", folder / "resumed")
        checkpoints = folder / "resumed" / "checkpoints"
        for path in checkpoints.glob("step-*"):
            if int(path.name.split("-")[1]) > stop:
                shutil.rmtree(path)
        (checkpoints / "latest").unlink()
        for weights in (folder / "resumed").glob("*.safetensors"):
            weights.unlink()
    p.ranks.barrier()
    train(prepare(make(images, folder / "resumed", resume=True, **settings)))


def assert_same(folder: Path, total: int, stop: int) -> None:
    rows = {}
    for name in ("whole", "resumed"):
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        timing = ("images_per_s", "data_wait", "seconds")
        rows[name] = [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]
    assert [row["step"] for row in rows["resumed"]] == list(range(1, total + 1))
    assert rows["resumed"][stop:] == rows["whole"][stop:]
    whole, resumed = (load_file(folder / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    losses = [row["loss"] for row in rows["whole"]]
    assert len(set(losses)) == total  # a frozen run would resume exactly too


@pytest.mark.parametrize("zero", STAGES)
def test_one_rank(images, tmp_path, zero):
    train_and_resume(images, tmp_path, zero=zero, total=25, stop=5)
    assert_same(tmp_path, 25, 5)


@pytest.mark.slow
def test_two_ranks_and_the_same_losses_on_one(images, tmp_path):
    run_script(Path(__file__).with_name("resume_two_ranks.py"), str(images), str(tmp_path))
    for zero in STAGES:
        assert_same(tmp_path / f"zero{zero}", 25, 5)
    train(prepare(tiny_run(images, tmp_path / "one", steps=25, save_every=100)))
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "zero1/whole")
    )
    assert one == pytest.approx(two, rel=1e-5)  # the same images with the same masks; sums in another order


def launch(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """The deepspeed launcher on a port of its own."""
    port = str(29600 + os.getpid() % 1000)
    command = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", port, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2000)
    assert not check or run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run


@pytest.mark.slow
def test_the_command_killed_in_mid_run_is_resumed_by_the_same_command(images, tmp_path):
    run_dir = tmp_path / "run"
    flags = (
        f"--method rmae --data.path {images} --data.decoder pillow --recipe sample --run-dir {run_dir} "
        "--model.width 16 --model.depth 1 --model.heads 2 --model.image-size 16 --model.patch 4 "
        "--method.decoder.width 16 --method.decoder.depth 1 --method.decoder.heads 2 "
        "--batch 8 --steps 4000 --save-every 5 --log-every 5"
    ).split()
    first = subprocess.Popen(
        [sys.executable, "fastmim/train.py", *flags],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not list((run_dir / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    reached = len((run_dir / "metrics.jsonl").read_text().splitlines())
    again = [
        "--run-dir",
        str(run_dir),
        "--resume",
        "--steps",
        str(reached + 20),
        "--allow-changes",
        "total_steps",
    ]
    run = subprocess.run(
        [sys.executable, "fastmim/train.py", *again], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "resumed  from step" in run.stdout
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, reached + 21))


def test_a_different_run_is_refused_with_the_difference(images, tmp_path):
    train(prepare(tiny_run(images, tmp_path, steps=2)))
    with pytest.raises(CheckpointError, match="seed: checkpoint has 0, this run has 1"):
        prepare(tiny_run(images, tmp_path, steps=2, resume=True, seed=1))
    with pytest.raises(CheckpointError, match="method.name: checkpoint has rmae, this run has mae"):
        prepare(tiny_run(images, tmp_path, "mae", steps=2, resume=True))
    with pytest.raises(ValueError, match="holds checkpoints of a run; add --resume"):
        prepare(tiny_run(images, tmp_path, steps=2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        prepare(tiny_run(images, tmp_path / "empty", steps=2, resume=True))
