"""norm_pix_loss with the target read from the image itself: no target row is ever written.

    t     = row of patch index[b, l] of image b, normalized per channel      (gather_patches.py)
    loss  = norm_pix_loss(pred[b, l], t)                                     (norm_pix_loss.py)

Shapes  B = images, L = scored patches per image, P = patch * patch * C values per patch.
Dtypes  pred bf16, fp16 or fp32; image uint8 (divided by 255) or floating; arithmetic and loss fp32.
Bytes   B * L * P * (s_pred + s_image) + 4 * B * L forward; backward adds B * L * P * s_pred. Memory bound.
Limits  last dim of pred contiguous, image of any strides, 2 <= P <= 8192. Differentiable in pred only. The
        index is checked on the CPU, on CUDA in debug mode. CUDA runs Triton, CPU csrc/ or the reference.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels import native
from fastmim_kernels.debug import debugging
from fastmim_kernels.gather_patches import (
    affine,
    check_image,
    check_index,
    gather_patches_reference,
    image_layout,
    load_patches,
)
from fastmim_kernels.norm_pix_loss import (
    DISTANCES,
    FLOATS,
    MAX_D,
    Distance,
    distance_number,
    far,
    norm_pix_loss_reference,
    residual,
    residual_reference,
    row_tile,
    slope,
    slope_reference,
)
from fastmim_kernels.once import differentiable_once

# --- reference: the definition, and the oracle of the tests -------------------------------------


def norm_pix_loss_image_reference(
    pred_BLP: Tensor,
    image_BHWC: Tensor,
    index_BL: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    normalize: bool = True,
    eps: float = 1e-6,
    distance: Distance = "l2",
    beta: float = 1.0,
) -> Tensor:
    """The two ops in plain PyTorch, in the dtype of pred. `[B, L, P] -> [B, L]`."""
    target_BLP = gather_patches_reference(image_BHWC, index_BL, patch, mean, std, pred_BLP.dtype)
    return norm_pix_loss_reference(pred_BLP, target_BLP, normalize, eps, distance, beta)


# --- Triton: a few patches per program -------------------------------------------------------------


@triton.jit
def _row_residual(
    pred_ptr, image_ptr, index_ptr, rows, cols, num_rows, L, pred_stride_b, pred_stride_l,
    grid_w, stride_b, stride_h, stride_w, stride_c, eps,
    C: tl.constexpr, PATCH: tl.constexpr, DENSE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The residual of patches `rows`, [rows, cols] fp32. Forward and backward share it."""
    t, exist = load_patches(
        image_ptr, index_ptr, rows, num_rows, cols, L, grid_w, stride_b, stride_h, stride_w, stride_c,
        C, PATCH, DENSE, SCALE, SHIFT,
    )  # fmt: skip
    pred_row = (rows // L).to(tl.int64) * pred_stride_b + (rows % L).to(tl.int64) * pred_stride_l
    p = tl.load(pred_ptr + pred_row[:, None] + cols[None, :], mask=exist, other=0.0).to(tl.float32)
    t = tl.where(exist, t, 0.0)  # past the end the shift alone would remain
    return residual(p, t, exist, eps, PATCH * PATCH * C, NORMALIZE)


@triton.jit
def _forward_kernel(
    pred_ptr, image_ptr, index_ptr, loss_ptr, num_rows, L, pred_stride_b, pred_stride_l,
    grid_w, stride_b, stride_h, stride_w, stride_c, eps, beta,
    C: tl.constexpr, PATCH: tl.constexpr, DENSE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    r = _row_residual(
        pred_ptr, image_ptr, index_ptr, rows, cols, num_rows, L, pred_stride_b, pred_stride_l,
        grid_w, stride_b, stride_h, stride_w, stride_c, eps, C, PATCH, DENSE, SCALE, SHIFT, NORMALIZE,
    )  # fmt: skip
    loss = tl.sum(far(r, beta, DISTANCE), axis=1) / (PATCH * PATCH * C)
    tl.store(loss_ptr + rows, loss, mask=rows < num_rows)


@triton.jit
def _backward_kernel(
    dloss_ptr, pred_ptr, image_ptr, index_ptr, dpred_ptr, num_rows, L, pred_stride_b, pred_stride_l,
    grid_w, stride_b, stride_h, stride_w, stride_c, eps, beta,
    C: tl.constexpr, PATCH: tl.constexpr, DENSE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = PATCH * PATCH * C
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    r = _row_residual(
        pred_ptr, image_ptr, index_ptr, rows, cols, num_rows, L, pred_stride_b, pred_stride_l,
        grid_w, stride_b, stride_h, stride_w, stride_c, eps, C, PATCH, DENSE, SCALE, SHIFT, NORMALIZE,
    )  # fmt: skip
    dloss = tl.load(dloss_ptr + rows, mask=rows < num_rows, other=0.0)
    dp = slope(r, beta, DISTANCE) * (dloss / P)[:, None]
    out = dpred_ptr + rows.to(tl.int64)[:, None] * P + cols[None, :]
    exist = (rows < num_rows)[:, None] & (cols < P)[None, :]
    tl.store(out, dp.to(dpred_ptr.dtype.element_ty), mask=exist)


class Options(NamedTuple):
    """What the op takes behind prediction, image and index, in the order of its schema."""

    patch: int
    mean: Sequence[float]
    std: Sequence[float]
    normalize: bool
    eps: float
    distance: int = 0
    beta: float = 1.0


def _arguments(pred: Tensor, image: Tensor, o: Options) -> dict:
    """What both kernels take beside their pointers."""
    B, L, P = pred.shape
    rows = {"num_rows": B * L, "L": L, "pred_stride_b": pred.stride(0), "pred_stride_l": pred.stride(1)}
    form = {"NORMALIZE": o.normalize, "eps": o.eps, "DISTANCE": o.distance, "beta": o.beta}
    return rows | image_layout(image, o.patch) | affine(image.dtype, o.mean, o.std) | form | row_tile(P)


def launch_forward(pred: Tensor, image: Tensor, index: Tensor, *options: Any) -> Tensor:
    """`options` are those of `Options`."""
    loss = torch.empty(pred.shape[:2], dtype=torch.float32, device=pred.device)
    arguments = _arguments(pred, image, Options(*options))
    grid = (triton.cdiv(loss.numel(), arguments["ROWS"]),)
    _forward_kernel[grid](pred, image, index.contiguous(), loss, **arguments)
    return loss


def launch_backward(dloss: Tensor, pred: Tensor, image: Tensor, index: Tensor, *options: Any) -> Tensor:
    """`options` are those of `Options`."""
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    arguments = _arguments(pred, image, Options(*options))
    grid = (triton.cdiv(dloss.numel(), arguments["ROWS"]),)
    _backward_kernel[grid](dloss.contiguous(), pred, image, index.contiguous(), dpred, **arguments)
    return dpred


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::norm_pix_loss_image", mutates_args=(), device_types="cuda")
def _op(
    pred: Tensor,
    image: Tensor,
    index: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    normalize: bool,
    eps: float,
    distance: int = 0,
    beta: float = 1.0,
) -> Tensor:
    if debugging():
        check_index(index, image, patch)
    return launch_forward(pred, image, index, patch, mean, std, normalize, eps, distance, beta)


def _for_native(image: Tensor, o: Options) -> tuple[Any, ...]:
    """What the C++ ops take behind their tensors: scale and shift of each channel for mean and deviation."""
    return o.patch, *affine(image.dtype, o.mean, o.std).values(), o.normalize, o.eps, o.distance, o.beta


@_op.register_kernel("cpu")
def _(pred, image, index, *options):
    o = Options(*options)
    check_index(index, image, o.patch)
    if native.ready():
        return torch.ops.fastmim.native_norm_pix_loss_image(pred, image, index, *_for_native(image, o))
    return norm_pix_loss_image_reference(
        pred.float(), image, index, *o[:5], distance=DISTANCES[o.distance], beta=o.beta
    )


@_op.register_fake
def _(pred, image, index, *options):
    return pred.new_empty(pred.shape[:2], dtype=torch.float32)


@torch.library.custom_op("fastmim::norm_pix_loss_image_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dloss: Tensor,
    pred: Tensor,
    image: Tensor,
    index: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    normalize: bool,
    eps: float,
    distance: int = 0,
    beta: float = 1.0,
) -> Tensor:
    return launch_backward(dloss, pred, image, index, patch, mean, std, normalize, eps, distance, beta)


@_op_backward.register_kernel("cpu")
def _(dloss, pred, image, index, *options):
    o = Options(*options)
    if native.ready():
        return torch.ops.fastmim.native_norm_pix_loss_image_backward(
            dloss, pred, image, index, *_for_native(image, o)
        )
    target = gather_patches_reference(image, index, o.patch, o.mean, o.std)
    r = residual_reference(pred.float(), target, o.normalize, o.eps)
    return (slope_reference(r, o.distance, o.beta) * (dloss[..., None] / pred.shape[2])).to(pred.dtype)


@_op_backward.register_fake
def _(dloss, pred, image, index, *options):
    return pred.new_empty(pred.shape)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    pred, image, index, *ctx.options = inputs
    ctx.save_for_backward(pred, image, index)


def _backward(ctx, dloss: Tensor | None):
    dpred = None if dloss is None else _op_backward(dloss, *ctx.saved_tensors, *ctx.options)
    return dpred, *[None] * 9


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- public function -------------------------------------------------------------------------------


def norm_pix_loss_image(
    pred_BLP: Tensor,
    image_BHWC: Tensor,
    index_BL: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    distance: Distance = "l2",
    beta: float = 1.0,
) -> Tensor:
    """Per-patch loss against patches of the image. `[B, L, P], [B, H, W, C], [B, L] -> [B, L]` fp32.

    `distance` is "l2", "l1" or "smooth_l1", quadratic within `beta`. Differentiable in `pred_BLP` only;
    ValueError when the image requires a gradient, or when sizes, dtypes or statistics do not fit. Average it
    over B and L for the training loss.
    """
    number = distance_number(distance, beta)
    check_image(image_BHWC, index_BL, patch, mean, std)
    P = patch * patch * image_BHWC.shape[3]
    if pred_BLP.shape != (*index_BL.shape, P):
        raise ValueError(f"want pred {(*index_BL.shape, P)}, got {tuple(pred_BLP.shape)}")
    if pred_BLP.dtype not in FLOATS or pred_BLP.device != image_BHWC.device:
        raise ValueError(
            f"want pred fp32, bf16 or fp16 on {image_BHWC.device}, got {pred_BLP.dtype} on {pred_BLP.device}"
        )
    if not 2 <= P <= MAX_D:
        raise ValueError(f"want 2 <= P <= {MAX_D}, got P = {P}")
    if pred_BLP.stride(2) != 1:
        raise ValueError("the last dim must be contiguous")
    if image_BHWC.requires_grad and torch.is_grad_enabled():
        raise ValueError("the image gets no gradient: detach it, or use gather_patches and norm_pix_loss")
    return _op(pred_BLP, image_BHWC, index_BL, patch, mean, std, normalize, eps, number, beta)
