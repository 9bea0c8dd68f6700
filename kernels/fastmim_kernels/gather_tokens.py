"""The encoder's input in one pass: the visible tokens, their positions added, the class token in front.

    out[b, k]      = tokens[b, index[b, k]] + pos[index[b, k]]
    dtokens[b, n]  = dout[b, k] where index[b, k] = n; zero for a token that is not visible
    dpos[n]        = sum of dout[b, k] over all b, k with index[b, k] = n

With a class token, which comes with its position already added, out[b, 0] = cls and all rows above move one
down; dcls = sum over b of dout[b, 0].

Source  MAE's encoder drops hidden patches after the patch embedding: He et al., arXiv:2111.06377.
Shapes  B = samples, N = tokens of each, K = visible ones, D = width; T = K, or K + 1 with the class token.
Dtypes  tokens, pos and cls bf16, fp16 or fp32; index int64; arithmetic and sums fp32; out in tokens' dtype;
        gradients in their input's dtype.
Bytes   B * K * (2 * s * D + 8) forward, backward B * s * D * (K + N) and partial sums; pos is read from
        cache. Memory bound.
Limits  last dim contiguous, other strides free. No index twice in one sample: the backward writes, it does
        not add. Range and uniqueness are checked on the CPU, on CUDA in debug mode. CUDA runs Triton, CPU
        runs the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels.debug import debugging
from fastmim_kernels.once import differentiable_once

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPLIT = 64  # samples summed by one program of the backward, at most; their order depends on B alone


# --- reference: the definition, and the oracle of the tests -------------------------------------


def gather_tokens_reference(
    tokens_BND: Tensor, index_BK: Tensor, pos_ND: Tensor | None = None, cls_D: Tensor | None = None
) -> Tensor:
    """The op in plain PyTorch, in the dtype of its inputs. `[B, N, D], [B, K] -> [B, K(+1), D]`."""
    out = tokens_BND.gather(1, index_BK[..., None].expand(-1, -1, tokens_BND.shape[2]))
    if pos_ND is not None:
        out = out + pos_ND[index_BK]
    if cls_D is not None:
        out = torch.cat([cls_D.to(out.dtype).expand(len(out), 1, -1), out], dim=1)
    return out


# --- Triton: forward a tile of output rows, backward a tile of samples at one position ----------------


@triton.jit
def _forward_kernel(
    tokens_ptr, index_ptr, pos_ptr, cls_ptr, out_ptr, num_rows, T, token_stride_b, token_stride_n, pos_stride,
    HEAD: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (D + COLS - 1) // COLS  # programs side by side take the columns of the same rows
    rows = tl.program_id(0) // CHUNKS * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % CHUNKS * COLS + tl.arange(0, COLS)
    inside = cols < D
    b, k = (rows // T).to(tl.int64), (rows % T).to(tl.int64) - HEAD
    seen = (rows < num_rows) & (k >= 0)
    n = tl.load(index_ptr + b * (T - HEAD) + k, mask=seen, other=0)
    exist = seen[:, None] & inside[None, :]
    at = (b * token_stride_b + n * token_stride_n)[:, None] + cols[None, :]
    x = tl.load(tokens_ptr + at, mask=exist, other=0.0).to(tl.float32)
    if pos_ptr is not None:
        pos_at = (n * pos_stride)[:, None] + cols[None, :]
        x += tl.load(pos_ptr + pos_at, mask=exist, other=0.0).to(tl.float32)
    if HEAD:
        head = tl.load(cls_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.where((k < 0)[:, None], head[None, :], x)
    out = out_ptr + rows.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & inside[None, :])


@triton.jit
def _backward_kernel(
    dout_ptr, place_ptr, dtokens_ptr, pos_sum_ptr, B, N, T,
    NEED_TOKENS: tl.constexpr, NEED_POS: tl.constexpr,
    D: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # one position and SPLIT samples: token gradients go home, the sum of this share is left for stage two
    n = tl.program_id(0).to(tl.int64)
    share = tl.program_id(2).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < D
    pos_sum = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, SPLIT, ROWS):
        b = share * SPLIT + start + tl.arange(0, ROWS)
        place = tl.load(place_ptr + b * N + n, mask=b < B, other=-1)
        g = tl.load(
            dout_ptr + (b * T + place)[:, None] * D + cols[None, :],
            mask=(place >= 0)[:, None] & inside[None, :],
            other=0.0,
        )
        if NEED_TOKENS:
            home = dtokens_ptr + (b * N + n)[:, None] * D + cols[None, :]
            tl.store(home, g, mask=(b < B)[:, None] & inside[None, :])  # zero where it is not visible
        if NEED_POS:
            pos_sum += g.to(tl.float32)
    if NEED_POS:
        tl.store(pos_sum_ptr + (share * N + n) * D + cols, tl.sum(pos_sum, axis=0), mask=inside)


def launch_forward(tokens: Tensor, index: Tensor, pos: Tensor | None, cls: Tensor | None) -> Tensor:
    (B, K), D = index.shape, tokens.shape[2]
    T = K + int(cls is not None)
    out = torch.empty(B, T, D, dtype=tokens.dtype, device=tokens.device)
    cols = min(512, triton.next_power_of_2(D))
    rows = 2048 // cols
    _forward_kernel[(triton.cdiv(B * T, rows) * triton.cdiv(D, cols),)](
        tokens, index.contiguous(), pos, cls, out, B * T, T, *tokens.stride()[:2],
        0 if pos is None else pos.stride(0), HEAD=T - K, D=D, ROWS=rows, COLS=cols,
    )  # fmt: skip
    return out


def launch_backward(
    dout: Tensor, index: Tensor, N: int, head: bool, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens (in dout's dtype), pos and cls (fp32); empty or zero where not needed."""
    (B, T, D), (need_tokens, need_pos, need_cls) = dout.shape, needs
    dout = dout.contiguous()
    cols = min(512, triton.next_power_of_2(D))
    rows = min(SPLIT, 1024 // cols)  # half of the forward's: the sum lives in registers
    split = min(SPLIT, max(rows, triton.next_power_of_2(B)))
    shares = triton.cdiv(B, split)
    dtokens = torch.empty(B if need_tokens else 0, N, D, dtype=dout.dtype, device=dout.device)
    pos_sum = torch.empty(shares if need_pos else 0, N, D, dtype=torch.float32, device=dout.device)
    if need_tokens or need_pos:
        row = torch.arange(int(head), T, device=dout.device)
        place = torch.full((B, N), -1, device=dout.device).scatter_(1, index, row.expand(B, -1))
        _backward_kernel[(N, triton.cdiv(D, cols), shares)](
            dout, place, dtokens, pos_sum, B, N, T, NEED_TOKENS=need_tokens, NEED_POS=need_pos,
            D=D, SPLIT=split, ROWS=rows, COLS=cols,
        )  # fmt: skip
    dcls = dout[: B if need_cls else 0, :1].sum((0, 1), dtype=torch.float32)
    return dtokens, pos_sum.sum(0), dcls


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::gather_tokens", mutates_args=(), device_types="cuda")
def _op(tokens: Tensor, index: Tensor, pos: Tensor | None, cls: Tensor | None) -> Tensor:
    if debugging():
        _check_index(index, tokens.shape[1])
    return launch_forward(tokens, index, pos, cls)


@_op.register_kernel("cpu")
def _(tokens, index, pos, cls):
    _check_index(index, tokens.shape[1])
    floats = (None if x is None else x.float() for x in (pos, cls))
    if pos is None:  # nothing is added: copied as it is
        return gather_tokens_reference(tokens, index, *floats).contiguous()
    return gather_tokens_reference(tokens.float(), index, *floats).to(tokens.dtype).contiguous()


@_op.register_fake
def _(tokens, index, pos, cls):
    return tokens.new_empty(len(index), index.shape[1] + int(cls is not None), tokens.shape[2])


@torch.library.custom_op("fastmim::gather_tokens_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dout: Tensor, index: Tensor, N: int, head: bool, need_tokens: bool, need_pos: bool, need_cls: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(dout, index, N, head, (need_tokens, need_pos, need_cls))


@_op_backward.register_kernel("cpu")
def _(dout, index, N, head, need_tokens, need_pos, need_cls):
    B, _, D = dout.shape
    rows = dout[:, int(head) :]
    dtokens = dout.new_zeros(B if need_tokens else 0, N, D)
    dpos = dout.new_zeros(N, D, dtype=torch.float32)
    if need_tokens:
        dtokens.scatter_(1, index[..., None].expand_as(rows), rows)
    if need_pos:
        dpos.index_add_(0, index.flatten(), rows.float().flatten(0, 1))
    return dtokens, dpos, dout[: B if need_cls else 0, :1].sum((0, 1), dtype=torch.float32)


@_op_backward.register_fake
def _(dout, index, N, head, need_tokens, need_pos, need_cls):
    B, _, D = dout.shape
    sums = dout.new_empty(N, D, dtype=torch.float32), dout.new_empty(D, dtype=torch.float32)
    return dout.new_empty(B if need_tokens else 0, N, D), *sums


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    tokens, index, pos, cls = inputs
    ctx.N, ctx.head = tokens.shape[1], cls is not None
    ctx.dtypes = [None if x is None else x.dtype for x in (tokens, pos, cls)]
    ctx.save_for_backward(index)


def _backward(ctx, dout: Tensor | None):
    if dout is None:
        return (None,) * 4
    need_tokens, _, need_pos, need_cls = ctx.needs_input_grad
    needs = need_tokens, need_pos, need_cls
    grads = _op_backward(dout, *ctx.saved_tensors, ctx.N, ctx.head, *needs)
    dtokens, dpos, dcls = (
        grad.to(dtype) if need else None for grad, dtype, need in zip(grads, ctx.dtypes, needs, strict=True)
    )
    return dtokens, None, dpos, dcls


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- public function -------------------------------------------------------------------------------


def _check_index(index_BK: Tensor, N: int) -> None:
    """Reads the values: CUDA has to wait."""
    if index_BK.numel() and not 0 <= index_BK.min() <= index_BK.max() < N:
        raise ValueError(f"want token indices in [0, {N}), got {index_BK.min()} .. {index_BK.max()}")
    ascending = index_BK.sort(dim=1).values
    twice = ascending[:, 1:] == ascending[:, :-1]
    if twice.any():
        b, k = twice.nonzero()[0].tolist()
        raise ValueError(f"want each token at most once in a sample, got {ascending[b, k]} twice in {b}")


def gather_tokens(
    tokens_BND: Tensor, index_BK: Tensor, pos_ND: Tensor | None = None, cls_D: Tensor | None = None
) -> Tensor:
    """Visible tokens plus their positions, cls in front. `[B, N, D], [B, K], [N, D], [D] -> [B, K(+1), D]`.

    Differentiable in tokens, pos and cls; cls comes with its position added. No index twice in a sample.
    ValueError when shapes, dtypes or strides do not fit, and on the CPU for a bad index.
    """
    if tokens_BND.ndim != 3 or index_BK.ndim != 2 or index_BK.dtype != torch.int64:
        raise ValueError(
            f"want tokens [B, N, D] and index int64 [B, K], got {tuple(tokens_BND.shape)} and "
            f"{index_BK.dtype} {tuple(index_BK.shape)}"
        )
    B, N, D = tokens_BND.shape
    if len(index_BK) != B or index_BK.shape[1] > N:
        raise ValueError(f"want index [{B}, K] with K <= {N}, got {tuple(index_BK.shape)}")
    if pos_ND is not None and pos_ND.shape != (N, D):
        raise ValueError(f"want pos {(N, D)}, got {tuple(pos_ND.shape)}")
    if cls_D is not None and cls_D.shape != (D,):
        raise ValueError(f"want cls {(D,)}, got {tuple(cls_D.shape)}")
    floats = [x for x in (tokens_BND, pos_ND, cls_D) if x is not None]
    if any(x.dtype not in FLOATS for x in floats):
        raise ValueError(f"want fp32, bf16 or fp16, got {[x.dtype for x in floats]}")
    if any(x.device != index_BK.device for x in floats):
        raise ValueError(f"want one device, got {[x.device for x in (*floats, index_BK)]}")
    if any(x.stride(-1) != 1 for x in floats):
        raise ValueError("the last dim must be contiguous")
    return _op(tokens_BND, index_BK, pos_ND, cls_D)
