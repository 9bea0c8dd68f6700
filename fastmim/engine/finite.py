"""Whether a step left finite values: known on the device after each, read with the metrics at the log step.

    after each step      the norm of its gradients, which `Gradients` has computed anyway
    before a checkpoint  besides it sum |x| over all that can be saved or exported: the fp32 values that the
                         optimizer moves on this rank, averages, buffers

A gradient that is not finite shows at once, wherever ZeRO has it. A weight becomes infinite by itself only at
a rate that no run survives: then the next loss is not finite, or the look before the checkpoint finds it.

Source  DeepSpeed's own search for overflow reads every gradient in four passes, makes the host wait, and
        leaves out the step in silence. Where it cannot be switched off (ZeRO 0 in bf16, ZeRO 3, clipping),
        DeepSpeed knows on the host whether it left out the step: that counts as not finite.
Bytes   nothing between checkpoints; one reading of the fp32 weights, 4 bytes of each, before one.
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
    def look(self, norm: Tensor, *, everything: bool) -> Tensor:
        """A finite number if what the step left is finite, else NaN or infinity. No transfer, no wait.

        `norm` is that of the step's gradients. `everything`, which a checkpoint wants, is also the weights,
        the averages and the buffers.
        """
        if not self.engine.was_step_applied():
            return torch.full_like(norm, torch.nan)
        if not everything:
            return norm
        buffers = [b for b in self.engine.module.buffers() if b.is_floating_point()]
        return norm + size_of([*self.trained, *self.teacher.shards, *buffers])


def size_of(values: Sequence[Tensor]) -> Tensor:
    """The sum of all absolute values, in fp32: NaN or infinite if one of them is."""
    values = [x for x in values if x.numel()]  # the norm of nothing is no launch
    return torch.stack([n.float() for n in torch._foreach_norm(values, 1)]).sum()
