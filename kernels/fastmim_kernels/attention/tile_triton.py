"""Triton kernels and launchers of tile.py, which holds the formula, the shapes and the limits.

A row of logits is at most 256 wide: the forward holds all of it, so the softmax is that of the definition,
one maximum, one sum, and nothing is rescaled on the way. A row is cut into tiles of WIDTH keys and a last
one, TAIL, as narrow as the rest of the keys allows: 197 tokens are 3 * 64 + 16 keys and not 256.

With a bias of the logits, `[H, n, n]`, products are q_i . k_j + bias_ij sqrt(d), so that one scale serves
both. Its gradient is the sum of ds over the samples: a program for each tile of it passes by all of them, in
order, and nothing is added by two programs at once.

The backward makes the probabilities again, p = exp(s - lse), and sends them back:

    dv = p' do      dp = do v'      ds = p (dp - delta)      dk = ds' q / sqrt(d)      dq = ds k / sqrt(d)

with delta_i = sum over j of p_ij dp_ij = do_i . out_i. A head of at most 64 tokens is one tile and one
program. A longer one has a program for every 64 queries, which leaves dq and delta, and then one for every
64 keys: to hold all of them in one program would take more registers than there are.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(ptr, rows, exist, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`rows` of one head, [rows, BLOCK_D], zero where nothing exists."""
    cols = tl.arange(0, BLOCK_D)
    mask = exist[:, None] if D == BLOCK_D else exist[:, None] & (cols < D)[None, :]
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, x, rows, exist, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    mask = exist[:, None] if D == BLOCK_D else exist[:, None] & (cols < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _place(tiles, start, length, count, H):
    """Sample, head, first token, int64 all three, and tile of this program.

    Tiles of one head follow one another, since they share its keys in L2.
    """
    n = tl.program_id(0)
    tile = n % tiles
    h = (n // tiles) % H
    run = (n // tiles // H) % count
    b = n // tiles // H // count
    return b.to(tl.int64), h.to(tl.int64), (start + run * length).to(tl.int64), tile


@triton.jit
def _load_all(
    ptr, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """All keys, or values, of a head. Issued together, so that one wait is for all of them."""
    tiles = ()
    for c in tl.static_range(CHUNKS):
        j = c * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
        tiles += (_load(ptr, j, j < length, stride, D, BLOCK_D),)
    if TAIL > 0:
        j = CHUNKS * WIDTH + tl.arange(0, TAIL).to(tl.int64)
        tiles += (_load(ptr, j, j < length, stride, D, BLOCK_D),)
    return tiles


@triton.jit
def _biased(s, bias_ptr, h, i, j, length, scale):
    """Products with the bias of queries i and keys j of head h, read from rows of `length`."""
    at = bias_ptr + h * length * length + i[:, None] * length + j[None, :]
    bias = tl.load(at, mask=(i < length)[:, None] & (j < length)[None, :], other=0.0)
    return s + bias.to(tl.float32) / scale


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, T, H, start, length, count,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    b, h, first, tile = _place(tl.cdiv(length, ROWS), start, length, count, H)
    q_ptr += b * q_stride_b + first * q_stride_t + h * q_stride_h
    k_ptr += b * k_stride_b + first * k_stride_t + h * k_stride_h
    v_ptr += b * v_stride_b + first * v_stride_t + h * v_stride_h
    rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    q = _load(q_ptr, rows, inside, q_stride_t, D, BLOCK_D)

    k = _load_all(k_ptr, length, k_stride_t, D, BLOCK_D, WIDTH, CHUNKS, TAIL)
    logits = ()
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for c in tl.static_range(CHUNKS + (TAIL > 0)):
        s = tl.dot(q, tl.trans(k[c]), input_precision="ieee")
        if bias_ptr is not None:
            j = c * WIDTH + tl.arange(0, TAIL if c == CHUNKS else WIDTH).to(tl.int64)
            s = _biased(s, bias_ptr, h, rows, j, length, scale)
        if c == CHUNKS:
            s = tl.where((CHUNKS * WIDTH + tl.arange(0, TAIL) < length)[None, :], s, float("-inf"))
        top = tl.maximum(top, tl.max(s, axis=1))
        logits += (s,)
        tl.debug_barrier()  # else ptxas fetches all keys at once into more registers than sm_80 has
    v = _load_all(v_ptr, length, v_stride_t, D, BLOCK_D, WIDTH, CHUNKS, TAIL)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for c in tl.static_range(CHUNKS + (TAIL > 0)):
        p = tl.exp2((logits[c] - top[:, None]) * (scale * LOG2E))
        total += tl.sum(p, axis=1)
        acc = tl.dot(p.to(v[c].dtype), v[c], acc, input_precision="ieee")

    token = b * T + first
    _store(out_ptr + (token * H + h) * D, acc / total[:, None], rows, inside, H * D, D, BLOCK_D)
    lse = top * scale + tl.log(total)
    tl.store(lse_ptr + (b * H + h) * T + first + rows, lse, mask=inside)


@triton.jit
def _probabilities(s, lse, scale):
    """exp(s - lse) of products that are not yet scaled."""
    return tl.exp2(s * (scale * LOG2E) - lse * LOG2E)


@triton.jit
def _backward_tile_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, bias_ptr, T, H, start, length, count,
    dout_stride_b, dout_stride_t, dout_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h, scale,
    NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # the whole of a head is one tile: delta falls out of it, and out need not be read
    b, h, first, _ = _place(1, start, length, count, H)
    i = tl.arange(0, ROWS).to(tl.int64)
    inside = i < length
    q = _load(q_ptr + b * q_stride_b + first * q_stride_t + h * q_stride_h, i, inside, q_stride_t, D, BLOCK_D)
    k = _load(k_ptr + b * k_stride_b + first * k_stride_t + h * k_stride_h, i, inside, k_stride_t, D, BLOCK_D)
    dout_ptr += b * dout_stride_b + first * dout_stride_t + h * dout_stride_h
    dout = _load(dout_ptr, i, inside, dout_stride_t, D, BLOCK_D)
    lse = tl.load(lse_ptr + (b * H + h) * T + first + i, mask=inside, other=0.0)
    at = ((b * T + first) * H + h) * D  # the gradients are contiguous
    stride = H * D

    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if bias_ptr is not None:
        s = _biased(s, bias_ptr, h, i, i, length, scale)
    p = _probabilities(s, lse[:, None], scale)
    p = tl.where(inside[:, None] & inside[None, :], p, 0.0)
    if NEED_V:
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision="ieee")
        _store(dv_ptr + at, dv, i, inside, stride, D, BLOCK_D)
    if NEED_Q or NEED_K:
        v_ptr += b * v_stride_b + first * v_stride_t + h * v_stride_h
        v = _load(v_ptr, i, inside, v_stride_t, D, BLOCK_D)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None])).to(q.dtype)
        if NEED_K:
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
            _store(dk_ptr + at, dk * scale, i, inside, stride, D, BLOCK_D)
        if NEED_Q:
            dq = tl.dot(ds, k, input_precision="ieee")
            _store(dq_ptr + at, dq * scale, i, inside, stride, D, BLOCK_D)


@triton.jit
def _backward_queries_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, bias_ptr, T, H, start, length, count,
    dout_stride_b, dout_stride_t, dout_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h, scale,
    NEED_Q: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b, h, first, tile = _place(tl.cdiv(length, ROWS), start, length, count, H)
    i = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < length
    dout_ptr += b * dout_stride_b + first * dout_stride_t + h * dout_stride_h
    dout = _load(dout_ptr, i, inside, dout_stride_t, D, BLOCK_D)
    at = ((b * T + first) * H + h) * D  # out and its gradients are contiguous
    out = _load(out_ptr + at, i, inside, H * D, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    row = (b * H + h) * T + first + i
    tl.store(delta_ptr + row, delta, mask=inside)
    if NEED_Q:
        q_ptr += b * q_stride_b + first * q_stride_t + h * q_stride_h
        k_ptr += b * k_stride_b + first * k_stride_t + h * k_stride_h
        v_ptr += b * v_stride_b + first * v_stride_t + h * v_stride_h
        q = _load(q_ptr, i, inside, q_stride_t, D, BLOCK_D)
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
        dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for c in range(0, length, WIDTH):
            j = c + tl.arange(0, WIDTH).to(tl.int64)
            k = _load(k_ptr, j, j < length, k_stride_t, D, BLOCK_D)
            v = _load(v_ptr, j, j < length, v_stride_t, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if bias_ptr is not None:
                s = _biased(s, bias_ptr, h, i, j, length, scale)
            p = _probabilities(s, lse[:, None], scale)
            # a key that does not exist has a p that may be infinite, and zero times that is not zero
            p = tl.where((j < length)[None, :], p, 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision="ieee")
        _store(dq_ptr + at, dq * scale, i, inside, H * D, D, BLOCK_D)


@triton.jit
def _backward_keys_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, bias_ptr, T, H, start, length, count,
    dout_stride_b, dout_stride_t, dout_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h, scale,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # keys stay, queries pass by; the tiles are [keys, queries]
    b, h, first, tile = _place(tl.cdiv(length, ROWS), start, length, count, H)
    j = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = j < length
    dout_ptr += b * dout_stride_b + first * dout_stride_t + h * dout_stride_h
    q_ptr += b * q_stride_b + first * q_stride_t + h * q_stride_h
    k_ptr += b * k_stride_b + first * k_stride_t + h * k_stride_h
    v_ptr += b * v_stride_b + first * v_stride_t + h * v_stride_h
    k = _load(k_ptr, j, inside, k_stride_t, D, BLOCK_D)
    v = _load(v_ptr, j, inside, v_stride_t, D, BLOCK_D)
    at = ((b * T + first) * H + h) * D
    row = (b * H + h) * T + first
    dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for c in range(0, length, WIDTH):
        i = c + tl.arange(0, WIDTH).to(tl.int64)
        q = _load(q_ptr, i, i < length, q_stride_t, D, BLOCK_D)
        dout = _load(dout_ptr, i, i < length, dout_stride_t, D, BLOCK_D)
        lse = tl.load(lse_ptr + row + i, mask=i < length, other=0.0)
        # a query that does not exist has p = 1, and q and dout that are zero
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        if bias_ptr is not None:
            s = tl.trans(_biased(tl.trans(s), bias_ptr, h, i, j, length, scale))
        p = _probabilities(s, lse[None, :], scale)
        if NEED_V:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        if NEED_K:
            delta = tl.load(delta_ptr + row + i, mask=i < length, other=0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision="ieee")
    if NEED_K:
        _store(dk_ptr + at, dk * scale, j, inside, H * D, D, BLOCK_D)
    if NEED_V:
        _store(dv_ptr + at, dv, j, inside, H * D, D, BLOCK_D)


@triton.jit
def _backward_bias_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, dbias_ptr, B, T, H, start, length,
    dout_stride_b, dout_stride_t, dout_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # a tile of one head's bias stays, the samples pass by
    columns, rows = tl.cdiv(length, WIDTH), tl.cdiv(length, ROWS)
    n = tl.program_id(0)
    h = (n // columns // rows).to(tl.int64)
    i = (n // columns % rows).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = (n % columns).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = (i < length)[:, None] & (j < length)[None, :]
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for b in range(0, B):
        b = tl.cast(b, tl.int64)
        at = b * q_stride_b + start * q_stride_t + h * q_stride_h
        q = _load(q_ptr + at, i, i < length, q_stride_t, D, BLOCK_D)
        at = b * k_stride_b + start * k_stride_t + h * k_stride_h
        k = _load(k_ptr + at, j, j < length, k_stride_t, D, BLOCK_D)
        at = b * v_stride_b + start * v_stride_t + h * v_stride_h
        v = _load(v_ptr + at, j, j < length, v_stride_t, D, BLOCK_D)
        at = b * dout_stride_b + start * dout_stride_t + h * dout_stride_h
        dout = _load(dout_ptr + at, i, i < length, dout_stride_t, D, BLOCK_D)
        out = _load(out_ptr + ((b * T + start) * H + h) * D, i, i < length, H * D, D, BLOCK_D)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        lse = tl.load(lse_ptr + (b * H + h) * T + start + i, mask=i < length, other=0.0)
        s = _biased(tl.dot(q, tl.trans(k), input_precision="ieee"), bias_ptr, h, i, j, length, scale)
        p = tl.where(inside, _probabilities(s, lse[:, None], scale), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        acc += p * (dp - delta[:, None])
    at = dbias_ptr + h * length * length + i[:, None] * length + j[None, :]
    tl.store(at, acc.to(dbias_ptr.dtype.element_ty), mask=inside)


def runs(segments: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First token, length and number of neighbors of equal length: these share a launch."""
    start = 0
    for length, equals in groupby(segments):
        count = len(list(equals))
        yield start, length, count
        start += length * count


def launches(
    segments: Sequence[int], biases: Sequence[Tensor | None] | None
) -> Iterator[tuple[tuple[int, int, int], Tensor | None]]:
    """`runs`, or with biases each segment for itself, and the bias of it."""
    if biases is None:
        yield from ((run, None) for run in runs(segments))
        return
    start = 0
    for length, bias in zip(segments, biases, strict=True):
        yield (start, length, 1), bias
        start += length


def _wide_products() -> bool:
    """Does Triton compile for a GPU with products of 64 rows, wgmma or tcgen05? The interpreter has none."""
    try:
        return 90 <= triton.runtime.driver.active.get_current_target().arch < 120
    except RuntimeError:
        return False


def _sizes(length: int, d: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(d))
    rows = min(64, max(16, triton.next_power_of_2(length)))
    return {"D": d, "BLOCK_D": block, "ROWS": rows, "num_warps": rows // 16 * (2 if block == 128 else 1)}


def forward_tile(length: int, d: int) -> dict[str, int]:
    """Tiles of the forward: as many rows as leave room for a whole row of logits in the registers."""
    sizes = _sizes(length, d)
    if length > 64 and d % 16:  # its rows are read in small pieces, whose addresses take registers
        sizes |= {"ROWS": 16, "num_warps": 8}
    elif length > 128 and not _wide_products():
        sizes["ROWS"] = 32
    chunks, rest = divmod(length, 64)
    tail = max(16, triton.next_power_of_2(rest)) if rest else 0
    return {**sizes, "WIDTH": 64, "CHUNKS": chunks, "TAIL": tail}


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], biases: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, Tensor]:
    """The output, contiguous, and the log-sum-exp of every row of logits, `[B, H, T]` fp32.

    `biases` are of each segment, contiguous `[H, n, n]`; with them every segment is a launch.
    """
    B, T, H, d = q.shape
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1
    out = torch.empty(B, T, H, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    for (start, length, count), bias in launches(segments, biases) if B * H else ():
        sizes = forward_tile(length, d)
        _forward_kernel[(B * count * H * triton.cdiv(length, sizes["ROWS"]),)](
            q, k, v, out, lse, bias, T, H, start, length, count,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], d**-0.5, **sizes,
        )  # fmt: skip
    return out, lse


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Sequence[int],
    needs: tuple[bool, bool, bool], biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous; one that is not needed comes back with no samples."""
    B, T, H, d = q.shape
    need_q, need_k, need_v = needs
    dq, dk, dv = (torch.empty(B if need else 0, T, H, d, dtype=q.dtype, device=q.device) for need in needs)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    strides = (x for tensor in (dout, q, k, v) for x in tensor.stride()[:3])
    settings = *strides, d**-0.5
    delta = torch.empty_like(lse if max(segments, default=0) > 64 else lse[:0])
    for (start, length, count), bias in launches(segments, biases) if B * H else ():
        place, sizes = (T, H, start, length, count), _sizes(length, d)
        heads = B * count * H
        if length <= 64:
            _backward_tile_kernel[(heads,)](
                dout, q, k, v, lse, dq, dk, dv, bias, *place, *settings,
                NEED_Q=need_q, NEED_K=need_k, NEED_V=need_v, **sizes,
            )  # fmt: skip
            continue
        grid, sizes = (heads * triton.cdiv(length, 64),), {**sizes, "WIDTH": 32, "num_stages": 2}
        if need_q or need_k:
            _backward_queries_kernel[grid](
                dout, q, k, v, out, lse, delta, dq, bias, *place, *settings, NEED_Q=need_q, **sizes
            )
        if need_k or need_v:
            _backward_keys_kernel[grid](
                dout, q, k, v, lse, delta, dk, dv, bias, *place, *settings,
                NEED_K=need_k, NEED_V=need_v, **sizes,
            )  # fmt: skip
    return dq, dk, dv


def launch_backward_bias(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Sequence[int],
    biases: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """The gradient of each bias, `[H, n, n]` in its dtype: the sum over the samples in their order."""
    B, T, H, d = q.shape
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    strides = [x for tensor in (dout, q, k, v) for x in tensor.stride()[:3]]
    grads: list[Tensor | None] = []
    for (start, length, _), bias in launches(segments, biases):
        if bias is None:
            grads.append(None)
            continue
        grads.append(dbias := torch.empty_like(bias))
        side = min(32, max(16, triton.next_power_of_2(length)))  # larger tiles spill on sm_80 and sm_100
        sizes = _sizes(length, d) | {"ROWS": side, "WIDTH": side, "num_warps": 4}
        tiles = triton.cdiv(length, sizes["ROWS"]) * triton.cdiv(length, sizes["WIDTH"])
        _backward_bias_kernel[(H * tiles,)](
            dout, q, k, v, out, lse, bias, dbias, B, T, H, start, length, *strides, d**-0.5, **sizes
        )
    return grads
