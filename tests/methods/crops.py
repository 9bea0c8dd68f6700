"""Batches for methods of several crops: noise of the sizes that they ask for."""

import torch
from fastmim_kernels import sample_seeds

from fastmim.methods.base import Method
from fastmim.views import Batch


def make_batch(method: Method, size: int = 4, epoch: int = 0, first: int = 0) -> Batch:
    crops = []
    for i, crop in enumerate(method.crops):
        rng = torch.Generator().manual_seed(17 + i)
        images = torch.randint(0, 256, (16, *crop.size, 3), generator=rng, dtype=torch.uint8)
        crops.append(images[first : first + size])
    ids = torch.arange(first, first + size)
    return Batch(tuple(crops), sample_seeds(0, 0, ids), ids, epoch)


class Second:
    """The second of two ranks, whose means and gathered rows are those of both."""

    rank, world = 1, 2

    def __init__(self, firsts):
        self.firsts = iter(firsts)

    def gather(self, x):
        return torch.cat([next(self.firsts), x.detach()])

    def mean(self, x):
        return (next(self.firsts) + x.detach()) / 2
