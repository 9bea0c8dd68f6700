"""Modules whose buffers stay in fp32 whatever the precision of a run: steps of running averages are small."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class FP32Buffers(nn.Module):
    """A module that takes any device and dtype for its parameters, and for its own buffers fp32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.float()
        return self
