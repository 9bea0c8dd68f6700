"""What tests of methods share: noise of the sizes asked for, gradients of two losses, a second rank."""

from collections.abc import Callable

import torch
from fastmim_kernels import sample_seeds
from torch import Tensor

from fastmim.methods.base import Method
from fastmim.views import Batch


def make_batch(method: Method, size: int = 4, epoch: int = 0, first: int = 0) -> Batch:
    crops = []
    for i, crop in enumerate(method.crops):
        rng = torch.Generator().manual_seed(17 + i)
        images = torch.randint(0, 256, (16, *crop.size, 3), generator=rng, dtype=torch.uint8)
        crops.append(images[first : first + size])
    ids = torch.arange(first, first + size)
    labels = ids % 3 if method.config.labeled else None
    return Batch(tuple(crops), sample_seeds(0, 0, ids), ids, epoch, labels)


def assert_same_gradients(
    method: Method, expected: Tensor, loss: Callable[[], Tensor], *, atol: float = 1e-5
) -> set[str]:
    """The gradients of a loss are those of `expected`, and the same parameters have one: their names."""
    expected.backward()
    grads = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    loss().backward()
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert grads and found.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=atol, msg=name)
    return set(found)


class Second:
    """The second of two ranks, whose means and gathered rows are those of both."""

    rank, world = 1, 2

    def __init__(self, firsts):
        self.firsts = iter(firsts)

    def gather(self, x):
        return torch.cat([next(self.firsts), x.detach()])

    def mean(self, x):
        return (next(self.firsts) + x.detach()) / 2
