"""Triton kernels and launchers of code_loss.py, which holds the formula, the shapes and the limits.

A program of the first kernel passes once along a row of the teacher, one of the second along a row of the
student and the J rows that it meets; sums of exponentials are rescaled as their maximum rises. The backward
has a program for every block of codes of every student row: nothing is summed across programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # codes


@triton.jit
def _teacher_kernel(
    teacher_ptr, center_ptr, lse_ptr, entropy_ptr, K, stride, temperature, BLOCK: tl.constexpr
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    inner = tl.full([], 0.0, tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(teacher_ptr + u * stride + k, mask=k < K, other=0.0).to(tl.float32)
        x = (x - tl.load(center_ptr + k, mask=k < K, other=0.0)) / temperature
        x = tl.where(k < K, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        down = tl.where(top == float("-inf"), 0.0, top - higher)  # inner is of x - top: no digit is lost
        old, e = tl.exp(down), tl.exp(x - higher)
        inner = (inner + total * down) * old + tl.sum(tl.where(k < K, (x - higher) * e, 0.0), axis=0)
        total = total * old + tl.sum(e, axis=0)
        top = higher
    tl.store(lse_ptr + u, top + tl.log(total))
    tl.store(entropy_ptr + u, tl.log(total) - inner / total)


@triton.jit
def _probabilities(
    teacher_ptr, center_ptr, lse_ptr, pair, k, K, stride, temperature,
):  # fmt: skip
    """p of the rows in `pair` at codes k, [J, BLOCK]; 0 where there is no pair or no code."""
    mask = (pair >= 0)[:, None] & (k < K)[None, :]
    x = tl.load(teacher_ptr + pair[:, None] * stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    x = (x - tl.load(center_ptr + k, mask=k < K, other=0.0)[None, :]) / temperature
    lse = tl.load(lse_ptr + pair, mask=pair >= 0, other=0.0)
    return tl.where(mask, tl.exp(x - lse[:, None]), 0.0)


@triton.jit
def _forward_kernel(
    student_ptr, teacher_ptr, center_ptr, pair_ptr, lse_teacher_ptr, loss_ptr, lse_ptr, K,
    student_stride, teacher_stride, student_temperature, teacher_temperature,
    J: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, PAIRS)
    pair = tl.load(pair_ptr + r * J + j, mask=j < J, other=-1)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    dot = tl.zeros([PAIRS], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        y = tl.load(student_ptr + r * student_stride + k, mask=k < K, other=0.0).to(tl.float32)
        y = y / student_temperature
        p = _probabilities(
            teacher_ptr, center_ptr, lse_teacher_ptr, pair, k, K, teacher_stride, teacher_temperature
        )
        dot += tl.sum(p * y[None, :], axis=1)
        y = tl.where(k < K, y, float("-inf"))
        higher = tl.maximum(top, tl.max(y, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(y - higher), axis=0)
        top = higher
    lse = top + tl.log(total)
    tl.store(lse_ptr + r, lse)
    tl.store(loss_ptr + r * J + j, tl.where(pair >= 0, lse - dot, 0.0), mask=j < J)


@triton.jit
def _backward_kernel(
    dloss_ptr, student_ptr, teacher_ptr, center_ptr, pair_ptr, lse_ptr, lse_teacher_ptr, ds_ptr, K,
    student_stride, teacher_stride, student_temperature, teacher_temperature,
    J: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, BLOCK)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, PAIRS)
    pair = tl.load(pair_ptr + r * J + j, mask=j < J, other=-1)
    slope = tl.load(dloss_ptr + r * J + j, mask=(j < J) & (pair >= 0), other=0.0)
    p = _probabilities(
        teacher_ptr, center_ptr, lse_teacher_ptr, pair, k, K, teacher_stride, teacher_temperature
    )
    y = tl.load(student_ptr + r * student_stride + k, mask=k < K, other=0.0).to(tl.float32)
    q = tl.exp(y / student_temperature - tl.load(lse_ptr + r))
    ds = (tl.sum(slope, axis=0) * q - tl.sum(slope[:, None] * p, axis=0)) / student_temperature
    tl.store(ds_ptr + r * K + k, ds.to(ds_ptr.dtype.element_ty), mask=k < K)


def sizes_of(K: int, J: int) -> dict[str, int]:
    """Codes of a block, and pairs up to a power of two, so that a tile of both fits the registers."""
    pairs = triton.next_power_of_2(J)
    block = min(max(16, BLOCK // pairs), triton.next_power_of_2(K))
    return {"J": J, "PAIRS": pairs, "BLOCK": max(16, block), "num_warps": 8 if block >= 1024 else 4}


def launch_forward(
    student: Tensor, teacher: Tensor, center: Tensor, pairs: Tensor, t_s: float, t_t: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-sum-exps of student and teacher, entropies of the teacher, all fp32."""
    (R, K), U, J = student.shape, len(teacher), pairs.shape[1]
    loss, lse_r, lse_u, entropy = (
        torch.empty(shape, dtype=torch.float32, device=student.device) for shape in ((R, J), (R,), (U,), (U,))
    )
    if U:
        block = min(BLOCK, triton.next_power_of_2(K))
        _teacher_kernel[(U,)](
            teacher, center, lse_u, entropy, K, teacher.stride(0), t_t, BLOCK=max(16, block), num_warps=8
        )
    if R:
        _forward_kernel[(R,)](
            student, teacher, center, pairs, lse_u, loss, lse_r, K,
            student.stride(0), teacher.stride(0), t_s, t_t, **sizes_of(K, J),
        )  # fmt: skip
    return loss, lse_r, lse_u, entropy


def launch_backward(
    dloss: Tensor, student: Tensor, teacher: Tensor, center: Tensor, pairs: Tensor, lse_r: Tensor,
    lse_u: Tensor, t_s: float, t_t: float,
) -> Tensor:  # fmt: skip
    """The gradient of the student, contiguous."""
    (R, K), J = student.shape, pairs.shape[1]
    ds = torch.empty(R, K, dtype=student.dtype, device=student.device)
    sizes = sizes_of(K, J)
    if R:
        _backward_kernel[(R * triton.cdiv(K, sizes["BLOCK"]),)](
            dloss.contiguous(), student, teacher, center, pairs, lse_r, lse_u, ds, K,
            student.stride(0), teacher.stride(0), t_s, t_t, **sizes,
        )  # fmt: skip
    return ds
