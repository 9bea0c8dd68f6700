"""The averages of a method under DeepSpeed, in fp32, moved in one launch after each optimizer step.

    t <- m t + (1 - m) s    for every trained parameter s of a student and its like t in the teacher; m is
                            the method's. What the student does not train is equal at the start and stays.

Where the fp32 values of t are, beside those that the optimizer has of s on the same rank:

            fp32                           bf16
    ZeRO 0  the module's weights           a copy of them
    1, 2    the same, on every rank        a copy, sharded as the optimizer's; rounded, then gathered in bf16
    3       the module's shards            a copy of these

With bf16 alone a teacher would stand still, for (1 - m) |s - t| is less than half of its last digit: the copy
moves, and the weights that the forward uses are rounded from it after each step. In ZeRO 3 nothing is put
together but the small parameters that DeepSpeed keeps whole on every rank, as it does those of the student.

Source  DeepSpeed 0.19.8: parameters without gradient are not the optimizer's; they are broadcast from rank 0
        at the start, cast to bf16, sharded by ZeRO 3 and saved as the module has them. Buffers are not cast,
        and here not averaged: running statistics of a BatchNorm stay in fp32, and each module's own.
Limits  ZeRO 3 gathers a parameter for the forward of the module that has it: no other may use it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from fastmim_kernels import ema_update
from torch import Tensor, nn

from fastmim.engine.checkpoint import CheckpointError
from fastmim.engine.deepspeed import Shard, gather_again, kept_whole, masters, stored, whole_shape
from fastmim.engine.ranks import Ranks
from fastmim.methods.base import Method


class Teacher:
    """All averages of the method in an engine; where it has none, every call does nothing.

    To be made on all ranks at once, when the engine is and before a checkpoint is loaded into it.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, ranks: Ranks):
        self.method: Method = engine.module
        self.updates = 0
        of_optimizer = masters(engine)
        pairs = [(t, of_optimizer[s]) for t, s in pairs_of(self.method) if s in of_optimizer]
        self.parameters = [t for t, _ in pairs]
        self.starts = [start for _, (start, _) in pairs]
        self.student = [values for _, (_, values) in pairs]
        self.sizes = [values.numel() for values in self.student]
        self.weights = [  # the same part of what the forward uses
            _part(stored(t), start, size)
            for t, start, size in zip(self.parameters, self.starts, self.sizes, strict=True)
        ]
        self.shards, self.master, self.exchange = self.weights, None, None
        if pairs and engine.bfloat16_enabled():
            self.master = torch.cat(self.weights).float()
            self.shards = list(self.master.split(self.sizes))
            if engine.zero_optimization_stage() in (1, 2) and ranks.world > 1:
                self.exchange = Exchange(self.parameters, self.starts, self.sizes, ranks)
        self.kept_whole = kept_whole(self.parameters)
        moving = [i for i, size in enumerate(self.sizes) if size]  # a launch over nothing is none
        self.moved, self.followed = [self.shards[i] for i in moving], [self.student[i] for i in moving]

    def step(self, progress: float) -> None:
        """Move all teachers towards their students; `progress` is the fraction of training done."""
        if self.parameters:
            ema_update(self.moved, self.followed, self.method.momentum(progress))
            self.updates += 1
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights that the forward uses follow the fp32 values, on all ranks at once."""
        if self.master is not None:  # bf16
            if self.exchange is not None:
                self.exchange.share(self.master)
            else:
                torch._foreach_copy_(self.weights, self.shards)
        if self.kept_whole:
            gather_again(self.kept_whole)

    def values(self) -> dict[nn.Parameter, Shard]:
        """The fp32 values of every teacher, as far as this rank has them."""
        return dict(zip(self.parameters, zip(self.starts, self.shards, strict=True), strict=True))

    # --- checkpoints ----------------------------------------------------------------------------------

    def layout(self) -> list[tuple[str, int, int]]:
        """Name, start and number of values of each shard."""
        names = {parameter: name for name, parameter in self.method.named_parameters()}
        return list(zip((names[p] for p in self.parameters), self.starts, self.sizes, strict=True))

    def state(self) -> dict[str, Any]:
        """What DeepSpeed does not save: the number of updates, and the fp32 copy where there is one."""
        master = None if self.master is None else self.master.cpu()
        return {"updates": self.updates, "layout": self.layout(), "master": master}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a `state`; `refresh` must follow. CheckpointError if it is of other shards than these."""
        theirs, ours = state["layout"], self.layout()
        if theirs != ours or (state["master"] is None) != (self.master is None):
            raise CheckpointError(
                f"the teacher was saved in {len(theirs)} shards {_words(state['master'])}, and this run has "
                f"{len(ours)} {'others' if theirs != ours else 'of them'} {_words(self.master)}"
            )
        if self.master is not None:
            self.master.copy_(state["master"])
        self.updates = state["updates"]


class Exchange:
    """Shards that differ from rank to rank, rounded and put together on all ranks into whole parameters.

    Bytes   one gather of rows as long as the longest rank's, kept; one copy of them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], starts: list[int], sizes: list[int], ranks: Ranks):
        layouts = ranks.gather_objects((starts, sizes))
        length = max(sum(sizes) for _, sizes in layouts)
        like = parameters[0]
        self.rows = torch.zeros(ranks.world, length, dtype=like.dtype, device=like.device)
        self.mine = self.rows[ranks.rank]
        self.sent: list[Tensor] = []
        self.weights: list[Tensor] = []
        for row, (starts, sizes) in zip(self.rows, layouts, strict=True):
            self.sent += row[: sum(sizes)].split(sizes)
            self.weights += [
                _part(stored(p), start, size)
                for p, start, size in zip(parameters, starts, sizes, strict=True)
            ]
        assert sum(x.numel() for x in self.sent) == sum(p.numel() for p in parameters)

    def share(self, values: Tensor) -> None:
        """`values` are this rank's shards, in order, as one flat tensor."""
        self.mine[: values.numel()].copy_(values)
        dist.all_gather_into_tensor(self.rows.view(-1), self.mine)
        torch._foreach_copy_(self.weights, self.sent)


def _part(shard: Shard, start: int, size: int) -> Tensor:
    """`size` values of the parameter from `start` on, which the shard must hold."""
    begins, values = shard
    if size == 0:
        return values[:0]
    assert begins <= start and start + size <= begins + values.numel()
    return values[start - begins : start - begins + size]


def _words(master: Tensor | None) -> str:
    return "without an fp32 copy" if master is None else "with an fp32 copy"


# --- at the start -------------------------------------------------------------------------------------


def pairs_of(method: Method) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Every parameter of every teacher with its student's. ValueError if two modules are not alike."""
    names = {module: name for name, module in method.named_modules()}
    for teacher, student in method.averages():
        what = f"averages: {names.get(teacher, 'a teacher')}"
        ours, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
        shapes = [{name: whole_shape(p) for name, p in module.items()} for module in (ours, theirs)]
        if shapes[0] != shapes[1]:
            differing = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
            raise ValueError(f"{what}: want the parameters of its student, got others at {differing[:3]}")
        if trained := [name for name, p in ours.items() if p.requires_grad]:
            raise ValueError(f"{what}: want no gradient in a teacher, got it in {trained[:3]}")
        yield from zip(ours.values(), (theirs[name] for name in ours), strict=True)


def check_copies(method: Method) -> None:
    """ValueError unless every teacher is a copy of its student, as a new method's must be."""
    names = {parameter: name for name, parameter in method.named_parameters()}
    others = [names[t] for t, s in pairs_of(method) if not torch.equal(t, s)]
    if others:
        raise ValueError(f"averages: want a teacher that starts as its student, got another {others[0]}")


def copy_students(method: Method, missing: Sequence[str]) -> None:
    """Make a copy of its student of every teacher of which a parameter is among the `missing` names."""
    names = {parameter: name for name, parameter in method.named_parameters()}
    for teacher, student in method.averages():
        if any(names[p] in missing for p in teacher.parameters()):
            teacher.load_state_dict(student.state_dict())
