"""Masks made of rectangular blocks, every sample's in one launch, and the other masks of uneven count.

    try t of key b, with words 4t .. 4t + 3 of the key in `stream`, u = word / 2**32, m = what may be hidden:
        area   = min_area + u0 * (m - min_area)         m = min(target - count, max_area)
        aspect = low * (high / low)**u1                 u1 in steps of 2**-12, at their middle
        h, w   = sqrt(area * aspect), sqrt(area / aspect), rounded
        corner = floor(u2 * (H - h + 1)), floor(u3 * (W - w + 1))
    It is taken if h < H, w < W and it hides between 1 and m patches that were visible. The mask is done when
    m < 1, and, unless it is to be exact, after ten tries in a row that were not taken.

Source  Bao et al., BEiT, arXiv:2106.08254, algorithm 1, and microsoft/unilm, beit/masking_generator.py;
        exact: Chen et al., CAE, arXiv:2202.03026; a target per sample: Zhou et al., iBOT, arXiv:2111.07832.
        The grid is an ablation of MAE (arXiv:2111.06377).
Shapes  B = samples, N = H * W patches in rows.
Dtypes  seeds int64, masks bool (True: hidden). Counts and areas are integers in fixed point. What is left in
        floating point is one sqrt and products in fp64, which IEEE rounds alike everywhere; there is no sum
        that a product could be fused with. The powers of high / low are repeated square roots: no library's
        exp. So a mask is the same, bit for bit, on every device, in every batch, on any number of ranks.
Bytes   8 to 16 * B read, B * N written: the time is that of the tries, one after another, in a warp or four.
Limits  2 <= H, W; N <= 4096. CUDA runs Triton, CPU runs the reference. Not differentiable. Targets of
        samples are checked on the CPU only. An exact mask that is not full after 2**14 tries is filled with
        its first visible patches: of 100,000 that hide 75 of 196 none took more than 288, of 2,000 that hide
        all 196 none more than 1393.

Two masks of one sample: complementary, `~mask`; independent, another `stream`.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels.philox import WORD, draw_uint32, philox_4x32
from fastmim_kernels.split_patches import MAX_N, check_seeds, draw_words, smallest, tile

PATIENCE = 10  # tries in a row that are not taken, after which an inexact mask is left as it is
MAX_TRIES = 2**14
STEP_BITS = 8  # counts and targets are in steps of 2**-8 patches: area then fits the 53 bits of a double
LEVEL_BITS = 12  # of the aspect


# --- reference: the definition, and the oracle of the tests -------------------------------------


@cache
def side_factors(low: float, high: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What makes twice the height, and the width, of a block from the root of its area in 2**-40 patches.

    First the factor of the lowest aspect, then those of the bits of its level, top bit first.
    """
    bits, root = [], math.sqrt(high / low)
    for _ in range(LEVEL_BITS):
        root = math.sqrt(root)  # (high / low)**(1 / 4), 1 / 8 ...: half the exponent of the aspect
        bits.append(root)
    lowest, unit = math.sqrt(low) * math.sqrt(root), 2.0 ** (1 - (STEP_BITS + 32) // 2)
    return (unit * lowest, *bits), (unit / lowest, *(1 / bit for bit in bits))


@cache
def level_factors(low: float, high: float) -> Tensor:
    """The products of `side_factors` for every level, multiplied in the kernel's order: `[2, 4096]` fp64."""
    level = torch.arange(1 << LEVEL_BITS)
    sides = []
    for lowest, *bits in side_factors(low, high):
        factor = torch.full(level.shape, lowest, dtype=torch.float64)
        for i, bit in enumerate(bits):
            factor = torch.where(level >> LEVEL_BITS - 1 - i & 1 == 1, factor * bit, factor)
        sides.append(factor)
    return torch.stack(sides)


def block_mask_reference(
    seeds_B: Tensor,
    target_B: Tensor,
    grid: tuple[int, int],
    min_area: int,
    max_area: int,
    aspect: tuple[float, float],
    patience: int,
    max_tries: int,
    stream: int,
) -> Tensor:
    """The op in plain PyTorch, on any device, the tries of all samples together. `[B], [B] -> [B, N]`.

    `target_B` in steps of 2**-8 patches; patience 0 is endless and ends in an exact mask.
    """
    (H, W), B = grid, len(seeds_B)
    y_H, x_W = (torch.arange(side, device=seeds_B.device) for side in grid)
    hidden_BHW = torch.zeros(B, H, W, dtype=torch.bool, device=seeds_B.device)
    room_B, failed_B = target_B.clone(), torch.zeros_like(seeds_B)
    factors = level_factors(*aspect).to(seeds_B.device)
    words_BT4 = draw_uint32(seeds_B, 4 * 64, stream).view(B, 64, 4)
    for t in range(max_tries):
        active_B = room_B >> STEP_BITS > 0
        if patience:
            active_B &= failed_B < patience
        if not active_B.any():
            break
        if t == words_BT4.shape[1]:
            words_BT4 = draw_uint32(seeds_B, 8 * t, stream).view(B, 2 * t, 4)
        word_B4 = words_BT4[:, t]
        m_B = room_B.clamp(max=max_area << STEP_BITS)
        area_B = (min_area << STEP_BITS + 32) + word_B4[:, 0] * (m_B - (min_area << STEP_BITS))
        double_2B = area_B.double().sqrt() * factors[:, word_B4[:, 1] >> 32 - LEVEL_BITS]
        h_B, w_B = double_2B.long() + 1 >> 1  # a half is rounded up
        top_B = word_B4[:, 2] * (H - h_B + 1) >> 32
        left_B = word_B4[:, 3] * (W - w_B + 1) >> 32
        rows_BH = (y_H >= top_B[:, None]) & (y_H < (top_B + h_B)[:, None])
        cols_BW = (x_W >= left_B[:, None]) & (x_W < (left_B + w_B)[:, None])
        fresh_BHW = rows_BH[:, :, None] & cols_BW[:, None, :] & ~hidden_BHW
        count_B = fresh_BHW.sum((1, 2))
        taken_B = active_B & (h_B < H) & (w_B < W) & (count_B > 0) & (count_B << STEP_BITS <= m_B)
        hidden_BHW |= fresh_BHW & taken_B[:, None, None]
        room_B -= taken_B * count_B << STEP_BITS
        failed_B = torch.where(taken_B, 0, failed_B + 1)
    hidden_BN = hidden_BHW.flatten(1)
    if not patience:
        hidden_BN |= (~hidden_BN).cumsum(1) <= (room_B >> STEP_BITS)[:, None]
    return hidden_BN


def uniform_mask_reference(seeds_B: Tensor, num_hidden_B: Tensor, num_patches: int, stream: int) -> Tensor:
    """The `num_hidden_B` patches with the largest (word, index). `[B], [B] -> [B, N]`."""
    n_N = torch.arange(num_patches, device=seeds_B.device)
    rank_BN = draw_uint32(seeds_B, num_patches, stream) << 16 | n_N  # no two are equal
    place_BN = rank_BN.argsort(dim=1).argsort(dim=1)
    return place_BN >= num_patches - num_hidden_B[:, None]


# --- Triton: one program per sample ----------------------------------------------------------------


@triton.jit
def _side(root, word, FACTORS: tl.constexpr, BITS: tl.constexpr):
    """A side of the block, rounded: int32."""
    factor = tl.full([], FACTORS[0], tl.float64)
    for i in tl.static_range(BITS):
        factor = tl.where(
            (word >> (31 - i)) & 1 == 1, factor * tl.full([], FACTORS[i + 1], tl.float64), factor
        )
    return ((root * factor).to(tl.int32) + 1) >> 1


@triton.jit
def _block_kernel(
    seeds_ptr, target_ptr, mask_ptr, seed_stride, target, min_area, max_area, max_tries, stream,
    H: tl.constexpr, W: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, PATIENCE: tl.constexpr,
    STEP_BITS: tl.constexpr, LEVEL_BITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    key = tl.load(seeds_ptr + b * seed_stride)
    room = tl.full([], target, tl.int32)
    if target_ptr is not None:
        room = tl.load(target_ptr + b).to(tl.int32)
    n = tl.arange(0, BLOCK_N)
    y, x = n // W, n % W
    hidden = tl.zeros([BLOCK_N], tl.int32)
    t, failed = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    while (room >> STEP_BITS > 0) & (t < max_tries) & ((PATIENCE == 0) | (failed < PATIENCE)):
        block = t.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(key, block, stream + block * 0, block * 0, block * 0)
        m = tl.minimum(room, max_area << STEP_BITS)
        low = min_area << STEP_BITS
        # exact: 32 bits times 21, in units of 2**-40 patches
        area = (low.to(tl.int64) << 32) + w0.to(tl.int64) * (m - low)
        root = tl.sqrt(area.to(tl.float64))
        h, w = _side(root, w1, TALL, LEVEL_BITS), _side(root, w1, WIDE, LEVEL_BITS)
        top = ((w2.to(tl.int64) * (H - h + 1)) >> 32).to(tl.int32)
        left = ((w3.to(tl.int64) * (W - w + 1)) >> 32).to(tl.int32)
        inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
        fresh = tl.where(inside, 1 - hidden, 0)
        count = tl.sum(fresh)
        taken = (h < H) & (w < W) & (count > 0) & (count << STEP_BITS <= m)
        hidden = tl.where(taken, hidden | fresh, hidden)
        room = tl.where(taken, room - (count << STEP_BITS), room)
        failed = tl.where(taken, 0, failed + 1)
        t += 1
    if PATIENCE == 0:  # out of tries: the first visible patches fill what is missing
        hidden |= (tl.cumsum(1 - hidden) <= room >> STEP_BITS).to(tl.int32)
    tl.store(mask_ptr + b * (H * W) + n, hidden != 0, mask=n < H * W)


@triton.jit
def _uniform_kernel(
    seeds_ptr, num_hidden_ptr, mask_ptr, seed_stride, N, stream,
    BLOCK_N: tl.constexpr, INDEX_BITS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    K = N - tl.load(num_hidden_ptr + b).to(tl.int32)
    word = draw_words(tl.load(seeds_ptr + b * seed_stride), stream, BLOCK_N)
    seen = smallest(word, n, n < N, K, INDEX_BITS)
    tl.store(mask_ptr + b * N + n, seen == 0, mask=n < N)


def launch(
    seeds: Tensor,
    targets: Tensor | None,
    target: int,
    grid: tuple[int, int],
    min_area: int,
    max_area: int,
    aspect: tuple[float, float],
    patience: int,
    max_tries: int,
    stream: int,
) -> Tensor:
    (H, W), (tall, wide) = grid, side_factors(*aspect)
    mask = torch.empty(len(seeds), H * W, dtype=torch.bool, device=seeds.device)
    _block_kernel[(len(seeds),)](
        seeds, None if targets is None else targets.contiguous(), mask, seeds.stride(0), target,
        min_area, max_area, max_tries, stream, H=H, W=W, TALL=tall, WIDE=wide, PATIENCE=patience,
        STEP_BITS=STEP_BITS, LEVEL_BITS=LEVEL_BITS, **tile(H * W),
    )  # fmt: skip
    return mask


def launch_uniform(seeds: Tensor, num_hidden: Tensor, num_patches: int, stream: int) -> Tensor:
    mask = torch.empty(len(seeds), num_patches, dtype=torch.bool, device=seeds.device)
    sizes = tile(num_patches)
    _uniform_kernel[(len(seeds),)](
        seeds, num_hidden.contiguous(), mask, seeds.stride(0), num_patches, stream,
        INDEX_BITS=sizes["BLOCK_N"].bit_length(), **sizes,
    )  # fmt: skip
    return mask


# --- the ops: schema, devices, fake -----------------------------------------------------------------


@torch.library.custom_op("fastmim::block_mask", mutates_args=(), device_types="cuda")
def _op(
    seeds: Tensor,
    targets: Tensor | None,
    target: int,
    height: int,
    width: int,
    min_area: int,
    max_area: int,
    low: float,
    high: float,
    patience: int,
    max_tries: int,
    stream: int,
) -> Tensor:
    grid, aspect = (height, width), (low, high)
    return launch(seeds, targets, target, grid, min_area, max_area, aspect, patience, max_tries, stream)


@_op.register_kernel("cpu")
def _(seeds, targets, target, height, width, min_area, max_area, low, high, patience, max_tries, stream):
    if targets is None:
        targets = torch.full_like(seeds, target)
    elif ((targets < 0) | (targets > height * width << STEP_BITS)).any():
        raise ValueError(f"want 0 <= num_hidden <= {height * width}, got {targets / 2**STEP_BITS}")
    rest = (height, width), min_area, max_area, (low, high), patience, max_tries, stream
    return block_mask_reference(seeds, targets, *rest)


@_op.register_fake
def _(seeds, targets, target, height, width, min_area, max_area, low, high, patience, max_tries, stream):
    return seeds.new_empty(seeds.shape[0], height * width, dtype=torch.bool)


@torch.library.custom_op("fastmim::uniform_mask", mutates_args=(), device_types="cuda")
def _op_uniform(seeds: Tensor, num_hidden: Tensor, num_patches: int, stream: int) -> Tensor:
    return launch_uniform(seeds, num_hidden, num_patches, stream)


@_op_uniform.register_kernel("cpu")
def _(seeds, num_hidden, num_patches, stream):
    if ((num_hidden < 0) | (num_hidden > num_patches)).any():
        raise ValueError(f"want 0 <= num_hidden <= {num_patches}, got {num_hidden}")
    return uniform_mask_reference(seeds, num_hidden, num_patches, stream)


@_op_uniform.register_fake
def _(seeds, num_hidden, num_patches, stream):
    return seeds.new_empty(seeds.shape[0], num_patches, dtype=torch.bool)


# --- public functions ------------------------------------------------------------------------------


def block_mask(
    seeds_B: Tensor,
    grid: tuple[int, int],
    num_hidden: int | Tensor,
    *,
    exact: bool = False,
    min_area: int = 16,
    max_area: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    stream: int = 0,
) -> Tensor:
    """Blocks that hide up to `num_hidden` patches, or exactly as many. `[B] -> [B, N]` bool, True is hidden.

    BEiT's with its defaults; CAE's with `exact`; iBOT's with `num_hidden` = ibot_targets (a float64 `[B]`,
    taken in steps of 1/256) and `min_area` = (min(grid) // 3) ** 2. `max_area` bounds what one block adds.

    An exact mask goes through split_mask into index tensors of fixed size. One that is not has a count of
    its own: let the encoder see all N positions, mask tokens where it is True, and weight the N losses by
    it, so that every size is fixed all the same.
    """
    check_seeds(seeds_B, stream)
    (h, w), (low, high) = grid, aspect
    if min(h, w) < 2 or h * w > MAX_N:
        raise ValueError(f"want a grid of 2 x 2 or more and {MAX_N} patches or fewer, got {h} x {w}")
    if max_area is None:
        max_area = h * w
    if not 0 <= min_area <= MAX_N or not 1 <= max_area <= MAX_N:
        raise ValueError(f"want 0 <= min_area, 1 <= max_area, both <= {MAX_N}, got {min_area}, {max_area}")
    if not 1e-3 <= low <= high <= 1e3:
        raise ValueError(f"want 0.001 <= low <= high <= 1000, got aspect {low}, {high}")
    patience = 0 if exact else PATIENCE
    rest = h, w, min_area, max_area, low, high, patience, MAX_TRIES, stream
    if not isinstance(num_hidden, Tensor):
        if not 0 <= num_hidden <= h * w:
            raise ValueError(f"want 0 <= num_hidden <= {h * w}, got {num_hidden}")
        return _op(seeds_B, None, num_hidden << STEP_BITS, *rest)
    check_counts(num_hidden, seeds_B, torch.float64)
    if exact:
        raise ValueError("an exact mask wants one whole num_hidden for all samples, got a tensor")
    return _op(seeds_B, (num_hidden * 2**STEP_BITS).long(), 0, *rest)


def check_counts(num_hidden_B: Tensor, seeds_B: Tensor, dtype: torch.dtype) -> None:
    """ValueError unless there is one per key, of `dtype`, where the seeds are."""
    if num_hidden_B.shape != seeds_B.shape or num_hidden_B.dtype != dtype:
        got = f"{num_hidden_B.dtype} {tuple(num_hidden_B.shape)}"
        raise ValueError(f"want num_hidden {dtype} {tuple(seeds_B.shape)}, got {got}")
    if num_hidden_B.device != seeds_B.device:
        raise ValueError(f"want one device, got {num_hidden_B.device} and {seeds_B.device}")


def ibot_targets(seeds_B: Tensor, num_patches: int, *, stream: int = 0) -> Tensor:
    """How many patches of each crop iBOT hides: none of half of them, U(0.1, 0.5) * N else. `[B]` float64.

    In steps of 1/256 patch, by integer arithmetic, from words that no mask draws: one `stream` serves both.
    """
    check_seeds(seeds_B, stream)
    # the streams of masks end at 2**31, and this one begins there
    key = seeds_B & WORD, seeds_B >> 32 & WORD
    coin_B, word_B, _, _ = philox_4x32(key, (0, stream | 1 << 31, 0, 0))
    steps_B = (num_patches << STEP_BITS) * ((1 << 32) + 4 * word_B) // (10 << 32)
    return torch.where(coin_B >> 31 == 0, steps_B, 0).double() / 2**STEP_BITS


def uniform_mask(seeds_B: Tensor, num_patches: int, num_hidden_B: Tensor, *, stream: int = 0) -> Tensor:
    """Exactly `num_hidden_B[b]` patches, drawn as by split_patches. `[B], [B] int64 -> [B, N]` bool.

    iBOT's `rand` shape with `ibot_targets(...).long()`.
    """
    check_seeds(seeds_B, stream)
    if not 0 <= num_patches <= MAX_N:
        raise ValueError(f"want 0 <= num_patches <= {MAX_N}, got {num_patches}")
    check_counts(num_hidden_B, seeds_B, torch.int64)
    return _op_uniform(seeds_B, num_hidden_B, num_patches, stream)


def grid_mask(grid: tuple[int, int], *, device: torch.device | str | None = None) -> Tensor:
    """All patches but the upper left one of each 2 x 2: `[N]` bool, the same for every sample."""
    h, w = grid
    if min(h, w) < 2 or h % 2 or w % 2:
        raise ValueError(f"want an even grid, got {h} x {w}")
    y_H, x_W = (torch.arange(side, device=device) % 2 == 1 for side in (h, w))
    return (y_H[:, None] | x_W).flatten()
