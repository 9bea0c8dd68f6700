"""Cross entropy of a student's codes against a centered teacher's, without the probabilities of either.

    p_u      = softmax((teacher_u - center) / T_t)       q_r = softmax(student_r / T_s)       over K codes
    loss_rj  = -sum over k of p_u[k] log q_r[k]          u = pairs[r, j]; 0 where that is -1
             = lse_r - sum over k of p_u[k] student_r[k] / T_s
    H_u      = -sum over k of p_u[k] log p_u[k]

Source  DINO, arXiv:2104.14294, Eq. 1 to 4, where each of S crops meets the teacher's two: J = 2; iBOT,
        arXiv:2111.07832, whose patches meet one each: J = 1.
Shapes  student `[R, K]`, teacher `[U, K]`, center `[K]`, pairs int64 `[R, J]`; loss fp32 `[R, J]`, H `[U]`.
Dtypes  student and teacher of one dtype, bf16, fp16 or fp32; all sums fp32; the gradient in the student's.
Bytes   forward the teacher once for its sums, then each student row and its J teacher rows; backward the
        same and the gradient. Kept: 4 * (R + U) bytes of log-sum-exps beside what came in. A CPU makes the
        teacher's probabilities of 1,024 codes at a time, once for all rows.
Limits  rows with a contiguous last dim; J at most 16. Only the student has a gradient.
"""

import torch
from torch import Tensor

from fastmim_kernels import native
from fastmim_kernels.code_loss_triton import launch_backward, launch_forward
from fastmim_kernels.once import differentiable_once

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_J = 16
ROWS = 8  # of the student that the CPU works on at once without csrc/


# --- reference: the definition, and the oracle of the tests -------------------------------------


def code_loss_reference(
    student_RK: Tensor,
    teacher_UK: Tensor,
    center_K: Tensor,
    pairs_RJ: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:
    """Loss and the teacher's entropies in plain PyTorch, in the dtype of its inputs. `[R, J]`, `[U]`."""
    log_p_UK = ((teacher_UK - center_K) / teacher_temperature).log_softmax(-1)
    log_q_RK = (student_RK / student_temperature).log_softmax(-1)
    p_UK = log_p_UK.exp()
    loss_RJ = -torch.einsum("rjk,rk->rj", p_UK[pairs_RJ.clamp(min=0)], log_q_RK)
    return loss_RJ.masked_fill(pairs_RJ < 0, 0.0), -(p_UK * log_p_UK).sum(-1)


# --- CPU: the definition, a few rows at a time ----------------------------------------------------


def cpu_forward(
    student: Tensor, teacher: Tensor, center: Tensor, pairs: Tensor, t_s: float, t_t: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-sum-exps of student and teacher, entropies of the teacher."""
    R, J = pairs.shape
    loss, lse_r = student.new_zeros(R, J, dtype=torch.float32), student.new_empty(R, dtype=torch.float32)
    lse_u, entropy = (teacher.new_empty(len(teacher), dtype=torch.float32) for _ in range(2))
    for u, row in enumerate(teacher):
        x = row.float().sub(center).div_(t_t)
        lse_u[u] = x.logsumexp(-1)
        x.sub_(lse_u[u])
        entropy[u] = -torch.dot(x.exp(), x)
    for r, row in enumerate(student):
        y = row.float().div(t_s)
        lse_r[r] = y.logsumexp(-1)
        for j, u in enumerate(pairs[r].tolist()):
            if u >= 0:
                p = teacher[u].float().sub(center).div_(t_t).sub_(lse_u[u]).exp_()
                loss[r, j] = torch.dot(p, lse_r[r] - y)
    return loss, lse_r, lse_u, entropy


def cpu_backward(
    dloss: Tensor, student: Tensor, teacher: Tensor, center: Tensor, pairs: Tensor, lse_r: Tensor,
    lse_u: Tensor, t_s: float, t_t: float,
) -> Tensor:  # fmt: skip
    """The gradient of the student, the probabilities made again."""
    ds = torch.empty_like(student, memory_format=torch.contiguous_format)
    for r, row in enumerate(student):
        total = row.float().div(t_s).sub_(lse_r[r]).exp_().mul_(dloss[r][pairs[r] >= 0].sum())
        for j, u in enumerate(pairs[r].tolist()):
            if u >= 0:
                p = teacher[u].float().sub(center).div_(t_t).sub_(lse_u[u]).exp_()
                total.sub_(p.mul_(dloss[r, j]))
        ds[r] = total.div_(t_s)
    return ds


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::code_loss", mutates_args=(), device_types="cuda")
def _op(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    pairs: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(student, teacher, center, pairs, student_temperature, teacher_temperature)


@_op.register_kernel("cpu")
def _(student, teacher, center, pairs, student_temperature, teacher_temperature):
    check_pairs(pairs, len(teacher))
    forward = torch.ops.fastmim.native_code_loss if native.ready() else cpu_forward
    return forward(student, teacher, center, pairs, student_temperature, teacher_temperature)


@_op.register_fake
def _(student, teacher, center, pairs, student_temperature, teacher_temperature):
    (R, J), U = pairs.shape, teacher.shape[0]
    return tuple(student.new_empty(shape, dtype=torch.float32) for shape in ((R, J), (R,), (U,), (U,)))


@torch.library.custom_op("fastmim::code_loss_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    pairs: Tensor,
    lse_student: Tensor,
    lse_teacher: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    temperatures = student_temperature, teacher_temperature
    return launch_backward(dloss, student, teacher, center, pairs, lse_student, lse_teacher, *temperatures)


@_op_backward.register_kernel("cpu")
def _(dloss, student, teacher, center, pairs, lse_student, lse_teacher, t_s, t_t):
    backward = torch.ops.fastmim.native_code_loss_backward if native.ready() else cpu_backward
    return backward(dloss, student, teacher, center, pairs, lse_student, lse_teacher, t_s, t_t)


@_op_backward.register_fake
def _(dloss, student, teacher, center, pairs, lse_student, lse_teacher, t_s, t_t):
    return student.new_empty(student.shape)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    student, teacher, center, pairs, *ctx.temperatures = inputs
    _, lse_student, lse_teacher, entropy = output
    ctx.mark_non_differentiable(lse_student, lse_teacher, entropy)
    ctx.save_for_backward(student, teacher, center, pairs, lse_student, lse_teacher)


def _backward(ctx, dloss: Tensor | None, *_):
    if dloss is None or not ctx.needs_input_grad[0]:
        return (None,) * 6
    return _op_backward(dloss, *ctx.saved_tensors, *ctx.temperatures), None, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- public function -------------------------------------------------------------------------------


def check_pairs(pairs: Tensor, num_rows: int) -> None:
    """ValueError for a pair that names no row of the teacher. Waits for the device."""
    if pairs.numel() and not -1 <= pairs.min() <= pairs.max() < num_rows:
        raise ValueError(f"want pairs from -1 to {num_rows - 1}, got {pairs.min()} to {pairs.max()}")


def code_loss(
    student_RK: Tensor,
    teacher_UK: Tensor,
    center_K: Tensor,
    pairs_RJ: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:
    """Cross entropies of student rows with the teacher rows that `pairs` names, and the teacher's entropies.

    `[R, K], [U, K], [K], [R, J] -> [R, J], [U]`, fp32, in nats. Differentiable in the student. -1 in `pairs`
    is no pair, and its loss 0. ValueError when shapes, dtypes, devices or temperatures do not fit, or where
    teacher or center require a gradient; on the CPU also for a pair that names no row.
    """
    if student_RK.ndim != 2 or teacher_UK.ndim != 2 or student_RK.shape[1] != teacher_UK.shape[1]:
        raise ValueError(
            f"want student [R, K] and teacher [U, K], got {tuple(student_RK.shape)} and "
            f"{tuple(teacher_UK.shape)}"
        )
    (R, K), J = student_RK.shape, pairs_RJ.shape[-1] if pairs_RJ.ndim == 2 else 0
    if K < 1 or center_K.shape != (K,) or center_K.dtype != torch.float32:
        raise ValueError(f"want a center fp32 {(K,)}, got {center_K.dtype} {tuple(center_K.shape)}")
    if pairs_RJ.shape != (R, J) or not 1 <= J <= MAX_J or pairs_RJ.dtype != torch.int64:
        raise ValueError(
            f"want pairs int64 [{R}, J], J at most {MAX_J}, got {pairs_RJ.dtype} {tuple(pairs_RJ.shape)}"
        )
    if student_RK.dtype not in FLOATS or teacher_UK.dtype != student_RK.dtype:
        raise ValueError(f"want one of fp32, bf16, fp16, got {student_RK.dtype} and {teacher_UK.dtype}")
    if any(x.device != student_RK.device for x in (teacher_UK, center_K, pairs_RJ)):
        raise ValueError("want student, teacher, center and pairs on one device")
    if any(x.stride(-1) != 1 for x in (student_RK, teacher_UK)):
        raise ValueError("the last dim must be contiguous")
    if min(student_temperature, teacher_temperature) <= 0:
        raise ValueError(f"want temperatures above 0, got {student_temperature} and {teacher_temperature}")
    if torch.is_grad_enabled() and (teacher_UK.requires_grad or center_K.requires_grad):
        raise ValueError("teacher and center get no gradient: detach them")
    loss, _, _, entropy = _op(
        student_RK, teacher_UK, center_K.contiguous(), pairs_RJ.contiguous(), student_temperature,
        teacher_temperature,
    )  # fmt: skip
    return loss, entropy
