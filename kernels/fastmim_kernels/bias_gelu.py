"""Bias and exact GELU between the two products of an MLP: one pass, and only x is kept for the backward.

    u   = x + bias
    y   = u * Phi(u)                             Phi(u) = (1 + erf(u / sqrt(2))) / 2
    dx  = dy * (Phi(u) + u * phi(u))             phi(u) = exp(-u^2 / 2) / sqrt(2 pi)
    dbias = sum over rows of dx

Source  GELU: Hendrycks & Gimpel, arXiv:1606.08415, the erf form and not its tanh approximation.
Shapes  M = tokens in the batch, D = hidden width of the MLP.
Dtypes  x and bias bf16, fp16 or fp32; arithmetic and sums fp32; y in x's dtype; gradients in their input's.
Bytes   2 * M * D * s forward; backward 3 * M * D * s and partial sums of dbias. Memory bound.
Limits  last dim contiguous; [M, D] with any row stride, more dims contiguous. CUDA runs Triton, CPU runs the
        reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels.once import differentiable_once

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHARE = 64  # rows summed by one program of the backward, at most; their order depends on M and D alone


# --- reference: the definition, and the oracle of the tests -------------------------------------


def bias_gelu_reference(x_MD: Tensor, bias_D: Tensor) -> Tensor:
    """The op in plain PyTorch, in the dtype of its inputs. `[..., D], [D] -> [..., D]`."""
    return torch.nn.functional.gelu(x_MD + bias_D)


# --- Triton: one program per tile ------------------------------------------------------------------


@triton.jit
def _biased(x_ptr, bias_ptr, rows, cols, M, x_stride, D: tl.constexpr):
    """`x + bias` of the tile, [rows, cols] fp32, and which exist. Forward and backward share it."""
    exist = (rows < M)[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=exist, other=0.0)
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0)
    return x.to(tl.float32) + bias.to(tl.float32)[None, :], exist


@triton.jit
def _forward_kernel(
    x_ptr, bias_ptr, out_ptr, M, x_stride, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    CHUNKS: tl.constexpr = (D + COLS - 1) // COLS  # programs side by side take the columns of the same rows
    rows = (tl.program_id(0) // CHUNKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % CHUNKS * COLS + tl.arange(0, COLS)
    u, exist = _biased(x_ptr, bias_ptr, rows, cols, M, x_stride, D)
    y = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    tl.store(out_ptr + rows[:, None] * D + cols[None, :], y.to(out_ptr.dtype.element_ty), mask=exist)


@triton.jit
def _backward_kernel(
    dout_ptr, x_ptr, bias_ptr, dx_ptr, bias_sum_ptr, M, x_stride,
    NEED_X: tl.constexpr, NEED_BIAS: tl.constexpr,
    D: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # SHARE rows: their gradients are written, the sum over them is left for stage two
    CHUNKS: tl.constexpr = (D + COLS - 1) // COLS
    share = (tl.program_id(0) // CHUNKS).to(tl.int64)
    cols = tl.program_id(0) % CHUNKS * COLS + tl.arange(0, COLS)
    bias_sum = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, SHARE, ROWS):
        rows = share * SHARE + start + tl.arange(0, ROWS)
        u, exist = _biased(x_ptr, bias_ptr, rows, cols, M, x_stride, D)
        at = rows[:, None] * D + cols[None, :]
        dout = tl.load(dout_ptr + at, mask=exist, other=0.0).to(tl.float32)
        slope = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
        dx = dout * slope
        if NEED_X:
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=exist)
        if NEED_BIAS:
            bias_sum += dx
    if NEED_BIAS:
        tl.store(bias_sum_ptr + share * D + cols, tl.sum(bias_sum, axis=0), mask=cols < D)


def _tile(D: int, values: int) -> dict[str, int]:
    cols = min(512, triton.next_power_of_2(D))
    return {"ROWS": values // cols, "COLS": cols}


def launch_forward(x: Tensor, bias: Tensor) -> Tensor:
    M, D = x.shape
    out = torch.empty(M, D, dtype=x.dtype, device=x.device)
    tile = _tile(D, 2048)
    grid = (triton.cdiv(M, tile["ROWS"]) * triton.cdiv(D, tile["COLS"]),)
    _forward_kernel[grid](x, bias, out, M, x.stride(0), D=D, **tile)
    return out


def launch_backward(dout: Tensor, x: Tensor, bias: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Gradients of x (in its dtype) and of bias (fp32); one that is not needed is empty or zero."""
    (M, D), (need_x, need_bias) = x.shape, needs
    tile = _tile(D, 2048)
    share = max(tile["ROWS"], min(SHARE, triton.next_power_of_2(triton.cdiv(M, 128))))
    shares = triton.cdiv(M, share)
    dx = torch.empty(M if need_x else 0, D, dtype=x.dtype, device=x.device)
    bias_sum = torch.empty(shares if need_bias else 0, D, dtype=torch.float32, device=x.device)
    _backward_kernel[(shares * triton.cdiv(D, tile["COLS"]),)](
        dout.contiguous(), x, bias, dx, bias_sum, M, x.stride(0),
        NEED_X=need_x, NEED_BIAS=need_bias, D=D, SHARE=share, **tile,
    )  # fmt: skip
    return dx, bias_sum.sum(0)


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::bias_gelu", mutates_args=(), device_types="cuda")
def _op(x: Tensor, bias: Tensor) -> Tensor:
    return launch_forward(x, bias)


@_op.register_kernel("cpu")
def _(x, bias):
    return bias_gelu_reference(x.float(), bias.float()).to(x.dtype).contiguous()


@_op.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("fastmim::bias_gelu_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dout: Tensor, x: Tensor, bias: Tensor, need_x: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    return launch_backward(dout, x, bias, (need_x, need_bias))


@_op_backward.register_kernel("cpu")
def _(dout, x, bias, need_x, need_bias):
    dx = torch.ops.aten.gelu_backward(dout.float(), x.float() + bias.float())
    dbias = dx.sum(0) if need_bias else dx.new_zeros(x.shape[1])
    return dx.to(x.dtype).contiguous() if need_x else x.new_empty(0, x.shape[1]), dbias


@_op_backward.register_fake
def _(dout, x, bias, need_x, need_bias):
    M, D = x.shape
    return x.new_empty(M if need_x else 0, D), x.new_empty(D, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout: Tensor | None):
    if dout is None:
        return None, None
    x, bias = ctx.saved_tensors
    need_x, need_bias = ctx.needs_input_grad
    dx, dbias = _op_backward(dout, x, bias, need_x, need_bias)
    return dx if need_x else None, dbias.to(bias.dtype) if need_bias else None


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- public function -------------------------------------------------------------------------------


def bias_gelu(x: Tensor, bias_D: Tensor) -> Tensor:
    """`gelu(x + bias)`, exact. `[..., D], [D] -> [..., D]`. Differentiable in both.

    ValueError when shapes, dtypes, devices or strides do not fit.
    """
    if x.ndim < 2 or bias_D.shape != x.shape[-1:]:
        raise ValueError(f"want x [..., D] and bias [D], got {tuple(x.shape)} and {tuple(bias_D.shape)}")
    if x.dtype not in FLOATS or bias_D.dtype not in FLOATS:
        raise ValueError(f"want fp32, bf16 or fp16, got {x.dtype}, {bias_D.dtype}")
    if x.device != bias_D.device:
        raise ValueError(f"want one device, got {x.device} and {bias_D.device}")
    if x.stride(-1) != 1 or bias_D.stride(0) != 1 or (x.ndim > 2 and not x.is_contiguous()):
        raise ValueError("the last dim must be contiguous, and all of them when there are more than two")
    return _op(x.flatten(0, -2), bias_D).view(x.shape)
