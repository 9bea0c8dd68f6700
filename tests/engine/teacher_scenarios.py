"""What test_teacher looks at: runs with a teacher on 1, 2 and 4 forked ranks, in every ZeRO stage.

Each returns every rank's answer for each `Case`. The images are drawn here; the loop is the engine's.
"""

import os
import signal
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmim.engine import deepspeed as door
from fastmim.engine import teacher as module
from fastmim.engine.config import Plan, Run
from fastmim.engine.loop import train_loop
from fastmim.engine.ranks import Ranks
from fastmim.engine.stop import Agreement, Stop
from fastmim.engine.watchdog import Watchdog
from fastmim.optim import OptimConfig
from fastmim.optim.groups import parameter_groups
from fastmim.views import Batch
from tests.engine.conftest import MODEL, tiny_run, write_images
from tests.engine.forked import main, on_ranks
from tests.engine.siamese import SiameseConfig
from tests.engine.test_resume import assert_same, train_and_resume

BATCH, PERSIST = 16, 100
STEPS = {"fp32": 50, "bf16": 12}


class Case(NamedTuple):
    zero: int
    precision: str = "fp32"
    accumulate: int = 1
    fused: bool = False


CASES = [
    Case(0), Case(1), Case(2, accumulate=2), Case(3),
    Case(0, "bf16"), Case(0, "bf16", fused=True), Case(1, "bf16"), Case(1, "bf16", accumulate=2),
    Case(2, "bf16"), Case(3, "bf16", accumulate=2),
]  # fmt: skip

RANKS = {  # on four what differs between two and four: shards. On one there are none
    1: [Case(0), Case(3), Case(0, "bf16", fused=True), Case(1, "bf16", accumulate=2)],
    2: CASES,
    4: [case for case in CASES if case.precision == "fp32" or case.zero in (1, 3)],
}


def run_of(case: Case) -> Run:
    """A rate that moves weights by a tenth in 50 steps; an eps so that rounding errors are no steps."""
    optim = OptimConfig(lr=1e-2, eps=1e-3, warmup_epochs=1.0)
    return Run(
        method=SiameseConfig(), model=MODEL, optim=optim, batch=BATCH, steps=STEPS[case.precision],
        precision=case.precision, zero=case.zero, accumulate=case.accumulate,
    )  # fmt: skip


def plan_of(case: Case, world: int) -> Plan:
    return Plan(
        device="cpu", precision=case.precision, world=world, micro_batch=BATCH // (world * case.accumulate),
        num_samples=80, steps_per_epoch=10, left_out=0, total_steps=STEPS[case.precision],
        warmup_steps=5.0, peak_lr=1e-2,
        attention="sdpa", notes=(),
    )  # fmt: skip


def images(step: int) -> tuple[torch.Tensor, ...]:
    """The two views of one step's whole batch, with a brightness of each image's own."""
    rng = torch.Generator().manual_seed(step)
    views = ((BATCH, side, side, 3) for side in (16, 8))
    return tuple(torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8) for shape in views)


def batches(case: Case, ranks: Ranks):
    """This rank's micro-batches, step by step."""
    micro = BATCH // (ranks.world * case.accumulate)
    for step in range(STEPS[case.precision]):
        for i in range(case.accumulate):
            start = (i * ranks.world + ranks.rank) * micro
            views = tuple(view[start : start + micro] for view in images(step))
            yield Batch(views, torch.zeros(micro, dtype=torch.int64), torch.arange(micro), 0)


class Silent:
    """Metrics of which nothing is asked."""

    def add(self, *_):
        pass

    def due(self, _):
        return False

    def flush(self, **_):
        pass

    def restart_clock(self):
        pass


class Traffic(TorchDispatchMode):
    """Bytes that the collectives inside it give to this rank, whoever calls them."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            flat = torch.utils._pytree.tree_leaves(args[0])
            self.bytes += sum(x.numel() * x.element_size() for x in flat if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


def watched(teacher, engine) -> list[dict]:
    """Make `teacher.step` note what it costs, and the masters that it should follow."""
    notes, move, ema_update = [], teacher.step, module.ema_update

    def step(progress):
        calls = []
        module.ema_update = lambda *a: (calls.append(min(map(torch.numel, a[0]))), ema_update(*a))
        addresses = [x.data_ptr() for x in (*teacher.shards, *teacher.student)]
        with Traffic() as traffic:
            move(progress)
        module.ema_update = ema_update
        notes.append(
            {
                "launches": len(calls),
                "smallest": min(calls),
                "traffic": traffic.bytes,
                "resident": sum(p.numel() for p in teacher.parameters),
                "whole": sum(door.whole_shape(p).numel() for p in teacher.parameters),
                "kept": [door.whole_shape(p).numel() for p in door.kept_whole(teacher.parameters)],
                "moved": addresses != [x.data_ptr() for x in (*teacher.shards, *teacher.student)],
                "masters": full_masters(engine) if engine.bfloat16_enabled() else {},
            }
        )

    teacher.step = step
    return notes


def full_masters(engine) -> dict[str, torch.Tensor]:
    """The optimizer's weights by DeepSpeed's own means; where it has none, by the order of its groups."""
    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    if engine.zero_optimization_stage() > 0:
        return {name: door.deepspeed.utils.safe_get_full_fp32_param(p).clone() for name, p in named.items()}
    flat = torch.cat([p.detach().reshape(-1) for g in engine.optimizer.param_groups for p in g["params"]])
    of = {p: name for name, p in named.items()}
    in_order = [p for g in parameter_groups(named.items(), weight_decay=1.0) for p in g["params"]]
    parts = flat.split([p.numel() for p in in_order])
    return {of[p]: part.view_as(p).clone() for p, part in zip(in_order, parts, strict=True)}


def train(case: Case, ranks: Ranks) -> dict:
    fused = door.deepspeed.runtime.engine.FusedAdam
    if case.fused:  # what DeepSpeed does for its FusedAdam, which needs a GPU
        door.deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW
    torch.manual_seed(0)
    run, plan = run_of(case), plan_of(case, ranks.world)
    method = run.method.build(run.model)
    method.share(ranks)
    engine, groups = door.wrap(method, run, plan)
    teacher = module.Teacher(engine, ranks)
    start = {name: x.clone() for name, x in door.whole_state(engine, teacher.values()).items()}
    notes = watched(teacher, engine)
    train_loop(
        engine, groups, teacher, batches(case, ranks), Silent(), lambda _: None,
        agreement=Agreement(Stop(), ranks), watchdog=Watchdog(Path(), ranks, 0), run=run, plan=plan,
        start_step=0,
    )  # fmt: skip
    door.deepspeed.runtime.engine.FusedAdam = fused
    used = {}
    for name, parameter in method.named_parameters():
        with door.deepspeed.zero.GatheredParameters([parameter]):
            used[name] = parameter.detach().clone()
    return {
        "start": start,
        "end": door.whole_state(engine, teacher.values()),
        "used": used,
        "notes": notes,
        "asked": method.asked,
        "updates": teacher.updates,
        "buffers": {name: b.dtype for name, b in method.named_buffers()},
        "optimizer": type(engine.optimizer).__name__,
    }


def shard_more_than_biases() -> None:
    """As published, ZeRO 3 keeps parameters below 100,000 values whole: all there are here."""
    dictionary = door.deepspeed_dictionary

    def patched(run, plan):
        written = dictionary(run, plan)
        written["zero_optimization"]["stage3_param_persistence_threshold"] = PERSIST
        return written

    door.deepspeed_dictionary = patched


def all_cases(ranks: Ranks) -> list[dict]:
    signal.alarm(900)
    shard_more_than_biases()
    door.start_process_group("cpu")
    return [train(case, ranks) for case in RANKS[ranks.world]]


def one_rank(_: Path) -> list:
    return on_ranks(1, all_cases)


def two_ranks(_: Path) -> list:
    return on_ranks(2, all_cases)


def four_ranks(_: Path) -> list:
    return on_ranks(4, all_cases)


# --- stopped and resumed --------------------------------------------------------------------------------

TOTAL, STOP = 7, 3
STOPPED = [(zero, precision) for zero in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


def siamese_run(images: Path, folder: Path, **changes) -> Run:
    return replace(tiny_run(images, folder, "mae", **changes), method=SiameseConfig())


def all_resumed(images: Path, folder: Path) -> None:
    signal.alarm(900)
    shard_more_than_biases()
    for zero, precision in STOPPED:
        make = partial(siamese_run, precision=precision)
        train_and_resume(images, folder / f"{zero}{precision}", zero=zero, total=TOTAL, stop=STOP, make=make)


def resumed(world: int, folder: Path) -> dict:
    """For each stage and precision what differs, and the teacher's files of the last checkpoint, by rank."""
    images = write_images(folder / "images")
    answers = on_ranks(world, lambda _: all_resumed(images, folder))
    assert answers == [None] * world, answers
    found = {}
    for zero, precision in STOPPED:
        runs = folder / f"{zero}{precision}"
        try:
            assert_same(runs, TOTAL, STOP)
            differs = None
        except AssertionError:
            differs = traceback.format_exc()
        last = {name: teachers_files(runs / name, world) for name in ("whole", "resumed")}
        found[zero, precision] = differs, last
    return found


def teachers_files(run_dir: Path, world: int) -> list[dict]:
    folder = run_dir / f"checkpoints/step-{TOTAL:08d}"
    return [torch.load(folder / f"teacher-rank{rank}.pt", weights_only=True) for rank in range(world)]


def resumed_on_one(folder: Path) -> dict:
    return resumed(1, folder)


def resumed_on_two(folder: Path) -> dict:
    return resumed(2, folder)


if __name__ == "__main__":
    os.environ |= {"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}  # threads of ranks that share cores spin
    main([one_rank, two_ranks, four_ranks, resumed_on_one, resumed_on_two])
