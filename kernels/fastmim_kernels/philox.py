"""Counter-based random numbers: every draw is a function of (seed, epoch, sample id), of nothing else.

    seed of a sample  = words 0, 1 of philox(key=seed, counter=(id low, id high, epoch, 1))
    word n of a seed  = lane n % 4 of philox(key=seed, counter=(n // 4, stream, 0, 0))

No state: the numbers do not depend on the device, the batch, the rank or the order of the draws.
`stream` tells apart the uses of one seed (mask, crop, color, second view ...).

Source  Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
Shapes  B = samples, count = words per sample.
Dtypes  a uint32 word travels in an int64 tensor; a seed is both words in one int64: low | high << 32.
Limits  plain PyTorch on every device. Kernels use `tl.philox`, which gives the same words.
"""

from typing import Any

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
Words = Any  # an int64 tensor of uint32 words, or one such word as a plain int


def philox_4x32(key: tuple[Words, Words], counter: tuple[Words, Words, Words, Words]) -> tuple[Words, ...]:
    """The block function: two key words and four counter words, broadcast together, to four words."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # the 64-bit products wrap in int64; shifting and masking gives back their unsigned halves
        p0, p2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p2 >> 32 & WORD) ^ c1 ^ k0, p2 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + WEYL[0] & WORD, k1 + WEYL[1] & WORD
    return c0, c1, c2, c3


def _split(x: Words) -> tuple[Words, Words]:
    return x & WORD, x >> 32 & WORD


def sample_seeds(seed: int, epoch: int, ids_B: Tensor) -> Tensor:
    """One seed per sample id, `[B]` -> `[B]` int64: a pseudo-random function of (seed, epoch, id).

    `0 <= seed < 2**64`, `0 <= epoch < 2**32`; ids are any int64. ValueError otherwise.
    """
    if ids_B.ndim != 1 or ids_B.dtype != torch.int64:
        raise ValueError(f"want ids int64 [B], got {ids_B.dtype} {tuple(ids_B.shape)}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"want 0 <= seed < 2**64, got {seed}")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"want 0 <= epoch < 2**32, got {epoch}")
    # the last counter word is 1 here and 0 in the draws: the seed of a run never meets that of a sample
    low, high, _, _ = philox_4x32(_split(seed), (*_split(ids_B), epoch, 1))
    return low | high << 32


def draw_uint32(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    """Words 0 .. count - 1 of each seed in `stream`, `[B]` -> `[B, count]` int64 in [0, 2**32).

    `0 <= stream < 2**31` (the kernels pass it as int32); ValueError otherwise.
    """
    if seeds_B.ndim != 1 or seeds_B.dtype != torch.int64:
        raise ValueError(f"want seeds int64 [B], got {seeds_B.dtype} {tuple(seeds_B.shape)}")
    if count < 0:
        raise ValueError(f"want count >= 0, got {count}")
    if not 0 <= stream < 2**31:
        raise ValueError(f"want 0 <= stream < 2**31, got {stream}")
    return _drawn(seeds_B, count, stream) if torch.compiler.is_compiling() else _words(seeds_B, count, stream)


def _words(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    block = torch.arange((count + 3) // 4, device=seeds_B.device)
    lanes = philox_4x32(_split(seeds_B[:, None]), (block, stream, 0, 0))
    return torch.stack(lanes, dim=2).flatten(1)[:, :count]


@torch.library.custom_op("fastmim::draw_uint32", mutates_args=())
def _drawn(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    """The same as one op: Inductor (torch 2.13) gets 64-bit products and shifts of its own code wrong."""
    return _words(seeds_B, count, stream).contiguous()


@_drawn.register_fake
def _(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    return seeds_B.new_empty(len(seeds_B), count)


def draw_uniform(seeds_B: Tensor, count: int, stream: int) -> Tensor:
    """`draw_uint32` as float64 in [0, 1), in steps of 2**-32. `[B]` -> `[B, count]`."""
    return draw_uint32(seeds_B, count, stream).double() * 2.0**-32
