"""The processes of one run: who this one is, and how they agree.

Objects travel on the CPU, over a gloo group of their own: the default group may be NCCL, which carries
GPU memory only and orders its work after the training step's. A run of one process needs no process group.

Limits  All ranks must make the same calls in the same order. What travels is pickled: for facts, not tensors.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # the watchdog is quicker; a save to a slow disk takes its time


class RankError(RuntimeError):
    """Something failed on at least one rank. Raised on all of them, with one message."""


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error of a collective says that a rank is gone; gloo and NCCL have no class for it."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


@dataclass(frozen=True)
class Ranks:
    """A handle on the process group: `rank` of `world`, and `local_rank` on this node."""

    rank: int
    world: int
    local_rank: int

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world and self.local_rank >= 0):
            raise ValueError(f"want 0 <= rank < world and local_rank >= 0, got {self}")

    @classmethod
    def single(cls) -> "Ranks":
        """One process, without torch.distributed."""
        return cls(rank=0, world=1, local_rank=0)

    @classmethod
    def from_environment(cls) -> "Ranks":
        """This process in the default group, which must exist if the launcher started more than one.

        Raises ValueError where the launcher's variables and the process group do not fit.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if not dist.is_initialized():
            if world > 1:
                raise ValueError(f"WORLD_SIZE is {world}, but no process group is initialized")
            return cls.single()
        if dist.get_world_size() > 1 and "LOCAL_RANK" not in os.environ:
            raise ValueError("LOCAL_RANK is not set: start the ranks with a launcher that sets it")
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @cached_property
    def _gloo(self) -> dist.ProcessGroup:  # made by the first call that needs it, on all ranks together
        return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)  # it does not take the default's

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            dist.barrier(group=self._gloo)

    def gather_objects(self, obj: Any) -> list[Any]:
        """Every rank's `obj`, by rank, on all ranks."""
        if self.world == 1:
            return [obj]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, obj, group=self._gloo)
        return gathered

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's `obj`, on all ranks; what the others pass is ignored."""
        if self.world == 1:
            return obj
        box = [obj if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self._gloo)
        return box[0]

    def gather(self, x: Tensor) -> Tensor:
        """`[B, ...]` of every rank as `[world * B, ...]`, in rank order, without gradient.

        For tensors of a training step, over the default group: all ranks the same shape and dtype.
        """
        x = x.detach().contiguous()
        if self.world == 1:
            return x
        rows = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every rank's tensor, without gradient; of the same shape and dtype on all of them.

        For tensors of a training step, over the default group.
        """
        x = x.detach()
        if self.world == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total / self.world

    def ask_any(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask whether any rank has the flag set; what is returned waits for the answer and gives it.

        A call for all ranks at once.
        """
        if self.world == 1:
            return lambda: flag
        flags = torch.tensor([int(flag)], dtype=torch.int32)
        work = dist.all_reduce(flags, group=self._gloo, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(flags.item())

        return answer

    def all_succeed(self, fn: Callable[[], T], what: str, raises: type[Exception] = RankError) -> T:
        """`fn()` on this rank, once it has succeeded on every rank.

        Raises RankError, or `raises`, on all ranks, naming `what`, the ranks and their reasons, if it failed
        on any: no rank goes on, and none waits for one that gave up. `fn` must not end half-way through a
        collective.
        """
        error, value = None, None
        try:
            value = fn()
        except Exception as caught:
            error = caught
        reasons = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        failed: dict[str, list[int]] = {}
        for rank, reason in enumerate(reasons):
            if reason is not None:
                failed.setdefault(reason, []).append(rank)
        if failed:
            raise raises(f"{what} failed{'; '.join(map(self._blame, failed.values(), failed))}") from error
        return value  # type: ignore[return-value]  # fn succeeded here too

    def from_main(self, fn: Callable[[], T], what: str, raises: type[Exception] = RankError) -> T:
        """`fn()` of rank 0, run there alone: its value, or its error as in `all_succeed`, on all ranks."""
        return self.broadcast(self.all_succeed(fn if self.is_main else lambda: None, what, raises))

    def _blame(self, ranks: list[int], reason: str) -> str:
        if self.world == 1:
            return f": {reason}"
        plural = "s" if len(ranks) > 1 else ""
        return f" on rank{plural} {', '.join(map(str, ranks))} of {self.world}: {reason}"
