"""MAE's per-patch-normalised pixel loss in one pass: two rows read, one float per patch written.

    t_hat = (t - mean(t)) / sqrt(var(t) + eps)      over D; var is unbiased, divided by D - 1
          = t                                       with normalize=False
    loss  = mean over D of (p - t_hat)^2
    dp    = dloss * 2 / D * (p - t_hat)             dt = -dp with normalize=False, else none

Source  He et al., arXiv:2111.06377, "normalized pixels"; eps and the unbiased variance are those
        of facebookresearch/mae, models_mae.py, forward_loss. The plain form is also the distance of
        two reconstructions, of which both learn (Kong & Zhang, arXiv:2208.04164).
Shapes  M = scored patches in the batch, D = values per patch (16 * 16 * 3 = 768).
Dtypes  pred and target bf16, fp16 or fp32; arithmetic and loss fp32; gradients in their input's dtype.
Bytes   forward M * D * (s_pred + s_target) + 4 * M; backward reads that and writes each gradient asked
        for. Memory bound.
Limits  last dim contiguous, 2 <= D <= 8192. CUDA runs Triton, CPU runs the reference.
        A target that is an image patch needs no row: norm_pix_loss_image.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_D = 8192


# --- reference: the definition, and the oracle of the tests -------------------------------------


def norm_pix_loss_reference(
    pred_MD: Tensor, target_MD: Tensor, normalize: bool = True, eps: float = 1e-6
) -> Tensor:
    """The op in plain PyTorch, in the dtype of its inputs. `[..., D] x [..., D] -> [...]`."""
    return residual_reference(pred_MD, target_MD, normalize, eps).square().mean(dim=-1)


def residual_reference(pred_MD: Tensor, target_MD: Tensor, normalize: bool, eps: float) -> Tensor:
    """`p - t_hat`, of which loss and gradients are made."""
    if not normalize:
        return pred_MD - target_MD
    var_M1, mean_M1 = torch.var_mean(target_MD, dim=-1, keepdim=True)
    return pred_MD - (target_MD - mean_M1) * torch.rsqrt(var_M1 + eps)


# --- Triton: a few patches per program -------------------------------------------------------------


@triton.jit
def residual(p, t, exist, eps, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """`p - t_hat` of [rows, cols] fp32, zero where no value exists. norm_pix_loss_image shares it."""
    if NORMALIZE:
        centred = tl.where(exist, t - tl.sum(t, axis=1)[:, None] / D, 0.0)
        # The rounding of the mean is found in what it left and taken back: in a flat patch it would be all
        # that remains, and 1 / sqrt(eps) would raise it a thousandfold.
        rest = tl.sum(centred, axis=1) / D
        var = (tl.sum(centred * centred, axis=1) - D * rest * rest) / (D - 1)
        centred = tl.where(exist, centred - rest[:, None], 0.0)
        return p - centred / tl.sqrt(var + eps)[:, None]
    else:
        return p - t


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
    pred_ptr, target_ptr, loss_ptr, M, pred_stride, target_stride, eps,
    D: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # rows * D passes 2**31 at 2.8M patches
    cols = tl.arange(0, BLOCK_D)
    r = _row_residual(pred_ptr, target_ptr, rows, cols, M, pred_stride, target_stride, eps, D, NORMALIZE)
    tl.store(loss_ptr + rows, tl.sum(r * r, axis=1) / D, mask=rows < M)


@triton.jit
def _backward_kernel(
    dloss_ptr, pred_ptr, target_ptr, dpred_ptr, dtarget_ptr, M, pred_stride, target_stride, eps,
    NEED_PRED: tl.constexpr, NEED_TARGET: tl.constexpr,
    D: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # mean and var are recomputed: the row is read again anyway, so saving them would save nothing
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    r = _row_residual(pred_ptr, target_ptr, rows, cols, M, pred_stride, target_stride, eps, D, NORMALIZE)
    dp = r * (tl.load(dloss_ptr + rows, mask=rows < M, other=0.0) * 2.0 / D)[:, None]
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


def launch_forward(pred: Tensor, target: Tensor, normalize: bool, eps: float) -> Tensor:
    M, D = pred.shape
    loss = torch.empty(M, dtype=torch.float32, device=pred.device)
    tile, strides = row_tile(D), (pred.stride(0), target.stride(0))
    grid = (triton.cdiv(M, tile["ROWS"]),)
    _forward_kernel[grid](pred, target, loss, M, *strides, eps, D=D, NORMALIZE=normalize, **tile)
    return loss


def launch_backward(
    dloss: Tensor, pred: Tensor, target: Tensor, normalize: bool, eps: float, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of pred and of target; one that is not needed comes back with no rows."""
    M, D = pred.shape
    dpred = torch.empty(M if needs[0] else 0, D, dtype=pred.dtype, device=pred.device)
    dtarget = torch.empty(M if needs[1] else 0, D, dtype=target.dtype, device=pred.device)
    tile, strides = row_tile(D), (pred.stride(0), target.stride(0))
    _backward_kernel[(triton.cdiv(M, tile["ROWS"]),)](
        dloss.contiguous(), pred, target, dpred, dtarget, M, *strides, eps,
        NEED_PRED=needs[0], NEED_TARGET=needs[1], D=D, NORMALIZE=normalize, **tile,
    )  # fmt: skip
    return dpred, dtarget


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::norm_pix_loss", mutates_args=(), device_types="cuda")
def _op(pred: Tensor, target: Tensor, normalize: bool, eps: float) -> Tensor:
    return launch_forward(pred, target, normalize, eps)


@_op.register_kernel("cpu")
def _(pred, target, normalize, eps):
    return norm_pix_loss_reference(pred.float(), target.float(), normalize, eps)


@_op.register_fake
def _(pred, target, normalize, eps):
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
) -> tuple[Tensor, Tensor]:
    return launch_backward(dloss, pred, target, normalize, eps, (need_pred, need_target))


@_op_backward.register_kernel("cpu")
def _(dloss, pred, target, normalize, eps, need_pred, need_target):
    r = residual_reference(pred.float(), target.float(), normalize, eps)
    dp = r * (dloss[:, None] * (2.0 / pred.shape[1]))
    dpred = dp.to(pred.dtype) if need_pred else pred.new_empty(0, pred.shape[1])
    dtarget = (-dp).to(target.dtype) if need_target else target.new_empty(0, pred.shape[1])
    return dpred, dtarget


@_op_backward.register_fake
def _(dloss, pred, target, normalize, eps, need_pred, need_target):
    M, D = pred.shape
    return pred.new_empty(M if need_pred else 0, D), target.new_empty(M if need_target else 0, D)


def _save(ctx, inputs, output) -> None:
    pred, target, ctx.normalize, ctx.eps = inputs
    ctx.save_for_backward(pred, target)


def _backward(ctx, dloss: Tensor):
    needs = ctx.needs_input_grad[:2]
    grads = _op_backward(dloss, *ctx.saved_tensors, ctx.normalize, ctx.eps, *needs)
    dpred, dtarget = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dpred, dtarget, None, None


_op.register_autograd(_backward, setup_context=_save)


# --- public function -------------------------------------------------------------------------------


def norm_pix_loss(pred_MD: Tensor, target_MD: Tensor, *, normalize: bool = True, eps: float = 1e-6) -> Tensor:
    """Per-patch loss of MAE, on normalised or on plain target pixels. `[M, D] x [M, D] -> [M]` fp32.

    Differentiable in `pred_MD`, and in `target_MD` when `normalize` is off; ValueError when a target to be
    normalised requires a gradient. Average it over M for the training loss.
    """
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
        raise ValueError("a normalised target gets no gradient: detach it, or pass normalize=False")
    return _op(pred_MD, target_MD, normalize, eps)
