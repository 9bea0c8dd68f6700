"""What test_resume starts on two ranks in one launch: every ZeRO stage unstopped and resumed, a failed save.

deepspeed --num_gpus 2 tests/engine/resume_two_ranks.py IMAGES FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import time

import pytest
import torch

from fastmim.engine.checkpoint import CheckpointError
from fastmim.engine.pretrain import prepare, train
from tests.engine.conftest import tiny_run
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


if __name__ == "__main__":
    images, folder = (Path(a) for a in sys.argv[-2:])
    for zero in STAGES:
        train_and_resume(images, folder / f"zero{zero}", zero=zero, total=25, stop=5)
    rank_1_cannot_write(images, folder / "refused")
