"""kill -9 at random moments of a run that saves every step; it ends as if nothing had happened."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmim.engine.checkpoint import Checkpoints
from fastmim.engine.ranks import Ranks
from tests.engine.conftest import tiny_run
from tests.engine.forked import imported


def run_it(images: Path, run_dir: Path, steps: int, save_every: int) -> None:
    from fastmim.engine.pretrain import prepare, train

    torch.set_num_threads(1)
    resume = any((run_dir / "checkpoints").glob("step-*"))
    train(prepare(tiny_run(images, run_dir, steps=steps, save_every=save_every, resume=resume, zero=1)))


def newest(run_dir: Path) -> int:
    return max((int(p.name[5:13]) for p in (run_dir / "checkpoints").glob("step-*")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(6, 60), pytest.param(20, 150, marks=pytest.mark.long)])
def test_kills_during_saves(kills, steps, images, tmp_path):
    moments = random.Random(0)
    killed, during_save = tmp_path / "killed", 0
    for _ in range(kills):
        before = newest(killed)
        child = imported().Process(target=run_it, args=(images, killed, steps, 1))
        child.start()
        deadline = time.monotonic() + 60
        while newest(killed) <= before and time.monotonic() < deadline:  # it has got somewhere
            assert child.is_alive()
            time.sleep(0.002)
        while not any((killed / "checkpoints").glob(".tmp-*")) and time.monotonic() < deadline:
            time.sleep(0.0005)  # the next save has begun
        time.sleep(moments.uniform(0, 0.004))  # and is not yet done, most times
        child.kill()
        child.join()
        reached = newest(killed)
        during_save += any((killed / "checkpoints").glob(".tmp-*"))
        found = Checkpoints(killed / "checkpoints", Ranks.single()).find()  # every byte compared
        assert found is not None
        assert found.step in (reached - 1, reached)  # the pointer follows the rename
    assert newest(killed) < steps, "the run ended before the kills did"
    print(f"{during_save} of {kills} kills left a half-written save")
    assert during_save >= kills // 4  # the moments chosen do fall into saves

    run_it(images, killed, steps, 1)
    run_it(images, tmp_path / "whole", steps, steps)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (killed, tmp_path / "whole")
    ]
    assert len(losses[0]) == steps
    assert losses[0] == losses[1]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (killed, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
