"""The uniform mask of every sample in one launch: which patches are seen and which are hidden.

    word[b, n] = word n of key b in `stream` (philox.py)
    seen[b]    = the K patches n with the smallest (word[b, n], n); hidden[b] = the others; both ascending

Source  the law of MAE's masks (He et al., arXiv:2111.06377: K patches drawn uniformly, without
        replacement); here each mask is a function of the sample's key and the stream alone, so it is the
        same on every device, in every batch and on any number of ranks.
Shapes  B = samples, N = patches, K = seen, L = N - K hidden.
Dtypes  keys and indices int64.
Bytes   8 * B read, 8 * B * N written; the words never leave the chip.
Limits  0 <= N <= 4096. CUDA runs Triton, CPU runs the reference. Not differentiable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels.philox import draw_uint32

MAX_N = 4096  # one program holds all words of a sample


# --- reference: the definition, and the oracle of the tests -------------------------------------


def split_patches_reference(
    keys_B: Tensor, num_patches: int, num_seen: int, stream: int
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, on any device. `[B] -> [B, K], [B, N - K]`."""
    words_BN = draw_uint32(keys_B, num_patches, stream)
    rank_BN = words_BN << 16 | torch.arange(num_patches, device=keys_B.device)  # no two are equal
    order_BN = rank_BN.argsort(dim=1)
    return order_BN[:, :num_seen].sort(dim=1).values, order_BN[:, num_seen:].sort(dim=1).values


# --- Triton: one program per sample ----------------------------------------------------------------


@triton.jit
def _words(key, stream, BLOCK_N: tl.constexpr):
    """Words 0 .. BLOCK_N - 1 of `key`, [BLOCK_N] int64: four lanes of BLOCK_N / 4 blocks, interleaved."""
    block = tl.arange(0, BLOCK_N // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, block, stream + block * 0, block * 0, block * 0)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_N]).to(tl.int64)


@triton.jit
def _kernel(
    keys_ptr, seen_ptr, hidden_ptr, key_stride, N, K, stream, BLOCK_N: tl.constexpr, INDEX_BITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    rank = (_words(tl.load(keys_ptr + row * key_stride), stream, BLOCK_N) << INDEX_BITS) | n
    rank = tl.where(n < N, rank, 1 << 62)  # padding comes last
    # The largest bound with at most K ranks below it, bit by bit from the top: a count per bit is less
    # work than a sort. INDEX_BITS leaves room above the last index, so that all can be below.
    bound = tl.full([], 0, tl.int64)
    for i in range(32 + INDEX_BITS):
        higher = bound | (tl.full([], 1, tl.int64) << (31 + INDEX_BITS - i))
        bound = tl.where(tl.sum((rank < higher).to(tl.int32)) <= K, higher, bound)
    seen = rank < bound
    before = tl.cumsum(seen.to(tl.int32)) - seen.to(tl.int32)  # seen patches left of this one
    index = n.to(tl.int64)
    tl.store(seen_ptr + row * K + before, index, mask=seen)
    tl.store(hidden_ptr + row * (N - K) + n - before, index, mask=(n < N) & (rank >= bound))


def launch(keys: Tensor, num_patches: int, num_seen: int, stream: int) -> tuple[Tensor, Tensor]:
    B, block = keys.shape[0], max(4, triton.next_power_of_2(num_patches))
    seen = torch.empty(B, num_seen, dtype=torch.int64, device=keys.device)
    hidden = torch.empty(B, num_patches - num_seen, dtype=torch.int64, device=keys.device)
    _kernel[(B,)](
        keys, seen, hidden, keys.stride(0), num_patches, num_seen, stream,
        BLOCK_N=block, INDEX_BITS=block.bit_length(), num_warps=max(1, block // 256),
    )  # fmt: skip
    return seen, hidden


# --- the op: schema, devices, fake ------------------------------------------------------------------


@torch.library.custom_op("fastmim::split_patches", mutates_args=(), device_types="cuda")
def _op(keys: Tensor, num_patches: int, num_seen: int, stream: int) -> tuple[Tensor, Tensor]:
    return launch(keys, num_patches, num_seen, stream)


@_op.register_kernel("cpu")
def _(keys: Tensor, num_patches: int, num_seen: int, stream: int) -> tuple[Tensor, Tensor]:
    return split_patches_reference(keys, num_patches, num_seen, stream)


@_op.register_fake
def _(keys: Tensor, num_patches: int, num_seen: int, stream: int) -> tuple[Tensor, Tensor]:
    B = keys.shape[0]
    return keys.new_empty(B, num_seen), keys.new_empty(B, num_patches - num_seen)


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


def split_patches(
    keys_B: Tensor, num_patches: int, num_seen: int, *, stream: int = 0
) -> tuple[Tensor, Tensor]:
    """Seen and hidden patches of each sample, ascending. `[B] -> [B, K], [B, N - K]` int64.

    The same key and stream give the same mask everywhere; two streams of a key are independent.
    """
    if keys_B.ndim != 1 or keys_B.dtype != torch.int64:
        raise ValueError(f"want keys int64 [B], got {keys_B.dtype} {tuple(keys_B.shape)}")
    if not 0 <= num_seen <= num_patches <= MAX_N:
        raise ValueError(f"want 0 <= num_seen <= num_patches <= {MAX_N}, got {num_seen}, {num_patches}")
    if not 0 <= stream < 2**31:
        raise ValueError(f"want 0 <= stream < 2**31, got {stream}")
    return _op(keys_B, num_patches, num_seen, stream)
