"""What test_optim looks at: groups that are clipped, frozen and scheduled, in every ZeRO stage, on two ranks.

Each returns, for each `Case`, the weights at the end and the norms of the gradients that the loop reports.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from fastmim.engine import deepspeed as door
from fastmim.engine.config import Plan, Run
from fastmim.engine.loop import train_loop
from fastmim.engine.ranks import Ranks
from fastmim.engine.stop import Agreement, Stop
from fastmim.engine.teacher import Teacher
from fastmim.engine.watchdog import Watchdog
from fastmim.group import Group
from fastmim.methods.base import Method, MethodConfig, Output
from fastmim.optim import OptimConfig
from fastmim.views import Batch, Crop
from tests.engine.conftest import MODEL
from tests.engine.forked import main, on_ranks

BATCH, STEPS, PER_EPOCH, WIDTH = 8, 6, 2, 7


class Case(NamedTuple):
    zero: int
    per: str = "global"
    clip: float = 0.05
    accumulate: int = 1
    precision: str = "fp32"
    world: int = 1


ONE = [Case(zero, per) for zero in range(4) for per in ("global", "tensor")]
ONE += [Case(1, accumulate=2), Case(3, "tensor", accumulate=2), Case(1, clip=0.0)]
ONE += [Case(zero, per, precision="bf16") for zero in range(4) for per in ("global", "tensor")]
ONE += [Case(1, "tensor", accumulate=2, precision="bf16")]
TWO = [case._replace(world=2) for case in ONE]


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MethodConfig):
    name: ClassVar[str] = "toy"

    def build(self, model):
        return Toy(self)


class Toy(Method):
    """Layers of odd sizes, so that shards of two ranks end within a tensor; groups of three kinds."""

    def __init__(self, config):
        super().__init__()
        self.config, self.model, self.crops = config, MODEL, (Crop(size=(4, 4)),)
        self.encoder = nn.Linear(48, WIDTH)
        self.late, self.own = nn.Linear(WIDTH, 5), nn.Linear(5, 3)

    def forward(self, batch):
        x = batch.crops[0].flatten(1).to(self.encoder.weight.dtype) / 255
        h = torch.tanh(self.encoder(x))
        return Output((self.own(torch.tanh(self.late(h))).float() - 2).square().mean())

    def group(self, name, parameter):
        if name.startswith("late."):
            return Group(frozen_epochs=1)
        if name == "own.weight":
            return Group(clip=0.02, lr_scale=0.5, schedule="beit")
        return Group(decay=True) if name == "own.bias" else Group()


def run_of(case: Case) -> Run:
    optim = OptimConfig(
        lr=0.05, eps=1e-3, warmup_epochs=1.0, weight_decay=0.1, weight_decay_end=0.5, clip=case.clip,
        clip_per=case.per,
    )  # fmt: skip
    return Run(
        method=ToyConfig(), model=MODEL, optim=optim, batch=BATCH, steps=STEPS, precision=case.precision,
        zero=case.zero, accumulate=case.accumulate,
    )  # fmt: skip


def plan_of(case: Case) -> Plan:
    return Plan(
        device="cpu", precision=case.precision, world=case.world,
        micro_batch=BATCH // (case.world * case.accumulate), num_samples=16, steps_per_epoch=PER_EPOCH,
        left_out=0, total_steps=STEPS, warmup_steps=2.0, peak_lr=0.05, attention="sdpa", notes=(),
    )  # fmt: skip


def images(step: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (BATCH, 4, 4, 3), generator=rng, dtype=torch.uint8)


def batches(case: Case, rank: int):
    micro = BATCH // (case.world * case.accumulate)
    for step in range(STEPS):
        for i in range(case.accumulate):
            start = (i * case.world + rank) * micro
            ids = torch.arange(start, start + micro)
            yield Batch((images(step)[ids],), ids, ids, step // PER_EPOCH)


class Norms:
    """Metrics that keep the norms."""

    def __init__(self):
        self.found = []

    def add(self, step, rate, outputs, norm, skipped, left):
        self.found.append(norm.item())

    def due(self, _):
        return False

    def flush(self, **_):
        pass

    def restart_clock(self):
        pass


def train(case: Case, ranks: Ranks) -> dict:
    torch.manual_seed(0)
    run, plan, norms = run_of(case), plan_of(case), Norms()
    method = run.method.build(run.model)
    method.share(ranks)
    engine, groups = door.wrap(method, run, plan)
    teacher = Teacher(engine, ranks)
    feed = batches(case, ranks.rank)
    train_loop(
        engine, groups, teacher, feed, norms, lambda _: None, agreement=Agreement(Stop(), ranks),
        watchdog=Watchdog(Path(), ranks, 0), run=run, plan=plan, start_step=0,
    )  # fmt: skip
    return {"end": door.whole_state(engine, {}), "norms": norms.found}


def started(world: int, cases: list[Case]) -> list:
    def work(ranks: Ranks):
        os.environ["LOCAL_SIZE"] = str(world)
        door.start_process_group("cpu")
        return [train(replace_world(case, world), ranks) for case in cases]

    return on_ranks(world, work)


def replace_world(case: Case, world: int) -> Case:
    return case._replace(world=world)


def one_rank(_: Path) -> list:
    return started(1, ONE)


def two_ranks(_: Path) -> list:
    return started(2, TWO)


if __name__ == "__main__":
    main([one_rank, two_ranks])
