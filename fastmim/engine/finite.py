"""Whether a step left finite values: asked of the device after each, read with the metrics at the log step.

    sum |x|   over all fp32 values that the optimizer moves on this rank: finite if each of them is

A gradient that is not finite leaves a weight that is not: AdamW's moments of it are NaN or infinite, and the
weight's step NaN or inf / inf, times whatever learning rate, even 0. So one look at the weights after the
update sees the gradients too, wherever ZeRO has them, and it sees what a checkpoint is made of.

Source  DeepSpeed's own search for overflow reads every gradient in four passes, makes the host wait, and
        leaves out the step in silence. Where it cannot be switched off (ZeRO 0 in bf16, ZeRO 3, clipping),
        DeepSpeed knows on the host whether it left out the step: that counts as not finite.
Bytes   one reading of the fp32 weights: 4 bytes of each.
Limits  A rank sees its own shard. `Metrics` adds up the answers of all, so that they stop together.
"""

from collections.abc import Sequence

import deepspeed
import torch
from torch import Tensor

from fastmim.engine.deepspeed import moved_values
from fastmim.engine.teacher import Teacher


class Finite:
    """The values of an engine and its teacher, to be asked after each step."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, teacher: Teacher):
        self.engine, self.teacher = engine, teacher
        self.trained = moved_values(engine)

    @torch.no_grad()
    def look(self, *, everything: bool) -> Tensor:
        """A finite number if what the step left is finite, else NaN or infinity. No transfer, no wait.

        `everything`, which a checkpoint wants, is also the averages and the buffers: beside the weights, what
        can be saved or exported.
        """
        if not self.engine.was_step_applied():
            return torch.full((), torch.nan, device=self.trained[0].device)
        values = self.trained
        if everything:
            buffers = [b for b in self.engine.module.buffers() if b.is_floating_point()]
            values = [*values, *self.teacher.shards, *buffers]
        return size_of(values)


def size_of(values: Sequence[Tensor]) -> Tensor:
    """The sum of all absolute values, in fp32: NaN or infinite if one of them is."""
    values = [x for x in values if x.numel()]  # the norm of nothing is no launch
    return torch.stack([n.float() for n in torch._foreach_norm(values, 1)]).sum()
