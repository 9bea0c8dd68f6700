"""The masks of one batch: MAE's uniform one, SimMIM's cells, and blocks of an exact count.

Question   what does one launch per batch save over random numbers, argsort and sorts, and over drawing each
           image's blocks in a Python loop?
Expected   no bandwidth is near its limit: 1.2 MB written at 768 images. "rand" is six launches, each longer
           than its work: on a GPU 3x or more. The blocks' loop runs on the CPU, image after image: there the
           factor is that of an idle device. On a CPU the reference draws words by Philox in int64, many
           passes over them, where torch.rand makes one, and its blocks are some fifty small operations for
           each of the tries of the slowest image: the usual forms win there, by milliseconds in a step of
           seconds, without the same mask on every device.
Baselines  "eager" is the reference; "rand" is the usual form (torch.rand, argsort, two sorts; for cells an
           expansion); "loop" draws each image's blocks in Python, with the generator of the standard library,
           and copies the batch of masks to the device.
Check      the draws of the usual forms are others, so what is compared is what every form must give: each
           patch once in seen and hidden, and the number hidden. tests/ops compares the bits.
Bytes      8 * B of seeds read; 8 * B * N of indices written, or B * N of mask.
"""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastmim_kernels import (
    block_mask,
    num_hidden,
    num_seen,
    sample_seeds,
    split_patches,
    split_patches_grouped,
)
from fastmim_kernels.block_masks import MAX_TRIES, STEP_BITS, block_mask_reference
from fastmim_kernels.split_patches import split_patches_grouped_reference, split_patches_reference
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

IMAGES = [256, 768] if DEVICE == "cuda" else [64]
SIDE, UNIT = 14, 2
N, CELLS = SIDE * SIDE, (SIDE // UNIT) ** 2
SEEN, SEEN_CELLS, BLOCKS = num_seen(N, 0.75), CELLS - num_hidden(CELLS, 0.6), 75
MIN_AREA, ASPECT = 16, (0.3, 1 / 0.3)

Split = tuple[Tensor, Tensor]


def rand(seeds: Tensor) -> Split:
    order = torch.rand(len(seeds), N, device=seeds.device).argsort(dim=1)
    return order[:, :SEEN].sort(dim=1).values, order[:, SEEN:].sort(dim=1).values


def rand_cells(seeds: Tensor) -> Split:
    order = torch.rand(len(seeds), CELLS, device=seeds.device).argsort(dim=1)
    hidden = torch.zeros(len(seeds), CELLS, dtype=torch.bool, device=seeds.device)
    hidden.scatter_(1, order[:, SEEN_CELLS:], True)
    cells = hidden.view(-1, SIDE // UNIT, SIDE // UNIT)
    patches = cells.repeat_interleave(UNIT, 1).repeat_interleave(UNIT, 2).flatten(1)
    order = patches.byte().argsort(dim=1, stable=True)
    seen = SEEN_CELLS * UNIT * UNIT
    return order[:, :seen], order[:, seen:]


def loop(seeds: Tensor) -> Tensor:
    return torch.tensor([draw_blocks() for _ in range(len(seeds))], device=seeds.device)


def draw_blocks() -> list[bool]:
    hidden, count = [False] * N, 0
    logs = math.log(ASPECT[0]), math.log(ASPECT[1])
    while count < BLOCKS:
        area, aspect = random.uniform(MIN_AREA, BLOCKS - count), math.exp(random.uniform(*logs))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= SIDE or w >= SIDE:
            continue
        top, left = random.randint(0, SIDE - h), random.randint(0, SIDE - w)
        inside = [y * SIDE + x for y in range(top, top + h) for x in range(left, left + w)]
        fresh = [n for n in inside if not hidden[n]]
        if 0 < len(fresh) <= BLOCKS - count:
            for n in fresh:
                hidden[n] = True
            count += len(fresh)
    return hidden


def eager_blocks(seeds: Tensor) -> Tensor:
    targets = torch.full_like(seeds, BLOCKS << STEP_BITS)
    return block_mask_reference(seeds, targets, (SIDE, SIDE), MIN_AREA, N, ASPECT, 0, MAX_TRIES, 0)


GROUPS: dict[str, dict[str, Callable[[Tensor], Split | Tensor]]] = {
    "patches": {
        "eager": lambda seeds: split_patches_reference(seeds, N, SEEN, 0),
        "rand": rand,
        "fastmim": lambda seeds: split_patches(seeds, N, SEEN),
    },
    "cells": {
        "eager": lambda seeds: split_patches_grouped_reference(seeds, (SIDE, SIDE), UNIT, SEEN_CELLS, 0),
        "rand": rand_cells,
        "fastmim": lambda seeds: split_patches_grouped(seeds, (SIDE, SIDE), UNIT, CELLS - SEEN_CELLS),
    },
    "blocks": {
        "eager": eager_blocks,
        "loop": loop,
        "fastmim": lambda seeds: block_mask(seeds, (SIDE, SIDE), BLOCKS, exact=True),
    },
}


def run(draw: Callable[[Tensor], Split | Tensor], seeds: Tensor) -> tuple[Tensor, ...]:
    """What all draws have in common, in two or three small launches more, for every provider alike."""
    result = draw(seeds)
    if isinstance(result, Tensor):
        return (result.sum(1),)
    seen, hidden = result
    return seen.sum(1) + hidden.sum(1), torch.tensor([seen.shape[1], hidden.shape[1]])


def cases() -> Iterator[list[Case]]:
    for images in IMAGES:
        seeds = sample_seeds(0, 0, torch.arange(images, device=DEVICE))
        for mode, providers in GROUPS.items():
            yield [
                Case(
                    op="split_patches",
                    provider=provider,
                    mode=mode,
                    shape={"B": images, "N": N},
                    dtype="bool" if mode == "blocks" else "int64",
                    bytes_moved=images * (8 + N * (1 if mode == "blocks" else 8)),
                    run=partial(run, draw, seeds),
                )
                for provider, draw in providers.items()
            ]
