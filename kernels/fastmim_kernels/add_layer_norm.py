"""The step between two branches of a pre-norm block: add to the residual stream, normalize what it became.

    sum    = residual + keep[b] * scale * x
    normed = (sum - mean) * rstd * weight + bias    mean over D; rstd = 1 / sqrt(var + eps), var divided by D
    dsum'  = dsum + rstd * (g - mean(g) - x_hat * mean(g * x_hat))    g = dnormed * weight
    x_hat  = (sum - mean) * rstd
    dresidual = dsum'        dx = keep[b] * scale * dsum'        dscale = sum over rows of keep[b] * x * dsum'
    dweight = sum over rows of dnormed * x_hat                   dbias  = sum over rows of dnormed

Source  LayerNorm: Ba et al., arXiv:1607.06450; scale is LayerScale's gamma, Touvron et al., arXiv:2103.17239;
        keep is stochastic depth's factor of a sample, Huang et al., arXiv:1603.09382: 0 or 1 / P(kept).
Shapes  B = samples, T = tokens of each, D = width.
Dtypes  x, residual, weight, bias and scale bf16, fp16 or fp32; keep fp32; arithmetic, mean and rstd fp32;
        normed in x's dtype, of the sum before it is rounded; sum in residual's; gradients in their input's.
Bytes   B * T * (D * 2 * (s_x + s_residual) + 8) forward; backward reads dnormed, dsum and sum (x too when
        scale learns) and writes dresidual (dx too unless they are equal) and partial sums. Memory bound.
        Rows wider than 4096 whose scale learns are read once more for each kind of sum.
Limits  last dim contiguous, other strides free, 1 <= D <= 8192. keep gets no gradient. CUDA runs Triton,
        CPU runs the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels.norm_pix_loss import FLOATS, MAX_D, row_tile
from fastmim_kernels.once import differentiable_once

SHARES = 1024  # programs of the backward, from which on each sums more rows than it holds at once
SHARE = 64  # rows summed by one program of the backward, at most; their order depends on B * T alone


# --- reference: the definition, and the oracle of the tests -------------------------------------


def add_layer_norm_reference(
    x_BTD: Tensor,
    residual_BTD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float = 1e-6,
    scale_D: Tensor | None = None,
    keep_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, in the dtype of its inputs. `[B, ..., D] x 2 -> normed, sum`."""
    sum_BTD = residual_BTD + branch_reference(x_BTD, scale_D, keep_B)
    return torch.nn.functional.layer_norm(sum_BTD, sum_BTD.shape[-1:], weight_D, bias_D, eps), sum_BTD


def branch_reference(x_BTD: Tensor, scale_D: Tensor | None, keep_B: Tensor | None) -> Tensor:
    """`keep[b] * scale * x`; its transpose has the same form, so gradients are made of it too."""
    x = x_BTD if scale_D is None else x_BTD * scale_D
    return x if keep_B is None else x * keep_B.view(-1, *[1] * (x.ndim - 1))


# --- Triton: a few rows per program ----------------------------------------------------------------


@triton.jit
def _factor(scale_ptr, keep_ptr, rows, cols, num_rows, T, D: tl.constexpr):
    """`keep[b] * scale` of rows and cols, fp32, as far as they are given: broadcasts to [rows, cols]."""
    factor = tl.full([1, 1], 1.0, tl.float32)
    if scale_ptr is not None:
        factor = factor * tl.load(scale_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if keep_ptr is not None:
        factor = factor * tl.load(keep_ptr + rows // T, mask=rows < num_rows, other=0.0)[:, None]
    return factor


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, keep_ptr, normed_ptr, sum_ptr, mean_ptr, rstd_ptr,
    num_rows, T, x_stride_b, x_stride_t, residual_stride_b, residual_stride_t, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    exist = (rows < num_rows)[:, None] & inside[None, :]
    b, t = (rows // T).to(tl.int64), (rows % T).to(tl.int64)
    x_at = (b * x_stride_b + t * x_stride_t)[:, None] + cols[None, :]
    residual_at = (b * residual_stride_b + t * residual_stride_t)[:, None] + cols[None, :]
    x = tl.load(x_ptr + x_at, mask=exist, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + residual_at, mask=exist, other=0.0).to(tl.float32)
    total = residual + _factor(scale_ptr, keep_ptr, rows, cols, num_rows, T, D) * x
    mean = tl.sum(total, axis=1) / D
    centered = tl.where(exist, total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / D + eps)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    normed = centered * rstd[:, None] * weight[None, :] + bias[None, :]
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]  # passes 2**31 at 2.8M tokens of width 768
    tl.store(sum_ptr + at, total.to(sum_ptr.dtype.element_ty), mask=exist)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=exist)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def _backward_kernel(
    dnormed_ptr, dsum_ptr, sum_ptr, mean_ptr, rstd_ptr, weight_ptr, x_ptr, scale_ptr, keep_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, dscale_ptr, num_rows, T, x_stride_b, x_stride_t,
    WRITE_X: tl.constexpr, WRITE_RESIDUAL: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    D: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # SHARE rows: their gradients are written, the sums over them are left for stage two
    share = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    weight_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    scale_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, SHARE, ROWS):
        rows = share * SHARE + start + tl.arange(0, ROWS)
        exist = (rows < num_rows)[:, None] & inside[None, :]
        at = rows.to(tl.int64)[:, None] * D + cols[None, :]
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        total = tl.load(sum_ptr + at, mask=exist, other=0.0).to(tl.float32)
        x_hat = tl.where(exist, total - mean, 0.0) * rstd
        dnormed = tl.load(dnormed_ptr + at, mask=exist, other=0.0).to(tl.float32)
        if NEED_WEIGHT:
            weight_sum += dnormed * x_hat
        if NEED_BIAS:
            bias_sum += dnormed
        if WRITE_X or WRITE_RESIDUAL or NEED_SCALE:
            g = dnormed * tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
            g_mean = tl.sum(g, axis=1)[:, None] / D
            slope = tl.sum(g * x_hat, axis=1)[:, None] / D
            dsum = tl.load(dsum_ptr + at, mask=exist, other=0.0).to(tl.float32)
            dsum += rstd * (g - g_mean - x_hat * slope)
            if WRITE_RESIDUAL:
                tl.store(dresidual_ptr + at, dsum.to(dresidual_ptr.dtype.element_ty), mask=exist)
            if WRITE_X:
                dx = _factor(scale_ptr, keep_ptr, rows, cols, num_rows, T, D) * dsum
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=exist)
            if NEED_SCALE:
                row = (rows // T).to(tl.int64) * x_stride_b + (rows % T).to(tl.int64) * x_stride_t
                x = tl.load(x_ptr + row[:, None] + cols[None, :], mask=exist, other=0.0).to(tl.float32)
                scale_sum += _factor(None, keep_ptr, rows, cols, num_rows, T, D) * x * dsum
    at = share.to(tl.int64) * D + cols
    if NEED_WEIGHT:
        tl.store(dweight_ptr + at, tl.sum(weight_sum, axis=0), mask=inside)
    if NEED_BIAS:
        tl.store(dbias_ptr + at, tl.sum(bias_sum, axis=0), mask=inside)
    if NEED_SCALE:
        tl.store(dscale_ptr + at, tl.sum(scale_sum, axis=0), mask=inside)


def launch_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    keep: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """normed, sum, and the mean and rstd of each row for the backward."""
    B, T, D = x.shape
    normed = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    total = torch.empty(B, T, D, dtype=residual.dtype, device=x.device)
    mean, rstd = (torch.empty(B * T, dtype=torch.float32, device=x.device) for _ in range(2))
    tile, strides = row_tile(D), (*x.stride()[:2], *residual.stride()[:2])
    _forward_kernel[(triton.cdiv(B * T, tile["ROWS"]),)](
        x,
        residual,
        weight,
        bias,
        scale,
        keep,
        normed,
        total,
        mean,
        rstd,
        B * T,
        T,
        *strides,
        eps,
        D=D,
        **tile,
    )
    return normed, total, mean, rstd


def launch_backward(
    dnormed: Tensor,
    dsum: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    x_dtype: torch.dtype,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight, bias and scale (the last three fp32); empty where not needed."""
    B, T, D = total.shape
    block = triton.next_power_of_2(D)
    rows = max(1, 1024 // block)  # half of the forward's: the sums live in registers
    share = max(rows, min(SHARE, triton.next_power_of_2(triton.cdiv(B * T, SHARES))))
    shares = triton.cdiv(B * T, share)

    def new(need: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape if need else (0, *shape[1:]), dtype=dtype, device=total.device)

    dx = new(needs[0], B, T, D, dtype=x_dtype)
    dresidual = new(needs[1], B, T, D, dtype=total.dtype)
    partial = [new(need, shares, D) for need in needs[2:]]
    strides = (0, 0) if x is None else x.stride()[:2]
    passes = [needs]
    if block > 4096 and needs[4]:  # three sums of 8192 values and the row do not fit in registers
        passes = [(*needs[:2], *(False,) * 3), (False, False, *needs[2:4], False), (*(False,) * 4, True)]
    for write_x, write_residual, need_weight, need_bias, need_scale in passes:
        _backward_kernel[(shares,)](
            dnormed.contiguous(), dsum.contiguous(), total, mean, rstd, weight, x, scale, keep,
            dx, dresidual, *partial, B * T, T, *strides,
            WRITE_X=write_x, WRITE_RESIDUAL=write_residual, NEED_WEIGHT=need_weight, NEED_BIAS=need_bias,
            NEED_SCALE=need_scale, D=D, SHARE=share, ROWS=rows, BLOCK_D=block, num_warps=max(4, block // 512),
        )  # fmt: skip
    dweight, dbias, dscale = (part.sum(0) for part in partial)
    return dx, dresidual, dweight, dbias, dscale


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::add_layer_norm", mutates_args=(), device_types="cuda")
def _op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    keep: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(x, residual, weight, bias, scale, keep, eps)


@_op.register_kernel("cpu")
def _(x, residual, weight, bias, scale, keep, eps):
    floats = (None if p is None else p.float() for p in (x, residual, weight, bias, scale, keep))
    x32, residual32, weight32, bias32, scale32, keep32 = floats
    assert x32 is not None and residual32 is not None
    total = residual32 + branch_reference(x32, scale32, keep32)
    normed, mean, rstd = torch.native_layer_norm(total, total.shape[-1:], weight32, bias32, eps)
    outputs = normed.to(x.dtype), total.to(residual.dtype).contiguous()
    return *outputs, mean.flatten(), rstd.flatten()


@_op.register_fake
def _(x, residual, weight, bias, scale, keep, eps):
    B, T, D = x.shape
    rows = [x.new_empty(B * T, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(B, T, D), residual.new_empty(B, T, D), *rows


@torch.library.custom_op("fastmim::add_layer_norm_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dnormed: Tensor,
    dsum: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    x_dtype: torch.dtype,
    need_x: bool,
    need_residual: bool,
    need_weight: bool,
    need_bias: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = need_x, need_residual, need_weight, need_bias, need_scale
    return launch_backward(dnormed, dsum, total, mean, rstd, weight, x, scale, keep, x_dtype, needs)


@_op_backward.register_kernel("cpu")
def _(dnormed, dsum, total, mean, rstd, weight, x, scale, keep, x_dtype, *needs):
    (B, T, D), shape = total.shape, total.shape[-1:]
    need_x, need_residual, need_weight, need_bias, need_scale = needs
    row_stats = mean.view(B, T, 1), rstd.view(B, T, 1)
    weight32, dnormed32 = weight.float(), dnormed.float()
    dbranch, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormed32, total.float(), shape, *row_stats, weight32, weight32, [True, need_weight, need_bias]
    )
    dtotal = dbranch + dsum.float()
    scale32 = None if scale is None else scale.float()
    return (
        branch_reference(dtotal, scale32, keep).to(x_dtype, copy=True)
        if need_x
        else total.new_empty(0, T, D, dtype=x_dtype),
        dtotal.to(total.dtype) if need_residual else total.new_empty(0, T, D),
        dweight if need_weight else mean.new_zeros(D),
        dbias if need_bias else mean.new_zeros(D),
        (branch_reference(x.float(), None, keep) * dtotal).sum((0, 1)) if need_scale else mean.new_zeros(D),
    )


@_op_backward.register_fake
def _(dnormed, dsum, total, mean, rstd, weight, x, scale, keep, x_dtype, *needs):
    B, T, D = total.shape
    dx = total.new_empty(B if needs[0] else 0, T, D, dtype=x_dtype)
    return dx, total.new_empty(B if needs[1] else 0, T, D), *(mean.new_empty(D) for _ in range(3))


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # four outputs, of which autograd would fill those without gradient
    x, residual, weight, bias, scale, keep, _ = inputs
    _, total, mean, rstd = output
    ctx.x_dtype, ctx.vector_dtypes = (
        x.dtype,
        (weight.dtype, bias.dtype, None if scale is None else scale.dtype),
    )
    ctx.dx_is_dresidual = scale is None and keep is None and x.dtype == residual.dtype
    x = x if ctx.needs_input_grad[4] else None  # only dscale reads it
    ctx.save_for_backward(total, mean, rstd, weight, x, scale, keep)


def _backward(ctx, dnormed: Tensor | None, dsum: Tensor | None, *_):
    if dnormed is None and dsum is None:
        return (None,) * 7
    dnormed, dsum = (torch.zeros_like(ctx.saved_tensors[0]) if d is None else d for d in (dnormed, dsum))
    need_x, need_residual, *need_vectors = ctx.needs_input_grad[:5]
    needs = need_x, need_residual
    if ctx.dx_is_dresidual:  # one tensor is written and serves both
        needs = False, need_x or need_residual
    dx, dresidual, *sums = _op_backward(dnormed, dsum, *ctx.saved_tensors, ctx.x_dtype, *needs, *need_vectors)
    if ctx.dx_is_dresidual:
        dx = dresidual
    dvectors = (
        grad.to(dtype) if need else None
        for grad, dtype, need in zip(sums, ctx.vector_dtypes, need_vectors, strict=True)
    )
    return dx if need_x else None, dresidual if need_residual else None, *dvectors, None, None


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- public function -------------------------------------------------------------------------------


def add_layer_norm(
    x_BTD: Tensor,
    residual_BTD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`residual + keep * scale * x`, normalized, and as it is. `[B, T, D] x 2 -> normed, sum`; or `[M, D]`.

    `scale` `[D]` is LayerScale's gamma, `keep` fp32 `[B]` (`[M]`) the factor of each sample, already divided
    by the probability to be kept. Differentiable in all but `keep`; ValueError when `keep` requires a
    gradient, or when shapes, dtypes or strides do not fit.
    """
    if x_BTD.ndim not in (2, 3) or x_BTD.shape != residual_BTD.shape:
        raise ValueError(
            f"want two [B, T, D] or [M, D], got {tuple(x_BTD.shape)}, {tuple(residual_BTD.shape)}"
        )
    D = x_BTD.shape[-1]
    if not 1 <= D <= MAX_D:
        raise ValueError(f"want 1 <= D <= {MAX_D}, got D = {D}")
    vectors = [weight_D, bias_D] if scale is None else [weight_D, bias_D, scale]
    if any(v.shape != (D,) for v in vectors):
        raise ValueError(f"want weight, bias and scale {(D,)}, got {[tuple(v.shape) for v in vectors]}")
    floats = [x_BTD, residual_BTD, *vectors]
    if any(x.dtype not in FLOATS for x in floats):
        raise ValueError(f"want fp32, bf16 or fp16, got {[x.dtype for x in floats]}")
    if any(x.stride(-1) != 1 for x in floats):
        raise ValueError("the last dim must be contiguous")
    if keep is not None:
        if keep.shape != x_BTD.shape[:1] or keep.dtype != torch.float32:
            raise ValueError(f"want keep fp32 {(len(x_BTD),)}, got {keep.dtype} {tuple(keep.shape)}")
        if keep.requires_grad and torch.is_grad_enabled():
            raise ValueError("keep gets no gradient: detach it")
        keep = keep.contiguous()
    devices = [x.device for x in (*floats, keep) if x is not None]
    if any(device != x_BTD.device for device in devices):
        raise ValueError(f"want one device, got {devices}")
    rows = (x_BTD, residual_BTD) if x_BTD.ndim == 3 else (x_BTD[:, None], residual_BTD[:, None])
    normed, total, _, _ = _op(*rows, weight_D, bias_D, scale, keep, eps)
    return normed.view(x_BTD.shape), total.view(x_BTD.shape)
