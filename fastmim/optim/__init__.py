"""Optimizers by name, and the numbers that configure them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastmim.optim.apex import apex_adamw, find_fused_adam
from fastmim.optim.lars import LARS
from fastmim.optim.schedule import Schedule

NOT_NEGATIVE = ("blr", "min_lr", "warmup_epochs", "eps", "weight_decay", "clip")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules."""

    name: Literal["adamw", "deepspeed", "apex", "lars", "sgd"] = "adamw"
    """adamw: torch's fused AdamW; deepspeed, apex: the FusedAdam of DeepSpeed or of NVIDIA's apex; lars, sgd:
    with the momentum betas[0], for linear probes"""
    blr: float = 1.5e-4
    """Base learning rate: the rate is blr * batch / 256"""
    lr: float | None = None
    """Absolute learning rate; overrides blr"""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine"""
    warmup_epochs: float = 40.0
    """Linear warm-up; shortened to a fifth of the run, and said so, where it would not fit"""
    warmup_start: float = 0.0
    """Share of the learning rate at which warm-up begins"""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments"""
    eps: float = 1e-8
    """Added to the denominator"""
    weight_decay: float = 0.05
    """Decoupled; not applied to tensors of one dimension and biases"""
    layer_decay: float = 1.0
    """Factor of the learning rate from one encoder block to the one below it"""
    clip: float = 0.0
    """Largest gradient norm; 0 clips nothing, as MAE"""
    clip_per: Literal["global", "tensor"] = "global"
    """What the norm is of: all gradients together, or each tensor alone, as in DINO"""
    schedule: Schedule = "mae"
    """Learning rate after warm-up: mae and beit, half a cosine; simmim, the same counted from the first step;
    multistep, times gamma at each milestone"""
    milestones: tuple[float, ...] = ()
    """Epochs where multistep lowers the learning rate, ascending; where a run ends before the last, they are
    moved in proportion, and said so"""
    gamma: float = 0.1
    """Factor of the learning rate at each milestone"""
    weight_decay_end: float | None = None
    """Weight decay at the end, along half a cosine; by default it stays as it is"""

    def __post_init__(self) -> None:
        for name in (*NOT_NEGATIVE, *(n for n in ("lr", "weight_decay_end") if getattr(self, n) is not None)):
            if not 0 <= getattr(self, name) < math.inf:  # of NaN neither holds
                flag = name.replace("_", "-")
                raise ValueError(f"optim.{flag}: want 0 or more, and a number, got {getattr(self, name)}")
        if not 0 <= self.warmup_start <= 1:
            raise ValueError(f"optim.warmup-start: want a share in [0, 1], got {self.warmup_start}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas: want two numbers in [0, 1), got {self.betas}")
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError(
                "optim.milestones: want the epochs at which multistep lowers the learning rate, got none: it "
                "would never end"
            )
        if self.schedule != "multistep" and self.milestones:
            raise ValueError(f"optim.milestones: of use with schedule multistep only, got {self.schedule}")
        if list(self.milestones) != sorted(set(self.milestones)) or min(self.milestones, default=1) <= 0:
            raise ValueError(f"optim.milestones: want epochs above 0, ascending, got {self.milestones}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"optim.gamma: want a factor in (0, 1], got {self.gamma}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer-decay: want a factor in (0, 1], got {self.layer_decay}")

    def peak_lr(self, batch: int) -> float:
        """Learning rate after warm-up for an effective batch of this many images."""
        return self.blr * batch / 256 if self.lr is None else self.lr


def torch_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """torch's AdamW, fused into one pass over the parameters, on CPU as on CUDA."""
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def lars(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return LARS(groups, momentum=config.betas[0])


def sgd(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=config.betas[0])


def check_optimizer(config: OptimConfig) -> None:
    """ImportError if the optimizer asked for cannot be had here."""
    if config.name == "apex":
        find_fused_adam()


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {
    "adamw": torch_adamw,
    "apex": apex_adamw,
    "lars": lars,
    "sgd": sgd,
    # "deepspeed" is made by DeepSpeed itself: fastmim.engine.deepspeed asks for it in its dictionary
}
