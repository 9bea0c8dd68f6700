"""What test_finite looks at: runs in which one value of one gradient of one rank is not finite."""

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fastmim.engine.metrics import NonFinite
from fastmim.engine.pretrain import prepare, train
from fastmim.engine.ranks import Ranks
from tests.engine.conftest import tiny_run, write_images
from tests.engine.forked import main, on_ranks

SAVE_EVERY, STEPS = 2, 6


class Case(NamedTuple):
    zero: int
    precision: str = "bf16"
    step: int = 5  # of the bad gradient: between two saves, of which the second is the last step
    accumulate: int = 1
    clip: float = 0.0
    value: float = float("nan")


STAGES = [Case(zero, precision) for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


class Ending(NamedTuple):
    """What became of a run."""

    message: str | None  # of NonFinite
    checkpoints: list[str]
    exported: bool


def ending(images: Path, folder: Path, case: Case, *, rank: int) -> Ending:
    """Of a run in which `rank` gets a bad gradient; None as the rank leaves all sound."""
    folder = folder / "-".join(map(str, case))
    run = tiny_run(
        images, folder, "mae", zero=case.zero, precision=case.precision, accumulate=case.accumulate,
        steps=STEPS, save_every=SAVE_EVERY, keep=9, log_every=100,
    )  # fmt: skip
    p = prepare(replace(run, optim=replace(run.optim, clip=case.clip)))
    if p.ranks.rank == rank:
        plant(p.method.encoder.norm.bias, case)
    message = None
    try:
        train(p)
    except NonFinite as error:
        message = str(error)
    p.ranks.barrier()
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return Ending(message, saved, any(folder.glob("*.safetensors")))


def plant(parameter: torch.nn.Parameter, case: Case) -> None:
    """One value of its gradient, in the last micro-batch of the step."""
    passes = 0

    def poison(grad: torch.Tensor) -> torch.Tensor | None:
        nonlocal passes
        passes += 1
        if passes != case.step * case.accumulate:
            return None
        grad = grad.clone()
        grad[3] = case.value
        return grad

    parameter.register_hook(poison)


def all_endings(images: Path, folder: Path, _: Ranks) -> list[tuple]:
    signal.alarm(240)
    return [tuple(ending(images, folder, case, rank=1)) for case in STAGES]


def two_ranks(folder: Path) -> list:
    return on_ranks(2, partial(all_endings, write_images(folder / "images"), folder))


if __name__ == "__main__":
    os.environ |= {"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}  # threads of ranks that share cores spin
    main([two_ranks])
