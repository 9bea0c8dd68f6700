"""What test_heads looks at: batch norm on two ranks of a gloo group. Each returns both ranks' answers."""

from pathlib import Path

import torch

from fastmim.engine.ranks import Ranks
from fastmim.models.heads import BatchNorm
from tests.engine.forked import main, on_ranks

ROWS, CHANNELS = 12, 5


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows far from zero, what weighs their outputs, and a weight and a bias."""
    rng = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(ROWS, CHANNELS, generator=rng) for _ in range(2))
    weight, bias = (torch.randn(CHANNELS, generator=rng) for _ in range(2))
    return 30 + 2 * x, dy, weight, bias


def batch_norm(_: Path) -> list:
    def work(ranks: Ranks):
        x, dy, weight, bias = tensors()
        norm = BatchNorm(CHANNELS)
        norm.ranks = ranks
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
        half = ROWS // ranks.world
        own = slice(ranks.rank * half, (ranks.rank + 1) * half)
        mine = x[own].clone().requires_grad_()
        y = norm(mine.view(2, -1, CHANNELS)).view(half, CHANNELS)
        (y * dy[own]).sum().backward()
        states = y.detach(), mine.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var
        return [state.tolist() for state in states]

    return on_ranks(2, work)


if __name__ == "__main__":
    main([batch_norm])
