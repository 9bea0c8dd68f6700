"""code_loss as DINO uses it: 2 large and 8 small crops, 65,536 codes, every pair of crops.

Question   what does it cost never to store the probabilities of student and teacher, and what does it save?
Expected   bandwidth bound: the student's logits are read twice and their gradient written once. Extra memory
           at most a quarter of eager's, which keeps the teacher's softmax, and a log-softmax of the student
           for each of 18 pairs; and not slower.
Baselines  "eager" is the loop of DINO's own loss: chunks of crops, a softmax for each of the teacher's, a
           log-softmax for each pair. Compiled whole it is "compile".
Bytes      the logits of student and teacher read once, the gradient of the student's written.
Memory     `extra_mib` as benchmarks/ops/info_nce.py says: beyond the logits and their gradient.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from fastmim_kernels import code_loss
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

BATCHES = [32, 128] if DEVICE == "cuda" else [32]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LARGE, SMALL, K = 2, 8, 65536
T_S, T_T = 0.1, 0.04


def eager(student_RK: Tensor, teacher_UK: Tensor, center_K: Tensor) -> Tensor:
    p = [F.softmax((t.float() - center_K) / T_T, dim=-1) for t in teacher_UK.chunk(LARGE)]
    logits = (student_RK.float() / T_S).chunk(LARGE + SMALL)
    losses = [
        (-p[t] * F.log_softmax(logits[s], dim=-1)).sum(-1).mean()
        for t in range(LARGE)
        for s in range(LARGE + SMALL)
        if s != t
    ]
    return torch.stack(losses).mean()


def fused(student_RK: Tensor, teacher_UK: Tensor, center_K: Tensor) -> Tensor:
    B = len(teacher_UK) // LARGE
    crop = torch.arange(LARGE + SMALL, device=center_K.device).repeat_interleave(B)
    image = torch.arange(B, device=center_K.device).repeat(LARGE + SMALL)
    pairs = torch.stack([torch.where(crop == t, -1, t * B + image) for t in range(LARGE)], dim=1)
    loss_RJ, _ = code_loss(
        student_RK, teacher_UK, center_K, pairs, student_temperature=T_S, teacher_temperature=T_T
    )
    return loss_RJ.sum() / (2 * (LARGE + SMALL) - 2) / B


PROVIDERS = {"eager": eager, "compile": torch.compile(eager, dynamic=False), "fastmim": fused}


def forward_backward(
    provider: str, student_RK: Tensor, teacher_UK: Tensor, center_K: Tensor
) -> tuple[Tensor, Tensor]:
    loss = PROVIDERS[provider](student_RK, teacher_UK, center_K)
    (grad,) = torch.autograd.grad(loss, student_RK)
    return loss.detach(), grad


def group(B: int) -> list[Case]:
    """Logits as cosines of random directions have them; a center of as small values."""
    R, U = (LARGE + SMALL) * B, LARGE * B
    student = (0.06 * torch.randn(R, K, device=DEVICE)).to(DTYPE).requires_grad_()
    teacher = (0.06 * torch.randn(U, K, device=DEVICE)).to(DTYPE)
    center = 0.01 * torch.randn(K, device=DEVICE)
    return [
        Case(
            op="code_loss",
            provider=provider,
            mode="forward_backward, 2 + 8 crops",
            shape={"B": B, "K": K},
            dtype=str(DTYPE).removeprefix("torch."),
            bytes_moved=(2 * R + U) * K * DTYPE.itemsize,
            run=partial(forward_backward, provider, student, teacher, center),
        )
        for provider in PROVIDERS
    ]


def cases() -> Iterator[list[Case]]:
    for images in BATCHES:
        yield group(images)
