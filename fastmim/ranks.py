"""What a method may ask of the ranks that share its batch. No gradient passes between them.

The engine's `Ranks` answers over the process group; a single process is `ALONE`.
"""

from typing import Protocol

from torch import Tensor


class AcrossRanks(Protocol):
    """The ranks that share the batch, for losses, centers and norms that look across it."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gather(self, x: Tensor) -> Tensor:
        """`[B, ...]` of every rank as `[world * B, ...]`, in rank order, without gradient."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every rank's tensor, of one shape and dtype, without gradient."""


class Alone:
    """One process: what it gathers, and what it takes the mean of, is its own."""

    rank, world = 0, 1

    def gather(self, x: Tensor) -> Tensor:
        return x.detach()

    def mean(self, x: Tensor) -> Tensor:
        return x.detach()


ALONE = Alone()
