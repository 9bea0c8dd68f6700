"""Triton kernels and launchers of info_nce.py, which holds the formula, the shapes and the limits.

The positive of a row stays out of the softmax's sums and is added in closed form at the end. With lse- the
log-sum-exp over the negatives alone, s+ the positive logit and p- = sigmoid(lse- - s+) all that is not on it,

    loss = softplus(lse- - s+)          dloss/dq^ = p- / tau * (sum over negatives of w_j k^_j - k^+)

so neither a small loss nor its gradient is what two large numbers leave. The rows that enter a product are
the stored ones: in half precision their products are exact, and the norms divide fp32 logits afterwards.
The weight of a raw key is exp(s_j) / |k_j|; the running maximum is that of these weights, so that none
leaves the range of fp16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = 1e-12  # the least norm that divides: torch.nn.functional.normalize's
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
TINIEST: tl.constexpr = tl.constexpr(EPS)


@triton.jit
def _load(ptr, rows, exist, stride, CHUNK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns CHUNK * WIDTH and on of `rows`, zero where nothing exists."""
    cols = CHUNK * WIDTH + tl.arange(0, WIDTH)
    mask = exist[:, None] if D % WIDTH == 0 else exist[:, None] & (cols < D)[None, :]
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, x, rows, exist, stride, CHUNK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    cols = CHUNK * WIDTH + tl.arange(0, WIDTH)
    mask = exist[:, None] if D % WIDTH == 0 else exist[:, None] & (cols < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_kernel(
    x_ptr, norm_ptr, num_rows, N, stride_b, stride_n,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = (rows // N) * stride_b + (rows % N) * stride_n
    x = _load(x_ptr, start, rows < num_rows, 1, 0, WIDTH, D).to(tl.float32)
    square = tl.sum(x * x, axis=1)
    # a row of zeros has no direction: any divisor serves, and 1 keeps its weight beside the others'; the sign
    # is for its gradient, which eps divides
    norm = tl.where(square == 0.0, -1.0, tl.maximum(tl.sqrt(square), TINIEST))
    tl.store(norm_ptr + rows, norm, mask=rows < num_rows)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, label_ptr, norm_ptr, loss_ptr, lse_ptr, rate_ptr, pull_ptr, B, G, N,
    q_stride_b, q_stride_n, k_stride_g, k_stride_n, offset, temperature,
    NORMALIZE: tl.constexpr, NEED_PULL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # the tiles of one position follow one another: they share its keys in L2
    tiles = tl.cdiv(B, ROWS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    b = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = b < B
    label = b + offset
    if label_ptr is not None:  # kept for all keys in half the registers, or it spills
        label = tl.load(label_ptr + b * N + n, mask=inside, other=0).to(tl.int32)
    q_ptr += n * q_stride_n
    k_ptr += n * k_stride_n

    q = ()
    square = tl.zeros([ROWS], tl.float32)
    positive = tl.zeros([ROWS], tl.float32)
    for c in tl.static_range(CHUNKS):
        rows = _load(q_ptr, b, inside, q_stride_b, c, WIDTH, D)
        own = _load(k_ptr, label.to(tl.int64), inside, k_stride_g, c, WIDTH, D).to(tl.float32)
        square += tl.sum(rows.to(tl.float32) * rows.to(tl.float32), axis=1)
        positive += tl.sum(rows.to(tl.float32) * own, axis=1)
        q += (rows,)
    per_norm = tl.full([ROWS], 1.0, tl.float32)
    own_per_norm = tl.full([ROWS], 1.0, tl.float32)
    if NORMALIZE:
        per_norm = 1.0 / tl.maximum(tl.sqrt(square), TINIEST)
        own_per_norm = 1.0 / tl.abs(tl.load(norm_ptr + label.to(tl.int64) * N + n, mask=inside, other=1.0))
    cosine = positive * per_norm * own_per_norm
    to_log2 = per_norm * (LOG2E / temperature)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    inner = tl.zeros([ROWS], tl.float32)
    mean = ()
    for _ in tl.static_range(CHUNKS):
        mean += (tl.zeros([ROWS, WIDTH], tl.float32),)
    for start in range(0, G, KEYS):
        g = start + tl.arange(0, KEYS).to(tl.int64)
        k = ()
        weight = tl.zeros([ROWS, KEYS], tl.float32)
        for c in tl.static_range(CHUNKS):
            k += (_load(k_ptr, g, g < G, k_stride_g, c, WIDTH, D),)
            weight = tl.dot(q[c], tl.trans(k[c]), weight, input_precision="ieee")
        norm = tl.full([KEYS], 1.0, tl.float32)
        if NORMALIZE:
            norm = tl.abs(tl.load(norm_ptr + g * N + n, mask=g < G, other=1.0))
        logit = weight * to_log2[:, None] * (1.0 / norm)[None, :]
        negative = (g < G)[None, :] & (g.to(label.dtype)[None, :] != label[:, None])
        weight = tl.where(negative, logit - tl.log2(norm)[None, :], float("-inf"))
        higher = tl.maximum(top, tl.max(weight, axis=1))
        zero = tl.where(higher == float("-inf"), 0.0, higher)  # a tile may hold nothing but the positive
        weight = tl.exp2(weight - zero[:, None])
        fade = tl.exp2(top - zero)
        share = weight * norm[None, :]
        total = total * fade + tl.sum(share, axis=1)
        top = higher
        if NEED_PULL:
            inner = inner * fade + tl.sum(share * logit, axis=1)
            faded = ()
            for c in tl.static_range(CHUNKS):
                product = mean[c] * fade[:, None]
                faded += (tl.dot(weight.to(k[c].dtype), k[c], product, input_precision="ieee"),)
            mean = faded

    gap = (top + tl.log2(total)) / LOG2E - cosine / temperature  # lse- - s+; -inf where there is no negative
    small = tl.exp(-tl.abs(gap))
    rounded = 1.0 + small
    log1p = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / (rounded - 1.0)))
    loss = tl.maximum(gap, 0.0) + log1p
    at = b * N + n
    tl.store(loss_ptr + at, loss, mask=inside)
    tl.store(lse_ptr + at, loss + cosine / temperature, mask=inside)
    rate = per_norm / (temperature * (1.0 + tl.exp(-gap)))
    tl.store(rate_ptr + at, rate, mask=inside)
    if NEED_PULL:
        per_total = 1.0 / tl.where(total == 0.0, 1.0, total)
        # off the query: what lies along it changes no cosine; below eps the divisor is a constant
        along = (inner * per_total / LOG2E - cosine / temperature) * temperature
        along = tl.where(tl.sqrt(square) > TINIEST, along, 0.0)
        for c in tl.static_range(CHUNKS):
            own = _load(k_ptr, label.to(tl.int64), inside, k_stride_g, c, WIDTH, D).to(tl.float32)
            pull = mean[c] * per_total[:, None] - own * own_per_norm[:, None]
            if NORMALIZE:
                row = _load(q_ptr, b, inside, q_stride_b, c, WIDTH, D).to(tl.float32)
                pull -= row * (along * per_norm)[:, None]
            _store(pull_ptr + n * D, pull, b, inside, N * D, c, WIDTH, D)


@triton.jit
def _backward_keys_kernel(
    dloss_ptr, q_ptr, k_ptr, label_ptr, q_norm_ptr, norm_ptr, lse_ptr, rate_ptr, dk_ptr, B, G, N,
    q_stride_b, q_stride_n, k_stride_g, k_stride_n, offset, temperature,
    NORMALIZE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # keys stay, queries pass by: the forward with its parts exchanged, its softmax known from the lse
    tiles = tl.cdiv(G, KEYS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    g = (tl.program_id(0) % tiles).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    inside = g < G
    q_ptr += n * q_stride_n
    k_ptr += n * k_stride_n
    norm = tl.full([KEYS], 1.0, tl.float32)
    if NORMALIZE:
        norm = tl.abs(tl.load(norm_ptr + g * N + n, mask=inside, other=1.0))
    along = tl.zeros([KEYS], tl.float32)
    k = ()
    acc = ()
    for c in tl.static_range(CHUNKS):
        k += (_load(k_ptr, g, inside, k_stride_g, c, WIDTH, D),)
        acc += (tl.zeros([KEYS, WIDTH], tl.float32),)
    for start in range(0, B, ROWS):
        b = start + tl.arange(0, ROWS).to(tl.int64)
        exist = b < B
        at = b * N + n
        per_norm = tl.full([ROWS], 1.0, tl.float32)
        if NORMALIZE:
            per_norm = 1.0 / tl.abs(tl.load(q_norm_ptr + at, mask=exist, other=1.0))
        q = ()
        weight = tl.zeros([KEYS, ROWS], tl.float32)
        for c in tl.static_range(CHUNKS):
            q += (_load(q_ptr, b, exist, q_stride_b, c, WIDTH, D),)
            weight = tl.dot(k[c], tl.trans(q[c]), weight, input_precision="ieee")
        logit = weight * (per_norm * (LOG2E / temperature))[None, :] * (1.0 / norm)[:, None]
        lse = tl.load(lse_ptr + at, mask=exist, other=0.0) * LOG2E
        rate = tl.load(rate_ptr + at, mask=exist, other=0.0)
        own = -rate / per_norm * temperature  # p_pos - 1
        label = b + offset
        if label_ptr is not None:
            label = tl.load(label_ptr + at, mask=exist, other=0)
        weight = tl.where(g[:, None] == label[None, :], own[None, :], tl.exp2(logit - lse[None, :]))
        dloss = tl.load(dloss_ptr + at, mask=exist, other=0.0)
        weight *= dloss[None, :]  # zero for a query that does not exist
        along += tl.sum(weight * logit, axis=1)
        weight *= per_norm[None, :]
        added = ()
        for c in tl.static_range(CHUNKS):
            # half-precision rows are exact in tf32, and dloss of 1e-7 keeps its digits there
            added += (tl.dot(weight, q[c].to(tl.float32), acc[c], input_precision=PRECISION),)
        acc = added
    along = tl.where(norm > TINIEST, along * (temperature / LOG2E) / norm, 0.0)
    if NORMALIZE:
        sign = tl.load(norm_ptr + g * N + n, mask=inside, other=1.0)
        norm = tl.where(sign < 0.0, TINIEST, norm)
    for c in tl.static_range(CHUNKS):
        x = acc[c]
        if NORMALIZE:
            row = _load(k_ptr, g, inside, k_stride_g, c, WIDTH, D).to(tl.float32)
            x -= row * along[:, None]
        _store(dk_ptr + n * D, x / (norm * temperature)[:, None], g, inside, N * D, c, WIDTH, D)


def tile(D: int, dtype: torch.dtype) -> dict[str, int]:
    """Chunks of a row, and as many rows and keys as the registers and sm_80's shared memory hold."""
    half = dtype != torch.float32
    even = half and D in (64, 128, 256)
    width = min(128 if even else 64, max(16, triton.next_power_of_2(D)))
    if even:
        rows, keys = 64, 32
    else:
        most = 768 if half else 256
        rows, keys = (16, 16) if most < D else (32, 32)
    sizes = {"WIDTH": width, "CHUNKS": triton.cdiv(D, width), "ROWS": rows, "KEYS": keys}
    # without maxnreg ptxas spills a little to let a second program in
    return {**sizes, "num_warps": 8, "num_stages": 2, "maxnreg": 255}


def row_norms(x: Tensor) -> Tensor:
    """`[B, N, D] -> [B, N]` fp32, at least eps; -1 for a row of zeros."""
    B, N, D = x.shape
    norm = torch.empty(B, N, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(D)
    rows = max(1, 2048 // width)
    if norm.numel():
        _norm_kernel[(triton.cdiv(B * N, rows),)](
            x, norm, B * N, N, x.stride(0), x.stride(1), D=D, ROWS=rows, WIDTH=width
        )
    return norm


def launch_forward(
    q: Tensor, k: Tensor, temperature: float, offset: int, normalize: bool, need_pull: bool,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log-sum-exp, rate, pull (no rows where not needed) and the norms of the keys.

    The gradient of a query is dloss * rate * pull.
    """
    (B, N, D), G = q.shape, k.shape[0]
    loss, lse, rate = (torch.empty(B, N, dtype=torch.float32, device=q.device) for _ in range(3))
    pull = torch.empty(B if need_pull else 0, N, D, dtype=q.dtype, device=q.device)
    norm = row_norms(k if normalize else k[:0])
    t = tile(D, q.dtype)
    if loss.numel():
        _forward_kernel[(triton.cdiv(B, t["ROWS"]) * N,)](
            q, k, None if labels is None else labels.contiguous(), norm, loss, lse, rate, pull, B, G, N,
            *q.stride()[:2], *k.stride()[:2], offset, temperature,
            NORMALIZE=normalize, NEED_PULL=need_pull, D=D, **t,
        )  # fmt: skip
    return loss, lse, rate, pull, norm


def launch_backward_keys(
    dloss: Tensor, q: Tensor, k: Tensor, lse: Tensor, rate: Tensor, norm: Tensor,
    temperature: float, offset: int, normalize: bool, labels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the keys from what the forward left; zero for a key that nobody met."""
    (B, N, D), G = q.shape, k.shape[0]
    dk = torch.empty(G, N, D, dtype=k.dtype, device=k.device)
    t = tile(D, q.dtype)
    if dk.numel():
        _backward_keys_kernel[(triton.cdiv(G, t["KEYS"]) * N,)](
            dloss.contiguous(), q, k, None if labels is None else labels.contiguous(),
            row_norms(q if normalize else q[:0]), norm, lse, rate, dk, B, G, N,
            *q.stride()[:2], *k.stride()[:2], offset, temperature,
            NORMALIZE=normalize, D=D, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **t,
        )  # fmt: skip
    return dk
