"""LARS, of the linear probe: SGD with momentum whose step on each matrix is in proportion to its norm.

    g <- g + wd p;   g <- g * trust |p| / |g|   for matrices, where neither norm is 0
    mu <- momentum mu + g;   p <- p - lr mu

Source  You et al., arXiv:1708.03888; as in facebookresearch/mae, util/lars.py: tensors of one dimension are
        neither decayed nor scaled.
Limits  norms are of whole tensors: ZeRO, which cuts them into pieces, cannot have it; the engine says so.
"""

from collections.abc import Callable
from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a trust ratio for each matrix."""

    def __init__(
        self,
        params: Any,
        lr: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if parameter.ndim > 1:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                    gradient = gradient * trust_ratio(parameter, gradient, group["trust"])
                state = self.state[parameter]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(parameter)
                state["mu"].mul_(group["momentum"]).add_(gradient)
                parameter.add_(state["mu"], alpha=-group["lr"])


def trust_ratio(parameter: torch.Tensor, gradient: torch.Tensor, trust: float) -> torch.Tensor:
    """trust |p| / |g|, and 1 where either is 0; a scalar on the device."""
    p, g = parameter.norm(), gradient.norm()
    return torch.where((p > 0) & (g > 0), trust * p / g.clamp(min=torch.finfo(g.dtype).tiny), 1.0)
