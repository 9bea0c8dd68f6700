"""Per-patch loss on normalized or plain targets in one pass: two rows read, one float per patch written.

    t_hat = (t - mean(t)) / sqrt(var(t) + eps)      over D; var is unbiased, divided by D - 1
          = t                                       with normalize=False
    r     = p - t_hat
    loss  = mean over D of f(r)                     f = r^2 or |r|, or Huber's: r^2 / (2 beta) where
    dp    = dloss / D * f'(r)                       |r| < beta, |r| - beta / 2 elsewhere
    dt    = -dp                                     with normalize=False, else none

Source  He et al., arXiv:2111.06377, "normalized pixels"; eps and the unbiased variance are those
        of facebookresearch/mae, models_mae.py, forward_loss. The plain form is also the distance of
        two reconstructions, of which both learn (Kong & Zhang, arXiv:2208.04164). The absolute value is
        SimMIM's (arXiv:2111.09886), smooth L1 data2vec's, on features (arXiv:2202.03555).
Shapes  M = scored patches in the batch, D = values per patch (16 * 16 * 3 = 768).
Dtypes  pred and target bf16, fp16 or fp32; arithmetic and loss fp32; gradients in their input's dtype.
Bytes   forward M * D * (s_pred + s_target) + 4 * M; backward reads that and writes each gradient asked
        for. Memory bound.
Limits  last dim contiguous, 2 <= D <= 8192. CUDA runs Triton, CPU runs csrc/ or the reference.
        A target that is an image patch needs no row: norm_pix_loss_image.py.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels import native
from fastmim_kernels.once import differentiable_once

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_D = 8192
Distance = Literal["l2", "l1", "smooth_l1"]
DISTANCES: tuple[Distance, ...] = ("l2", "l1", "smooth_l1")  # the kernels know them by number


# --- reference: the definition, and the oracle of the tests -------------------------------------


def norm_pix_loss_reference(
    pred_MD: Tensor,
    target_MD: Tensor,
    normalize: bool = True,
    eps: float = 1e-6,
    distance: Distance = "l2",
    beta: float = 1.0,
) -> Tensor:
    """The op in plain PyTorch, in the dtype of its inputs. `[..., D] x [..., D] -> [...]`."""
    r = residual_reference(pred_MD, target_MD, normalize, eps)
    if distance == "l2":
        return r.square().mean(dim=-1)
    far = r.abs()
    if distance == "smooth_l1":
        far = torch.where(far < beta, r.square() / (2 * beta), far - beta / 2)
    return far.mean(dim=-1)


def residual_reference(pred_MD: Tensor, target_MD: Tensor, normalize: bool, eps: float) -> Tensor:
    """`p - t_hat`, of which loss and gradients are made."""
    if not normalize:
        return pred_MD - target_MD
    var_M1, mean_M1 = torch.var_mean(target_MD, dim=-1, keepdim=True)
    return pred_MD - (target_MD - mean_M1) * torch.rsqrt(var_M1 + eps)


def slope_reference(r: Tensor, distance: int, beta: float) -> Tensor:
    """f'(r), of the shape of r."""
    if DISTANCES[distance] == "l2":
        return 2 * r
    return r.sign() if DISTANCES[distance] == "l1" else (r / beta).clamp(-1, 1)


# --- Triton: a few patches per program -------------------------------------------------------------


@triton.jit
def residual(p, t, exist, eps, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """`p - t_hat` of [rows, cols] fp32, zero where no value exists. norm_pix_loss_image shares it."""
    if NORMALIZE:
        centered = tl.where(exist, t - tl.sum(t, axis=1)[:, None] / D, 0.0)
        # The rounding of the mean is found in what it left and taken back: in a flat patch it would be all
        # that remains, and 1 / sqrt(eps) would raise it a thousandfold.
        rest = tl.sum(centered, axis=1) / D
        var = (tl.sum(centered * centered, axis=1) - D * rest * rest) / (D - 1)
        centered = tl.where(exist, centered - rest[:, None], 0.0)
        return p - centered / tl.sqrt(var + eps)[:, None]
    else:
        return p - t


@triton.jit
def far(r, beta, DISTANCE: tl.constexpr):
    """f(r) of norm_pix_loss and norm_pix_loss_image."""
    if DISTANCE == 0:
        return r * r
    elif DISTANCE == 1:
        return tl.abs(r)
    else:
        return tl.where(tl.abs(r) < beta, r * r / (2.0 * beta), tl.abs(r) - beta * 0.5)


@triton.jit
def slope(r, beta, DISTANCE: tl.constexpr):
    """f'(r)."""
    if DISTANCE == 0:
        return r * 2.0
    sign = tl.where(r > 0, 1.0, tl.where(r < 0, -1.0, r))  # r itself: zero, or NaN
    if DISTANCE == 1:
        return sign
    else:
        return tl.where(tl.abs(r) < beta, r / beta, sign)


@triton.jit
def _row_residual(
    pred_ptr, target_ptr, rows, cols, M, pred_stride, target_stride, eps,
    D: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The residual of patches `rows`, [rows, cols] fp32. Forward and backward share it."""
    exist = (rows < M)[:, None] & (cols < D)[None, :]
    p = tl.load(pred_ptr + rows[:, None] * pred_stride + cols[None, :], mask=exist, other=0.0)
    t = tl.load(target_ptr + rows[:, None] * target_stride + cols[None, :], mask=exist, other=0.0)
    return residual(p.to(tl.float32), t.to(tl.float32), exist, eps, D, NORMALIZE)


@triton.jit
def _forward_kernel(
    pred_ptr, target_ptr, loss_ptr, M, pred_stride, target_stride, eps, beta,
    D: tl.constexpr, NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # rows * D passes 2**31 at 2.8M patches
    cols = tl.arange(0, BLOCK_D)
    r = _row_residual(pred_ptr, target_ptr, rows, cols, M, pred_stride, target_stride, eps, D, NORMALIZE)
    # past the end p and t are zero, and so is f
    tl.store(loss_ptr + rows, tl.sum(far(r, beta, DISTANCE), axis=1) / D, mask=rows < M)


@triton.jit
def _backward_kernel(
    dloss_ptr, pred_ptr, target_ptr, dpred_ptr, dtarget_ptr, M, pred_stride, target_stride, eps, beta,
    NEED_PRED: tl.constexpr, NEED_TARGET: tl.constexpr,
    D: tl.constexpr, NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # mean and var are recomputed: the row is read again anyway, so saving them would save nothing
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    r = _row_residual(pred_ptr, target_ptr, rows, cols, M, pred_stride, target_stride, eps, D, NORMALIZE)
    dp = slope(r, beta, DISTANCE) * (tl.load(dloss_ptr + rows, mask=rows < M, other=0.0) / D)[:, None]
    at = rows[:, None] * D + cols[None, :]
    exist = (rows < M)[:, None] & (cols < D)[None, :]
    if NEED_PRED:
        tl.store(dpred_ptr + at, dp.to(dpred_ptr.dtype.element_ty), mask=exist)
    if NEED_TARGET:
        tl.store(dtarget_ptr + at, (-dp).to(dtarget_ptr.dtype.element_ty), mask=exist)


def row_tile(D: int) -> dict[str, int]:
    """Whole rows per program, about 2048 values in all: small patches share a program."""
    block = triton.next_power_of_2(D)
    return {"ROWS": max(1, 2048 // block), "BLOCK_D": block, "num_warps": max(4, block // 512)}


def launch_forward(
    pred: Tensor, target: Tensor, normalize: bool, eps: float, distance: int = 0, beta: float = 1.0
) -> Tensor:
    M, D = pred.shape
    loss = torch.empty(M, dtype=torch.float32, device=pred.device)
    tile, strides = row_tile(D), (pred.stride(0), target.stride(0))
    grid = (triton.cdiv(M, tile["ROWS"]),)
    _forward_kernel[grid](
        pred, target, loss, M, *strides, eps, beta, D=D, NORMALIZE=normalize, DISTANCE=distance, **tile
    )
    return loss


def launch_backward(
    dloss: Tensor,
    pred: Tensor,
    target: Tensor,
    normalize: bool,
    eps: float,
    needs: tuple[bool, bool],
    distance: int = 0,
    beta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gradients of pred and of target; one that is not needed comes back with no rows."""
    M, D = pred.shape
    dpred = torch.empty(M if needs[0] else 0, D, dtype=pred.dtype, device=pred.device)
    dtarget = torch.empty(M if needs[1] else 0, D, dtype=target.dtype, device=pred.device)
    tile, strides = row_tile(D), (pred.stride(0), target.stride(0))
    _backward_kernel[(triton.cdiv(M, tile["ROWS"]),)](
        dloss.contiguous(), pred, target, dpred, dtarget, M, *strides, eps, beta,
        NEED_PRED=needs[0], NEED_TARGET=needs[1], D=D, NORMALIZE=normalize, DISTANCE=distance, **tile,
    )  # fmt: skip
    return dpred, dtarget


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::norm_pix_loss", mutates_args=(), device_types="cuda")
def _op(
    pred: Tensor, target: Tensor, normalize: bool, eps: float, distance: int = 0, beta: float = 1.0
) -> Tensor:
    return launch_forward(pred, target, normalize, eps, distance, beta)


@_op.register_kernel("cpu")
def _(pred, target, normalize, eps, distance=0, beta=1.0):
    if native.ready():
        return torch.ops.fastmim.native_norm_pix_loss(pred, target, normalize, eps, distance, beta)
    return norm_pix_loss_reference(pred.float(), target.float(), normalize, eps, DISTANCES[distance], beta)


@_op.register_fake
def _(pred, target, normalize, eps, distance=0, beta=1.0):
    return pred.new_empty(pred.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastmim::norm_pix_loss_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dloss: Tensor,
    pred: Tensor,
    target: Tensor,
    normalize: bool,
    eps: float,
    need_pred: bool,
    need_target: bool,
    distance: int = 0,
    beta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    return launch_backward(dloss, pred, target, normalize, eps, (need_pred, need_target), distance, beta)


@_op_backward.register_kernel("cpu")
def _(dloss, pred, target, normalize, eps, need_pred, need_target, distance=0, beta=1.0):
    if native.ready():
        return torch.ops.fastmim.native_norm_pix_loss_backward(
            dloss, pred, target, normalize, eps, distance, beta, need_pred, need_target
        )
    r = residual_reference(pred.float(), target.float(), normalize, eps)
    dp = slope_reference(r, distance, beta) * (dloss[:, None] / pred.shape[1])
    dpred = dp.to(pred.dtype) if need_pred else pred.new_empty(0, pred.shape[1])
    dtarget = (-dp).to(target.dtype) if need_target else target.new_empty(0, pred.shape[1])
    return dpred, dtarget


@_op_backward.register_fake
def _(dloss, pred, target, normalize, eps, need_pred, need_target, distance=0, beta=1.0):
    M, D = pred.shape
    return pred.new_empty(M if need_pred else 0, D), target.new_empty(M if need_target else 0, D)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    pred, target, ctx.normalize, ctx.eps, *ctx.form = inputs
    ctx.save_for_backward(pred, target)


def _backward(ctx, dloss: Tensor | None):
    if dloss is None:
        return (None,) * 6
    needs = ctx.needs_input_grad[:2]
    grads = _op_backward(dloss, *ctx.saved_tensors, ctx.normalize, ctx.eps, *needs, *ctx.form)
    dpred, dtarget = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dpred, dtarget, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- public function -------------------------------------------------------------------------------


def distance_number(distance: Distance, beta: float) -> int:
    """The kernels' number of a distance; ValueError for an unknown one or a width that is not positive."""
    if distance not in DISTANCES:
        raise ValueError(f"want a distance of {DISTANCES}, got {distance!r}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"want 0 < beta < inf, got {beta}")
    return DISTANCES.index(distance)


def norm_pix_loss(
    pred_MD: Tensor,
    target_MD: Tensor,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    distance: Distance = "l2",
    beta: float = 1.0,
) -> Tensor:
    """Per-patch loss on normalized or plain targets. `[M, D] x [M, D] -> [M]` fp32.

    `distance` is "l2" (MAE), "l1" (SimMIM) or "smooth_l1", quadratic within `beta` (data2vec). Differentiable
    in `pred_MD`, and in `target_MD` when `normalize` is off; ValueError when a target to be normalized
    requires a gradient. Average it over M for the training loss.
    """
    number = distance_number(distance, beta)
    if pred_MD.ndim != 2 or pred_MD.shape != target_MD.shape:
        raise ValueError(f"want two [M, D], got {tuple(pred_MD.shape)}, {tuple(target_MD.shape)}")
    if pred_MD.dtype not in FLOATS or target_MD.dtype not in FLOATS:
        raise ValueError(f"want fp32, bf16 or fp16, got {pred_MD.dtype}, {target_MD.dtype}")
    if pred_MD.device != target_MD.device:
        raise ValueError(f"want one device, got {pred_MD.device} and {target_MD.device}")
    if not 2 <= pred_MD.shape[1] <= MAX_D:
        raise ValueError(f"want 2 <= D <= {MAX_D}, got D = {pred_MD.shape[1]}")
    if pred_MD.stride(1) != 1 or target_MD.stride(1) != 1:
        raise ValueError("the last dim must be contiguous")
    if normalize and target_MD.requires_grad and torch.is_grad_enabled():
        raise ValueError("a normalized target gets no gradient: detach it, or pass normalize=False")
    return _op(pred_MD, target_MD, normalize, eps, number, beta)
