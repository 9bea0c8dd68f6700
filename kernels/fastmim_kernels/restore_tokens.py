"""The decoder's input in one pass: tokens back in their places, mask tokens elsewhere, positions added.

    out[b, n]  = (tokens[source[b, n]] if source[b, n] >= 0 else mask_token) + pos[n]
    dtokens[r] = dout[b, n] where source[b, n] = r; zero for a row that nobody asked for
    dmask      = sum of dout[b, n] over source[b, n] < 0        dpos[n] = sum over b of dout[b, n]

Source  un-shuffling of MAE's decoder (He et al., arXiv:2111.06377). The rows may come from anywhere in
        `tokens`: two views of an image packed into one encoder pass are restored by one call.
Shapes  R = encoded tokens, B = sequences to restore, N = tokens of each, D = width.
Dtypes  tokens, mask_token and pos bf16, fp16 or fp32; source int64, -1 for the mask token; arithmetic and
        sums fp32; out in tokens' dtype; gradients in their input's dtype.
Bytes   B * N * (s * D + 8) + s * D * (tokens asked for) forward; the same and partial sums backward:
        pos is read once per tile of samples. Memory bound.
Limits  last dim contiguous. Each row of tokens is asked for at most once: the backward writes, it does not
        add. Range and uniqueness are checked on the CPU, on CUDA in debug mode. CUDA runs Triton, CPU csrc/
        or the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels import native
from fastmim_kernels.debug import debugging
from fastmim_kernels.once import differentiable_once

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPLIT = 64  # samples summed by one program of the backward, at most; their order depends on B alone


# --- reference: the definition, and the oracle of the tests -------------------------------------


def restore_tokens_reference(tokens_RD: Tensor, source_BN: Tensor, mask_D: Tensor, pos_ND: Tensor) -> Tensor:
    """The op in plain PyTorch, in the dtype of its inputs. `[R, D], [B, N], [D], [N, D] -> [B, N, D]`."""
    table = torch.cat([tokens_RD, mask_D[None]])
    return table[source_BN] + pos_ND  # row -1 is the last one: the mask token


# --- Triton: one program per tile of samples at one position -----------------------------------------


@triton.jit
def _forward_kernel(
    tokens_ptr, source_ptr, mask_ptr, pos_ptr, out_ptr, B, N, token_stride, pos_stride,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < D
    source = tl.load(source_ptr + b * N + n, mask=b < B, other=-1)
    at = source[:, None] * token_stride + cols[None, :]
    token = tl.load(tokens_ptr + at, mask=(source >= 0)[:, None] & inside[None, :], other=0.0)
    mask_token = tl.load(mask_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    pos = tl.load(pos_ptr + n * pos_stride + cols, mask=inside, other=0.0).to(tl.float32)
    x = tl.where((source >= 0)[:, None], token.to(tl.float32), mask_token[None, :]) + pos[None, :]
    out = out_ptr + (b * N + n)[:, None] * D + cols[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=(b < B)[:, None] & inside[None, :])


@triton.jit
def _backward_kernel(
    dout_ptr, source_ptr, dtokens_ptr, mask_sum_ptr, pos_sum_ptr, B, N,
    NEED_TOKENS: tl.constexpr, NEED_MASK: tl.constexpr, NEED_POS: tl.constexpr,
    D: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # one position and SPLIT samples: token gradients go home, the sums of this share are left for stage two
    n = tl.program_id(0).to(tl.int64)
    share = tl.program_id(2).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < D
    mask_sum = tl.zeros([ROWS, COLS], tl.float32)
    pos_sum = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, SPLIT, ROWS):
        b = share * SPLIT + start + tl.arange(0, ROWS)
        source = tl.load(source_ptr + b * N + n, mask=b < B, other=-1)
        exist = (b < B)[:, None] & inside[None, :]
        if not NEED_TOKENS and not NEED_POS:
            exist = exist & (source < 0)[:, None]  # nothing else is asked for: read nothing else
        g = tl.load(dout_ptr + (b * N + n)[:, None] * D + cols[None, :], mask=exist, other=0.0)
        if NEED_TOKENS:
            home = dtokens_ptr + source[:, None] * D + cols[None, :]
            tl.store(home, g, mask=(source >= 0)[:, None] & inside[None, :])
        if NEED_MASK:
            mask_sum += tl.where((source < 0)[:, None], g.to(tl.float32), 0.0)
        if NEED_POS:
            pos_sum += g.to(tl.float32)
    at = (share * N + n) * D + cols
    if NEED_MASK:
        tl.store(mask_sum_ptr + at, tl.sum(mask_sum, axis=0), mask=inside)
    if NEED_POS:
        tl.store(pos_sum_ptr + at, tl.sum(pos_sum, axis=0), mask=inside)


def _tile(D: int, values: int) -> dict[str, int]:
    cols = min(512, triton.next_power_of_2(D))
    return {"ROWS": min(SPLIT, values // cols), "COLS": cols}


def launch_forward(tokens: Tensor, source: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    (B, N), D = source.shape, tokens.shape[1]
    out = torch.empty(B, N, D, dtype=tokens.dtype, device=tokens.device)
    tile = _tile(D, 4096)  # 8 kB of bf16 in flight per program
    grid = (N, triton.cdiv(D, tile["COLS"]), triton.cdiv(B, tile["ROWS"]))
    _forward_kernel[grid](
        tokens, source.contiguous(), mask_token, pos, out, B, N, tokens.stride(0), pos.stride(0), D=D, **tile
    )
    return out


def launch_backward(
    dout: Tensor, source: Tensor, num_tokens: int, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens (in dout's dtype), mask token and pos (fp32); empty where not needed."""
    B, N, D = dout.shape
    need_tokens, need_mask, need_pos = needs
    tile = _tile(D, 2048)  # half of the forward's: the two sums live in registers
    split = min(SPLIT, max(tile["ROWS"], triton.next_power_of_2(B)))
    shares = triton.cdiv(B, split)
    dtokens = torch.zeros(num_tokens if need_tokens else 0, D, dtype=dout.dtype, device=dout.device)
    mask_sum = torch.empty(shares if need_mask else 0, N, D, dtype=torch.float32, device=dout.device)
    pos_sum = torch.empty(shares if need_pos else 0, N, D, dtype=torch.float32, device=dout.device)
    _backward_kernel[(N, triton.cdiv(D, tile["COLS"]), shares)](
        dout.contiguous(), source.contiguous(), dtokens, mask_sum, pos_sum, B, N,
        NEED_TOKENS=need_tokens, NEED_MASK=need_mask, NEED_POS=need_pos, D=D, SPLIT=split, **tile,
    )  # fmt: skip
    return dtokens, mask_sum.sum((0, 1)), pos_sum.sum(0)


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::restore_tokens", mutates_args=(), device_types="cuda")
def _op(tokens: Tensor, source: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    if debugging():
        _check_source(source, tokens.shape[0])
    return launch_forward(tokens, source, mask_token, pos)


@_op.register_kernel("cpu")
def _(tokens, source, mask_token, pos):
    _check_source(source, tokens.shape[0])
    if native.ready():
        return torch.ops.fastmim.native_restore_tokens(tokens, source, mask_token.float(), pos.float())
    out = restore_tokens_reference(tokens.float(), source, mask_token.float(), pos.float())
    return out.to(tokens.dtype)


@_op.register_fake
def _(tokens, source, mask_token, pos):
    return tokens.new_empty(*source.shape, tokens.shape[1])


@torch.library.custom_op("fastmim::restore_tokens_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dout: Tensor, source: Tensor, num_tokens: int, need_tokens: bool, need_mask: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(dout, source, num_tokens, (need_tokens, need_mask, need_pos))


@_op_backward.register_kernel("cpu")
def _(dout, source, num_tokens, need_tokens, need_mask, need_pos):
    if native.ready():
        needs = need_tokens, need_mask, need_pos
        return torch.ops.fastmim.native_restore_tokens_backward(dout, source, num_tokens, *needs)
    N, D = dout.shape[1:]
    hidden = source < 0
    dtokens = dout.new_zeros(num_tokens if need_tokens else 0, D)
    if need_tokens:
        dtokens[source[~hidden]] = dout[~hidden]
    dmask = dout[hidden].float().sum(0) if need_mask else dout.new_zeros(D, dtype=torch.float32)
    dpos = dout.float().sum(0) if need_pos else dout.new_zeros(N, D, dtype=torch.float32)
    return dtokens, dmask, dpos


@_op_backward.register_fake
def _(dout, source, num_tokens, need_tokens, need_mask, need_pos):
    N, D = dout.shape[1:]
    sums = dout.new_empty(D, dtype=torch.float32), dout.new_empty(N, D, dtype=torch.float32)
    return dout.new_empty(num_tokens if need_tokens else 0, D), *sums


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    tokens, source, mask_token, pos = inputs
    ctx.num_tokens, ctx.dtypes = tokens.shape[0], (tokens.dtype, mask_token.dtype, pos.dtype)
    ctx.save_for_backward(source)


def _backward(ctx, dout: Tensor | None):
    if dout is None:
        return (None,) * 4
    need_tokens, _, need_mask, need_pos = needs = ctx.needs_input_grad
    grads = _op_backward(dout, *ctx.saved_tensors, ctx.num_tokens, need_tokens, need_mask, need_pos)
    dtokens, dmask, dpos = (
        grad.to(dtype) if need else None
        for grad, dtype, need in zip(grads, ctx.dtypes, (needs[0], *needs[2:]), strict=True)
    )
    return dtokens, None, dmask, dpos


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- public function -------------------------------------------------------------------------------


def _check_source(source_BN: Tensor, num_tokens: int) -> None:
    """Reads the values: CUDA has to wait."""
    used = source_BN[source_BN != -1]
    if used.numel() and not 0 <= used.min() <= used.max() < num_tokens:
        raise ValueError(f"want sources in [-1, {num_tokens}), got {source_BN.min()} .. {source_BN.max()}")
    times = used.bincount()
    if used.numel() and times.max() > 1:
        raise ValueError(
            f"want each token at most once, got row {times.argmax()} asked for {times.max()} times"
        )


def restore_tokens(tokens_RD: Tensor, source_BN: Tensor, mask_token_D: Tensor, pos_ND: Tensor) -> Tensor:
    """Tokens and mask tokens in their places, plus positions. `[R, D], [B, N], [D], [N, D] -> [B, N, D]`.

    Differentiable in tokens, mask token and pos. `source` is the row of `tokens`, or -1 for the mask token;
    no row twice. ValueError when shapes, dtypes or strides do not fit, and on the CPU for a bad source.
    """
    if tokens_RD.ndim != 2 or source_BN.ndim != 2 or source_BN.dtype != torch.int64:
        raise ValueError(
            f"want tokens [R, D] and source int64 [B, N], got {tuple(tokens_RD.shape)} and "
            f"{source_BN.dtype} {tuple(source_BN.shape)}"
        )
    D, N = tokens_RD.shape[1], source_BN.shape[1]
    if mask_token_D.shape != (D,) or pos_ND.shape != (N, D):
        raise ValueError(
            f"want mask token {(D,)} and pos {(N, D)}, got {tuple(mask_token_D.shape)}, {tuple(pos_ND.shape)}"
        )
    floats = tokens_RD, mask_token_D, pos_ND
    if any(x.dtype not in FLOATS for x in floats):
        raise ValueError(f"want fp32, bf16 or fp16, got {[x.dtype for x in floats]}")
    if any(x.device != source_BN.device for x in floats):
        raise ValueError(f"want one device, got {[x.device for x in (*floats, source_BN)]}")
    if any(x.stride(-1) != 1 for x in floats):
        raise ValueError("the last dim must be contiguous")
    return _op(tokens_RD, source_BN, mask_token_D, pos_ND)
