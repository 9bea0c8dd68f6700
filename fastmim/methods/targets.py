"""Second branches that several papers share: a copy of the student, and the center of what a teacher says.

    center   c <- m c + (1 - m) mean over the whole batch of the teacher's logits, after each step, 0 at first

Source  the center: DINO, arXiv:2104.14294, Eq. 4. Two ranks, or two micro-batches, are one batch to it.
"""

import copy
import math
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastmim.models.fp32_buffers import FP32Buffers
from fastmim.models.vit import Encoder
from fastmim.ranks import AcrossRanks

M = TypeVar("M", bound=nn.Module)


def teacher_of(student: M) -> M:
    """A copy of the student without gradients and drop path, to be named in `Method.averages`."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    if isinstance(teacher, Encoder):
        teacher.config = replace(teacher.config, drop_path=0.0)
    return teacher


def cosine_momentum(start: float, progress: float) -> float:
    """m from `start` to 1 along half a cosine: 1 - (1 - start) (1 + cos(pi progress)) / 2."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


class Center(FP32Buffers):
    """The running mean of a teacher's logits, fp32 whatever the precision of the run."""

    value_K: Tensor
    sum_K: Tensor
    count: Tensor

    def __init__(self, num_codes: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value_K", torch.zeros(num_codes))
        self.register_buffer("sum_K", torch.zeros(num_codes), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def add(self, logits_UK: Tensor) -> None:
        """Take note of the teacher's logits of a micro-batch."""
        self.sum_K.add_(logits_UK.float().mean(0))
        self.count.add_(1)

    @torch.no_grad()
    def update(self, ranks: AcrossRanks) -> None:
        """Move towards the mean of what was noted since the last step, on all ranks at once."""
        self.value_K.lerp_(ranks.mean(self.sum_K / self.count.clamp(min=1)), 1 - self.momentum)
        self.sum_K.zero_()
        self.count.zero_()
