"""The uniform mask of every sample in one launch: which patches are seen and which are hidden.

    word[b, n] = word n of key b in `stream` (philox.py)
    seen[b]    = the K patches n with the smallest (word[b, n], n); hidden[b] = the others; both ascending

Grouped: the law above decides on cells of `unit` x `unit` patches, each patch goes with its cell.
split_mask gives the same two index tensors for any mask that hides equally many patches of each sample.

Two masks of one sample: complementary, `seen2, hidden2 = hidden, seen`; independent, another `stream`.

Source  the law of MAE's masks (He et al., arXiv:2111.06377: K patches drawn uniformly, without
        replacement), on cells that of SimMIM's (Xie et al., arXiv:2111.09886) and CMAE's (Huang et al.,
        arXiv:2207.13532); here each mask is a function of the sample's key and the stream alone, so it is
        the same on every device, in every batch and on any number of ranks.
Shapes  B = samples, N = patches, K = seen, L = N - K hidden.
Dtypes  seeds and indices int64, a mask bool: True is hidden.
Bytes   8 * B read (of a mask B * N), 8 * B * N written; the words never leave the chip.
Limits  0 <= N <= 4096. CUDA runs Triton, CPU runs the reference. Not differentiable. Whether a mask hides
        as many patches as was said is checked on the CPU only.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels.philox import draw_uint32

MAX_N = 4096  # one program holds all words of a sample


# --- reference: the definition, and the oracle of the tests -------------------------------------


def split_patches_reference(
    seeds_B: Tensor, num_patches: int, num_seen: int, stream: int
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, on any device. `[B] -> [B, K], [B, N - K]`."""
    words_BN = draw_uint32(seeds_B, num_patches, stream)
    rank_BN = words_BN << 16 | torch.arange(num_patches, device=seeds_B.device)  # no two are equal
    order_BN = rank_BN.argsort(dim=1)
    return order_BN[:, :num_seen].sort(dim=1).values, order_BN[:, num_seen:].sort(dim=1).values


def split_patches_grouped_reference(
    seeds_B: Tensor, grid: tuple[int, int], unit: int, num_seen_cells: int, stream: int
) -> tuple[Tensor, Tensor]:
    """The same on cells of `unit` x `unit` patches. `[B] -> [B, K], [B, N - K]`."""
    h, w = grid
    patch_hw = torch.arange(h * w, device=seeds_B.device).view(h // unit, unit, w // unit, unit)
    patches_of_cell = patch_hw.transpose(1, 2).reshape(-1, unit * unit)
    cells = split_patches_reference(seeds_B, len(patches_of_cell), num_seen_cells, stream)
    seen, hidden = (patches_of_cell[cell_BC].flatten(1).sort(dim=1).values for cell_BC in cells)
    return seen, hidden


def split_mask_reference(mask_BN: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """What a mask leaves seen and what it hides. `[B, N] -> [B, N - L], [B, L]`."""
    order_BN = mask_BN.byte().argsort(dim=1, stable=True)
    num_seen = mask_BN.shape[1] - num_hidden
    return order_BN[:, :num_seen], order_BN[:, num_seen:]


# --- Triton: one program per sample ----------------------------------------------------------------


@triton.jit
def draw_words(key, stream, BLOCK_N: tl.constexpr):
    """Words 0 .. BLOCK_N - 1 of `key`, [BLOCK_N] int64: four lanes of BLOCK_N / 4 blocks, interleaved."""
    block = tl.arange(0, BLOCK_N // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, block, stream + block * 0, block * 0, block * 0)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_N]).to(tl.int64)


@triton.jit
def _cell_words(key, stream, cell):
    """Word `cell[n]` of `key`, [BLOCK_N] int64. A patch draws its own: no word is handed to another lane."""
    block = (cell // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, block, stream + block * 0, block * 0, block * 0)
    low, high = tl.where(cell % 2 == 0, w0, w1), tl.where(cell % 2 == 0, w2, w3)
    return tl.where(cell % 4 < 2, low, high).to(tl.int64)


@triton.jit
def smallest(word, cell, exist, K, INDEX_BITS: tl.constexpr):
    """Which patches have the K smallest (word, cell) of those that exist. block_masks shares it."""
    rank = tl.where(exist, (word << INDEX_BITS) | cell, 1 << 62)
    # The largest bound with at most K ranks below it, bit by bit from the top: a count per bit is less
    # work than a sort. INDEX_BITS leaves room above the last index, so that all can be below.
    bound = tl.full([], 0, tl.int64)
    for i in range(32 + INDEX_BITS):
        higher = bound | (tl.full([], 1, tl.int64) << (31 + INDEX_BITS - i))
        bound = tl.where(tl.sum((rank < higher).to(tl.int32)) <= K, higher, bound)
    return rank < bound


@triton.jit
def _store_split(seen_ptr, hidden_ptr, row, n, seen, exist, N, K):
    """The seen and the hidden of sample `row`, ascending. Never beyond its rows, whatever `seen` counts."""
    before = tl.cumsum(seen.to(tl.int32)) - seen.to(tl.int32)  # seen patches left of this one
    index = n.to(tl.int64)
    tl.store(seen_ptr + row * K + before, index, mask=seen & (before < K))
    hidden = exist & (seen == 0) & (n - before < N - K)
    tl.store(hidden_ptr + row * (N - K) + n - before, index, mask=hidden)


@triton.jit
def _kernel(
    seeds_ptr, seen_ptr, hidden_ptr, seed_stride, N, K, stream,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, INDEX_BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    key = tl.load(seeds_ptr + row * seed_stride)
    if UNIT == 1:
        cell, word = n, draw_words(key, stream, BLOCK_N)
    else:  # all patches of a cell have its rank: K of them are UNIT * UNIT times as many cells
        cell = n // WIDTH // UNIT * (WIDTH // UNIT) + n % WIDTH // UNIT
        word = _cell_words(key, stream, cell)
    _store_split(seen_ptr, hidden_ptr, row, n, smallest(word, cell, n < N, K, INDEX_BITS), n < N, N, K)


@triton.jit
def _mask_kernel(mask_ptr, seen_ptr, hidden_ptr, mask_stride, N, K, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    hidden = tl.load(mask_ptr + row * mask_stride + n, mask=n < N, other=1)
    _store_split(seen_ptr, hidden_ptr, row, n, hidden == 0, n < N, N, K)


def tile(num_patches: int) -> dict[str, int]:
    """A program holds all patches of its sample, eight to a lane."""
    block = max(4, triton.next_power_of_2(num_patches))
    return {"BLOCK_N": block, "num_warps": max(1, block // 256)}


def _outputs(seeds: Tensor, num_patches: int, num_seen: int) -> tuple[Tensor, Tensor]:
    shapes = (len(seeds), num_seen), (len(seeds), num_patches - num_seen)
    seen, hidden = (torch.empty(shape, dtype=torch.int64, device=seeds.device) for shape in shapes)
    return seen, hidden


def launch(
    seeds: Tensor, num_patches: int, num_seen: int, stream: int, width: int = 1, unit: int = 1
) -> tuple[Tensor, Tensor]:
    seen, hidden = _outputs(seeds, num_patches, num_seen)
    sizes = tile(num_patches)
    _kernel[(len(seeds),)](
        seeds, seen, hidden, seeds.stride(0), num_patches, num_seen, stream,
        WIDTH=width, UNIT=unit, INDEX_BITS=sizes["BLOCK_N"].bit_length(), **sizes,
    )  # fmt: skip
    return seen, hidden


def launch_mask(mask: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    N = mask.shape[1]
    if mask.stride(1) != 1:  # those of samples may be anything: a grid_mask expanded to a batch has 0
        mask = mask.contiguous()
    seen, hidden = _outputs(mask, N, N - num_hidden)
    _mask_kernel[(len(mask),)](mask, seen, hidden, mask.stride(0), N, N - num_hidden, **tile(N))
    return seen, hidden


# --- the ops: schema, devices, fake -----------------------------------------------------------------


@torch.library.custom_op("fastmim::split_patches", mutates_args=(), device_types="cuda")
def _op(
    seeds: Tensor, num_patches: int, num_seen: int, stream: int, width: int = 1, unit: int = 1
) -> tuple[Tensor, Tensor]:
    return launch(seeds, num_patches, num_seen, stream, width, unit)


@_op.register_kernel("cpu")
def _(seeds, num_patches, num_seen, stream, width=1, unit=1):
    if unit == 1:
        return split_patches_reference(seeds, num_patches, num_seen, stream)
    grid = num_patches // width, width
    return split_patches_grouped_reference(seeds, grid, unit, num_seen // unit**2, stream)


@_op.register_fake
def _(seeds, num_patches, num_seen, stream, width=1, unit=1):
    B = seeds.shape[0]
    return seeds.new_empty(B, num_seen), seeds.new_empty(B, num_patches - num_seen)


@torch.library.custom_op("fastmim::split_mask", mutates_args=(), device_types="cuda")
def _op_mask(mask: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    return launch_mask(mask, num_hidden)


@_op_mask.register_kernel("cpu")
def _(mask, num_hidden):
    count_B = mask.sum(1)
    if (count_B != num_hidden).any():
        raise ValueError(f"want {num_hidden} hidden in each row, got {count_B.min()} to {count_B.max()}")
    seen, hidden = split_mask_reference(mask, num_hidden)
    return seen.clone(), hidden.clone()  # an op's outputs share no memory


@_op_mask.register_fake
def _(mask, num_hidden):
    B, N = mask.shape
    shapes = (B, N - num_hidden), (B, num_hidden)
    seen, hidden = (mask.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return seen, hidden


# --- public functions ------------------------------------------------------------------------------


def num_seen(num_patches: int, mask_ratio: float) -> int:
    """How many of `num_patches` stay seen: MAE's `int(N * (1 - ratio))`, in floating point.

    ValueError unless 0 <= ratio < 1 and at least one patch is left.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"want 0 <= mask_ratio < 1, got {mask_ratio}")
    seen = int(num_patches * (1 - mask_ratio))
    if seen < 1:
        raise ValueError(f"mask_ratio {mask_ratio} leaves none of {num_patches} patches seen")
    return seen


def num_hidden(num_cells: int, mask_ratio: float) -> int:
    """How many of `num_cells` are hidden: SimMIM's `ceil(cells * ratio)`, in floating point.

    224 pixels in units of 32 at 0.6: 30 of 49 cells, so 120 of 196 patches. The product is rounded before
    `ceil` sees it: ceil(25 * 0.28) is 8, not 7. CMAE keeps `floor(49 * 0.35)`: that is
    `num_seen(49, 0.65)` = 17 cells, 68 patches. ValueError unless 0 <= ratio < 1 and one cell is left.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"want 0 <= mask_ratio < 1, got {mask_ratio}")
    hidden = math.ceil(num_cells * mask_ratio)
    if hidden >= num_cells:
        raise ValueError(f"mask_ratio {mask_ratio} leaves none of {num_cells} cells seen")
    return hidden


def check_seeds(seeds_B: Tensor, stream: int) -> None:
    """ValueError for what no mask can be drawn from."""
    if seeds_B.ndim != 1 or seeds_B.dtype != torch.int64:
        raise ValueError(f"want seeds int64 [B], got {seeds_B.dtype} {tuple(seeds_B.shape)}")
    if not 0 <= stream < 2**31:
        raise ValueError(f"want 0 <= stream < 2**31, got {stream}")


def split_patches(
    seeds_B: Tensor, num_patches: int, num_seen: int, *, stream: int = 0
) -> tuple[Tensor, Tensor]:
    """Seen and hidden patches of each sample, ascending. `[B] -> [B, K], [B, N - K]` int64.

    The same key and stream give the same mask everywhere; two streams of a key are independent.
    """
    check_seeds(seeds_B, stream)
    if not 0 <= num_seen <= num_patches <= MAX_N:
        raise ValueError(f"want 0 <= num_seen <= num_patches <= {MAX_N}, got {num_seen}, {num_patches}")
    return _op(seeds_B, num_patches, num_seen, stream)


def split_patches_grouped(
    seeds_B: Tensor, grid: tuple[int, int], unit: int, num_hidden_cells: int, *, stream: int = 0
) -> tuple[Tensor, Tensor]:
    """Seen and hidden patches where whole cells of `unit` x `unit` patches are hidden, both ascending.

    `[B] -> [B, K], [B, N - K]` int64: N patches in a `grid` of (height, width), N - K = num_hidden_cells *
    unit * unit. With unit 1 it is split_patches. ValueError if `unit` does not divide the grid.
    """
    check_seeds(seeds_B, stream)
    h, w = grid
    if unit < 1 or min(h, w) < 1 or h % unit or w % unit:
        raise ValueError(f"want a unit that divides the grid, got unit {unit} and grid {h} x {w}")
    cells = (h // unit) * (w // unit)
    if not 0 <= num_hidden_cells <= cells or h * w > MAX_N:
        raise ValueError(
            f"want 0 <= num_hidden_cells <= {cells} and at most {MAX_N} patches,"
            f" got {num_hidden_cells} and {h * w}"
        )
    return _op(seeds_B, h * w, (cells - num_hidden_cells) * unit * unit, stream, w, unit)


def split_mask(mask_BN: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """Seen and hidden patches of a mask (True: hidden) with `num_hidden` in each row, both ascending.

    `[B, N] -> [B, N - L], [B, L]` int64. ValueError, on the CPU, if a row hides another number of patches;
    on CUDA the indices of such a row are undefined.
    """
    if mask_BN.ndim != 2 or mask_BN.dtype != torch.bool:
        raise ValueError(f"want a mask bool [B, N], got {mask_BN.dtype} {tuple(mask_BN.shape)}")
    if not 0 <= num_hidden <= mask_BN.shape[1] <= MAX_N:
        raise ValueError(f"want 0 <= num_hidden <= N <= {MAX_N}, got {num_hidden}, N = {mask_BN.shape[1]}")
    return _op_mask(mask_BN, num_hidden)
