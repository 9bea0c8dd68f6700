"""Steps that are not finite leave the weights as they were: decided on the device, without a wait.

    before each step     found = 1 if the norm of its gradients is not finite, else 0: the optimizer passes by
    after each step      found, read with the metrics at the log step
    before a checkpoint  besides it sum |x| over all that can be saved or exported: the fp32 values that the
                         optimizer moves on this rank, averages, buffers

A gradient that is not finite shows in the norm, wherever ZeRO has it, which `Gradients` has computed anyway;
so does one whose square is no fp32 number. torch's fused AdamW reads `found` in its own kernel, as it does
for a gradient scaler: weights, moments and the count of steps stay as they are. For other optimizers the host
waits for `found`, and takes the gradients away from a step that is not finite. A weight becomes infinite by
itself only at a rate that no run survives: then the next gradients are not finite, or the look before the
checkpoint finds it.

Source  DeepSpeed's own search for overflow reads every gradient in four passes, makes the host wait, and
        leaves out the step in silence. Where it cannot be switched off (ZeRO 0 in bf16, ZeRO 3, clipping),
        DeepSpeed knows on the host whether it left out the step: that is found too.
Bytes   nothing between checkpoints; one reading of the fp32 weights, 4 bytes of each, before one.
Limits  A rank sees its own shard. `Metrics` adds up the answers of all, so that they stop together.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor

from fastmim.engine.deepspeed import inner_optimizer, moved_values
from fastmim.engine.teacher import Teacher


class Finite:
    """The values of an engine and its teacher: guarded before each step, to be asked after it."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, teacher: Teacher):
        self.engine, self.teacher = engine, teacher
        self.trained = moved_values(engine)
        self.optimizer: Any = inner_optimizer(engine)
        self.found: Tensor | None = None
        self.on_device = isinstance(self.optimizer, torch.optim.AdamW) and self.optimizer.defaults["fused"]
        if not self.on_device:
            self.optimizer.register_step_pre_hook(self.take_gradients)

    @torch.no_grad()
    def guard(self, norm: Tensor) -> None:
        """Let the step whose gradients have this norm be none if it is not finite. No transfer."""
        self.found = torch.nan_to_num(norm * 0, nan=1.0)  # infinity times 0 is NaN
        if self.on_device:
            self.optimizer.found_inf = self.found

    def take_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before a step of an optimizer that asks nothing itself. A wait for the device."""
        if self.found is None or not self.found.item():
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
            if "step" in group:  # which the FusedAdam of apex and of DeepSpeed counts whether or not it moves
                group["step"] -= 1

    @torch.no_grad()
    def look(self, *, everything: bool) -> tuple[Tensor, Tensor]:
        """Whether the step was left out, 0 or 1, and a number that is finite if what it left is. No wait.

        `everything`, which a checkpoint wants, looks at the weights, the averages and the buffers; else the
        number is 0.
        """
        assert self.found is not None, "guard comes first"
        left_out = self.found if self.engine.was_step_applied() else torch.ones_like(self.found)
        if not everything:
            return left_out, torch.zeros_like(self.found)
        buffers = [b for b in self.engine.module.buffers() if b.is_floating_point()]
        return left_out, size_of([*self.trained, *self.teacher.shards, *buffers])


def size_of(values: Sequence[Tensor]) -> Tensor:
    """The sum of all absolute values, in fp32: NaN or infinite if one of them is."""
    values = [x for x in values if x.numel()]  # the norm of nothing is no launch
    return torch.stack([n.float() for n in torch._foreach_norm(values, 1)]).sum()
