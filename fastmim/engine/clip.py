"""The norm of the gradients of a step, and clipping by it: of all together, or of each tensor alone.

    all together    g <- g min(1, clip / (|all g| + 1e-6))          torch.nn.utils.clip_grad_norm_
    each tensor     g <- g min(1, clip / (|g| + 1e-6))              DINO, iBOT

Where the averaged gradients lie between the backward of the last micro-batch and the step:

    ZeRO 0                          each parameter's own, whole on every rank
    1, 2, 3                         pieces, on the rank that has the shard of the weights
    1 in bf16 with --accumulate     DeepSpeed's fp32 sums, whole on every rank

Squares of pieces are added over the ranks in one exchange of as many values as there are tensors, so a tensor
that several ranks share has one norm. Nothing waits for the device: DeepSpeed's own clipping would.

Source  DeepSpeed 0.19.8: `averaged_gradients` of its ZeRO optimizers, whose padding is of no parameter, and
        `fp32_groups_gradients` of its BF16_Optimizer. Another class is refused in words.
Bytes   one reading of the gradients each step; clipping reads and writes them once more.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from fastmim.optim import OptimConfig

TINY = 1e-6
Piece = tuple[nn.Parameter, Tensor]


class Gradients:
    """The gradients of an engine's parameters: asked and clipped once per step, before the optimizer's."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, groups: Sequence[Mapping[str, Any]], config: OptimConfig
    ):
        self.engine, self.config = engine, config
        self.group_of = {p: group for group in groups for p in group["params"]}
        self.places = {p: i for i, p in enumerate(self.group_of)}
        self.index: tuple[list[int], Tensor] | None = None
        pieces_of(engine)  # a class that is not known is refused now

    @torch.no_grad()
    def clip(self, *, epoch: int) -> Tensor:
        """Clip as the run and its groups ask; the norm of all gradients before it, on the device.

        Groups that are frozen in this epoch count for nothing.
        """
        pieces = [(p, g) for p, g in pieces_of(self.engine) if self.group_of[p]["frozen_epochs"] <= epoch]
        squares_P = self.squares(pieces)
        if any(self.limit(group) for group in self.group_of.values()):
            self.scale(pieces, squares_P)
        return squares_P.sum().sqrt()

    def limit(self, group: Mapping[str, Any]) -> float:
        """The largest norm of a group's gradients, 0 for any."""
        return self.config.clip if group["clip"] is None else group["clip"]

    def squares(self, pieces: Sequence[Piece]) -> Tensor:
        """The square of each tensor's norm, fp32 `[P]`, over all ranks."""
        device = pieces[0][1].device if pieces else next(self.engine.module.parameters()).device
        squares_P = torch.zeros(len(self.places), device=device)
        if pieces:
            norms = torch._foreach_norm([g for _, g in pieces], 2, dtype=torch.float32)
            places = [self.places[p] for p, _ in pieces]
            if places == list(range(len(places))):  # of each parameter one piece, in order
                squares_P[: len(places)] = torch.stack(norms).square()
            else:
                if self.index is None or self.index[0] != places:  # once: each copy from the host may wait
                    self.index = places, torch.tensor(places, device=device)
                index = self.index[1]
                squares_P.index_add_(0, index, torch.stack(norms).square())
        if are_sharded(self.engine):
            dist.all_reduce(squares_P)
        return squares_P

    def scale(self, pieces: Sequence[Piece], squares_P: Tensor) -> None:
        """Multiply each piece by what its group's limit allows."""
        alone = self.config.clip_per == "tensor"
        own = [self.places[p] for p, group in self.group_of.items() if group["clip"] is not None]
        total = (squares_P.sum() - sum(squares_P[i] for i in own)).sqrt()
        norms_P = squares_P.sqrt()
        for p, g in pieces:
            group = self.group_of[p]
            limit = self.limit(group)
            if limit == 0:
                continue
            norm = norms_P[self.places[p]] if alone or group["clip"] is not None else total
            g.mul_((limit / (norm + TINY)).clamp(max=1.0))


def are_sharded(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether the averaged gradients differ from rank to rank."""
    return dist.get_world_size() > 1 and isinstance(
        engine.optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3
    )


def pieces_of(engine: deepspeed.DeepSpeedEngine) -> list[Piece]:
    """Every parameter that is trained and what this rank has of its averaged gradient.

    ValueError for an optimizer of DeepSpeed's whose gradients cannot be found.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(_of_stage_3(optimizer))
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return list(_of_stages_1_and_2(optimizer))
    if isinstance(optimizer, BF16_Optimizer):
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        return [pair for ps, gs in groups for pair in zip(ps, gs, strict=True)]
    if engine.zero_optimization():
        raise ValueError(
            f"zero: want an optimizer of DeepSpeed's whose gradients can be found and clipped, got "
            f"{type(optimizer).__name__}; take another --zero"
        )
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    return [(p, p.grad) for p in trained if p.grad is not None]


def _of_stages_1_and_2(optimizer: Any) -> Iterator[Piece]:
    for i, gradients in optimizer.averaged_gradients.items():
        owners = optimizer.params_in_partition[i]
        if gradients is None or not owners:  # with many ranks one may have nothing but padding
            continue
        pieces = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        yield from zip(owners, pieces, strict=False)  # what is left is padding that bears no mark


def _of_stage_3(optimizer: Any) -> Iterator[Piece]:
    rank = dist.get_rank()
    for i, gradients in optimizer.averaged_gradients.items():
        if gradients is None:
            continue
        for p, g in zip(optimizer.fp16_groups[i], gradients, strict=True):
            start = rank * p.ds_tensor.numel()
            there = max(0, min(g.numel(), p.ds_numel - start))
            yield p, g.view(-1)[:there]
