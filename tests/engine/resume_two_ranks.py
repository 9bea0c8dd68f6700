"""What test_resume starts on two ranks: every ZeRO stage unstopped and resumed, a failed save.

python tests/engine/resume_two_ranks.py IMAGES FOLDER
"""

import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastmim.engine.checkpoint import CheckpointError
from fastmim.engine.pretrain import prepare, train
from fastmim.engine.ranks import Ranks
from tests.engine.conftest import tiny_run
from tests.engine.forked import on_ranks
from tests.engine.test_resume import STAGES, train_and_resume


def rank_1_cannot_write(images: Path, folder: Path) -> None:
    """Both ranks end with its reason, and soon: none is left waiting in DeepSpeed's barriers."""
    p = prepare(tiny_run(images, folder, steps=2, save_every=2))
    start, save = time.monotonic(), torch.save

    def refuse(*args, **options):
        raise OSError("rank 1 has no disk")

    torch.save = refuse if p.ranks.rank == 1 else save
    with pytest.raises(CheckpointError, match="on rank 1 of 2: OSError: rank 1 has no disk"):
        train(p)
    torch.save = save
    assert time.monotonic() - start < 30
    assert not list(folder.glob("checkpoints/step-*"))


def everything(images: Path, folder: Path, _: Ranks) -> None:
    for zero in STAGES:
        train_and_resume(images, folder / f"zero{zero}", zero=zero, total=25, stop=5)
    rank_1_cannot_write(images, folder / "refused")


if __name__ == "__main__":
    answers = on_ranks(2, partial(everything, *(Path(a) for a in sys.argv[-2:])))
    assert answers == [None, None], answers
