"""What test_finite looks at: runs in which one value of one gradient of one rank is not finite."""

import json
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from fastmim.engine.finite import Finite
from fastmim.engine.judge import NonFinite
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
    optimizer: str = "adamw"
    last: int = 0  # of the bad steps, if there are more than one


STAGES = [Case(zero, precision) for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


class Ending(NamedTuple):
    """What became of a run."""

    skipped: list[int]  # steps that were left out, by metrics.jsonl
    untouched: list[int]  # after which weights, moments and counts were those before
    finite: bool  # all that was saved and exported
    named: list[int]  # steps of nonfinite.jsonl
    message: str | None  # of NonFinite


def ending(images: Path, folder: Path, case: Case, *, rank: int) -> Ending:
    """Of a run in which `rank` gets a bad gradient; None as the rank leaves all sound."""
    folder = folder / "-".join(map(str, case))
    run = tiny_run(
        images, folder, "mae", zero=case.zero, precision=case.precision, accumulate=case.accumulate,
        steps=STEPS, save_every=SAVE_EVERY, keep=9, log_every=100,
    )  # fmt: skip
    p = prepare(replace(run, optim=replace(run.optim, clip=case.clip, name=case.optimizer)))
    if p.ranks.rank == rank:
        plant(p.method.encoder.norm.bias, case)
    message = None
    with states() as seen:
        try:
            train(p)
        except NonFinite as error:
            message = str(error)
    p.ranks.barrier()
    rows = rows_of(folder / "metrics.jsonl")
    untouched = [k + 1 for k, pair in enumerate(pairwise(seen), 1) if same(*pair)]
    exported = [x for path in folder.glob("*.safetensors") for x in load_file(path).values()]
    finite = all(x.isfinite().all() for state in [*seen, exported] for x in state)
    named = [row["step"] for row in rows_of(folder / "nonfinite.jsonl")]
    return Ending([row["step"] for row in rows if row["skipped"]], untouched, finite, named, message)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def states():
    """Copies of what the optimizer has on this rank, weights, moments and counts, after each step."""
    seen: list[list[torch.Tensor]] = []
    look = Finite.look

    def look_and_copy(self: Finite, **how):
        values = [x for state in self.optimizer.state.values() for x in state.values()]
        values += [torch.tensor(float(group.get("step", 0))) for group in self.optimizer.param_groups]
        seen.append([x.clone() for x in [*self.trained, *values] if isinstance(x, torch.Tensor)])
        return look(self, **how)

    Finite.look = look_and_copy
    try:
        yield seen
    finally:
        Finite.look = look


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(map(torch.equal, before, after))


def plant(parameter: torch.nn.Parameter, case: Case) -> None:
    """One value of its gradient, in the last micro-batch of the step."""
    passes = 0

    def poison(grad: torch.Tensor) -> torch.Tensor | None:
        nonlocal passes
        passes += 1
        step, rest = divmod(passes, case.accumulate)
        if rest or not case.step <= step <= max(case.step, case.last):
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
