"""ema_update on all tensors of a ViT: a teacher in fp32, its student in fp32 or in bf16.

Question   what does one launch over a table of addresses save over a call per tensor and over torch's own?
Expected   memory bound, and for small tensors bound by launches: a ViT-B has 150 tensors, most of them below
           10 kB. 90 % of a copy's bandwidth; as fast as torch's multi-tensor lerp in one dtype, 1.6x over
           it where the student is bf16, which has to be cast to a copy first.
Baselines  the reference, a lerp per tensor, eager and compiled whole; "foreach" is torch._foreach_lerp_,
           "swa_utils" the multi-tensor average of torch.optim.swa_utils; both get a cast copy of a student
           in bf16.
           Each provider moves a teacher of its own; its first step is what is checked. A momentum of 0.9
           lets a wrong step show there; the time does not depend on it.
Bytes      teacher read and written, student read.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastmim_kernels import ema_update
from fastmim_kernels.ema_update import ema_update_reference
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

WIDTH, DEPTH = (768, 12) if DEVICE == "cuda" else (384, 12)  # ViT-B, ViT-S
STUDENTS = (torch.float32, torch.bfloat16)
MOMENTUM = 0.9
SWA = get_ema_multi_avg_fn(MOMENTUM)
Lists = tuple[list[Tensor], list[Tensor]]


def shapes(width: int, depth: int) -> list[tuple[int, ...]]:
    """Of the encoder of a ViT/16."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    block += [(width, 4 * width)] + [(width,)] * 5
    return [(1, 1, width), (1, 197, width), (width, 768), (width,), *block * depth, (width,), (width,)]


def eager(teacher: list[Tensor], student: list[Tensor]) -> None:
    ema_update_reference(teacher, student, MOMENTUM)


def alike(teacher: list[Tensor], student: list[Tensor]) -> list[Tensor]:
    """The student in the dtypes of the teacher, as torch's multi-tensor functions want it."""
    return [s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]


def foreach(teacher: list[Tensor], student: list[Tensor]) -> None:
    torch._foreach_lerp_(teacher, alike(teacher, student), 1 - MOMENTUM)


def swa_utils(teacher: list[Tensor], student: list[Tensor]) -> None:
    SWA(teacher, alike(teacher, student), 0)


def fused(teacher: list[Tensor], student: list[Tensor]) -> None:
    ema_update(teacher, student, MOMENTUM)


PROVIDERS = {
    "eager": eager,
    "foreach": foreach,
    "swa_utils": swa_utils,
    "compile": torch.compile(eager, dynamic=False),
    "fastmim": fused,
}


def step(update: Callable[..., None], teacher: list[Tensor], student: list[Tensor]) -> Callable:
    def run() -> tuple[Tensor, ...]:
        update(teacher, student)
        return tuple(teacher)

    return run


def oracle(teacher: list[Tensor], student: list[Tensor]) -> tuple[Tensor, ...]:
    moved = [t.double() for t in teacher]
    ema_update_reference(moved, [s.double() for s in student], MOMENTUM)
    return tuple(moved)


def cases() -> Iterator[list[Case]]:
    start = [torch.randn(shape, device=DEVICE) for shape in shapes(WIDTH, DEPTH)]
    values = sum(t.numel() for t in start)
    for dtype in STUDENTS:
        student = [torch.randn_like(t).to(dtype) for t in start]
        yield [
            Case(
                op="ema_update",
                provider=provider,
                mode="update",
                shape={"tensors": len(start), "values": values},
                dtype=f"float32 of {str(dtype).removeprefix('torch.')}",
                bytes_moved=values * (8 + dtype.itemsize),
                run=step(update, [t.clone() for t in start], student),
                oracle=partial(oracle, start, student),
            )
            for provider, update in PROVIDERS.items()
        ]
