"""What each rank writes of itself into a checkpoint, and takes up again."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from fastmim_kernels.attention import attention_choices, pin_attention_choices

from fastmim.engine.checkpoint import Checkpoint, CheckpointError
from fastmim.engine.config import Plan, Run
from fastmim.engine.deepspeed import load_shards, save_shards
from fastmim.engine.ranks import Ranks
from fastmim.engine.teacher import Teacher, pairs_of
from fastmim.methods.base import Method


def checkpoint_bytes(method: Method, run: Run, plan: Plan) -> int:
    """About the size of a checkpoint: weights, two moments, and the fp32 masters that ZeRO and bf16 keep."""
    weights = sum(p.numel() * p.element_size() for p in method.parameters())
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    averaged = sum(t.numel() for t, _ in pairs_of(method)) if plan.precision == "bf16" else 0
    return weights + trained * (12 if run.zero or plan.precision == "bf16" else 8) + averaged * 4


def teacher_file(folder: Path, ranks: Ranks) -> Path:
    return folder / f"teacher-rank{ranks.rank}.pt"


def write_shards(engine: deepspeed.DeepSpeedEngine, teacher: Teacher, folder: Path, ranks: Ranks) -> None:
    """This rank's files: DeepSpeed's shards, what these lack of the teacher, if there is one, the rank's own
    random state and the kernels it has chosen."""
    save_shards(engine, folder)
    if teacher.parameters:
        torch.save(teacher.state(), teacher_file(folder, ranks))
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "attention": attention_choices()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, folder / f"random-rank{ranks.rank}.pt")


def restore(engine: deepspeed.DeepSpeedEngine, teacher: Teacher, found: Checkpoint, ranks: Ranks) -> int:
    """Load the shards `write_shards` wrote; returns the finished steps."""

    def load_teacher() -> None:
        path = teacher_file(found.path, ranks)
        if not path.exists():
            raise CheckpointError(f"there is no {path.name}: the checkpoint was saved without a teacher")
        teacher.load(torch.load(path, weights_only=True))

    if teacher.parameters:  # first, since all ranks must agree before DeepSpeed's collectives
        ranks.all_succeed(load_teacher, f"resuming the teacher from {found.path}", raises=CheckpointError)
    load_shards(engine, found.path)
    teacher.refresh()
    state = torch.load(found.path / f"random-rank{ranks.rank}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    pin_attention_choices(state.get("attention", ()))  # checkpoints of older versions have none
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if ranks.is_main:
        print(f"{'resumed':>8}  from step {found.step}, {found.path}", flush=True)
    return found.step
