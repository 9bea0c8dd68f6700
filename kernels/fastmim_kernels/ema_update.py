"""The step of an EMA teacher, in place: all its tensors in one launch.

    t <- t + (1 - m) * (s - t)      for every tensor of the teacher and its like in the student
       = s - m * (s - t)            what is computed where m <= 1/2: exactly s at m = 0

In this form a teacher that equals its student stays where it is. `m * t + (1 - m) * s` would not do so:
the two factors, rounded, do not add up to one, and at m = 0.9999 their error adds up over 10,000 steps.

Source  mean teacher: Tarvainen & Valpola, arXiv:1703.01780.
Shapes  any; teacher and student pairwise equal.
Dtypes  bf16, fp16 or fp32, each tensor its own; arithmetic fp32. A teacher of 16 bits does not move at all
        while (1 - m) * (s - t) is below half its last digit: keep it in fp32.
Bytes   values * (2 * s_teacher + s_student). Memory bound.
Limits  contiguous tensors of one device; no two of the teacher share memory. CUDA runs Triton from a table of
        addresses, kept as long as they stay the same; CPU runs the reference. Not differentiable.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 4096  # values per program


# --- reference: the definition, and the oracle of the tests -------------------------------------


def ema_update_reference(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """The op in plain PyTorch; in fp64 for a teacher of fp64, else in fp32."""
    for t, s in zip(teacher, student, strict=True):
        arithmetic = torch.float64 if t.dtype == torch.float64 else torch.float32
        if t.dtype == s.dtype == arithmetic:
            t.lerp_(s, 1 - momentum)
        else:
            t.copy_(torch.lerp(t.to(arithmetic), s.to(arithmetic), 1 - momentum))


# --- Triton: one program per chunk of one tensor -----------------------------------------------------


@triton.jit
def _pointer(address, FLOAT: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer to FLOATS[FLOAT]."""
    if FLOAT == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif FLOAT == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if ALIGNED:  # said so that the loads become vectors
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _lerp(t, s, rate):
    """In the dtype of t, by the form of the two whose factor is at most one half; rate is 1 - m."""
    t32 = t.to(tl.float32)
    far = s.to(tl.float32) - t32
    return tl.where(rate < 0.5, t32 + rate * far, s.to(tl.float32) - (1.0 - rate) * far).to(t.dtype)


@triton.jit
def _update_kernel(table_ptr, owner_ptr, rate, KINDS: tl.constexpr, CHUNK: tl.constexpr):
    row = table_ptr + tl.load(owner_ptr + tl.program_id(0)) * 5
    teacher, student, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    start = (tl.program_id(0) - tl.load(row + 3)) * CHUNK
    kind = tl.load(row + 4)
    for i in tl.static_range(len(KINDS)):  # the dtypes that occur, compiled in
        if kind == KINDS[i]:
            at = start + tl.arange(0, CHUNK)
            t_ptr = _pointer(teacher, KINDS[i] // 2 // 3, KINDS[i] % 2) + at
            s_ptr = _pointer(student, KINDS[i] // 2 % 3, KINDS[i] % 2) + at
            if start + CHUNK <= count:  # a mask would keep the loads from becoming vectors
                tl.store(t_ptr, _lerp(tl.load(t_ptr), tl.load(s_ptr), rate))
            else:
                exist = at < count
                t = tl.load(t_ptr, mask=exist, other=0.0)
                s = tl.load(s_ptr, mask=exist, other=0.0)
                tl.store(t_ptr, _lerp(t, s, rate), mask=exist)


def _places(tensors: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Address, number of values and dtype of each tensor: all that table and check depend on."""
    return tuple((x.data_ptr(), x.numel(), FLOATS.index(x.dtype)) for x in tensors)


@lru_cache(maxsize=16)
def _table(
    teacher: tuple[tuple[int, int, int], ...], student: tuple[tuple[int, int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Each tensor's addresses, size, first chunk and kind; each chunk's tensor; the kinds that occur."""
    rows: list[tuple[int, ...]] = []
    owner: list[int] = []
    for i, ((to, count, t_float), (source, _, s_float)) in enumerate(zip(teacher, student, strict=True)):
        aligned = to % 16 == 0 and source % 16 == 0
        rows.append((to, source, count, len(owner), (t_float * 3 + s_float) * 2 + aligned))
        owner += [i] * triton.cdiv(count, CHUNK)
    kinds = tuple(sorted({row[4] for row in rows}))
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    return table, torch.tensor(owner, dtype=torch.int64, device=device), kinds


@lru_cache(maxsize=16)
def _check_apart(teacher: tuple[tuple[int, int, int], ...]) -> None:
    """ValueError when tensors of the teacher share memory: one would be moved twice, or while it is read."""
    end, before = 0, -1
    for (address, count, dtype), i in sorted((place, i) for i, place in enumerate(teacher) if place[1]):
        if address < end:
            raise ValueError(f"want teacher tensors apart in memory, got {before} and {i} overlapping")
        end, before = address + count * FLOATS[dtype].itemsize, i


def launch(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    table, owner, kinds = _table(_places(teacher), _places(student), teacher[0].device)
    _update_kernel[(len(owner),)](table, owner, 1 - momentum, KINDS=kinds, CHUNK=CHUNK, num_warps=16)


# --- the op: schema, devices, fake ----------------------------------------------------------------


@torch.library.custom_op("fastmim::ema_update", mutates_args=("teacher",), device_types="cuda")
def _op(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    _check_apart(_places(teacher))
    launch(teacher, student, momentum)


@_op.register_kernel("cpu")
def _(teacher, student, momentum):
    _check_apart(_places(teacher))
    ema_update_reference(teacher, student, momentum)


@_op.register_fake
def _(teacher, student, momentum):
    return None


# --- public function -------------------------------------------------------------------------------


def ema_update(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    """`t <- momentum * t + (1 - momentum) * s`, in place, for all pairs of two lists. Takes no gradient.

    ValueError when the lists do not match in length, shapes and device, when a dtype or a stride does not
    fit, when tensors of the teacher overlap, or for a momentum outside [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"want a momentum in [0, 1], got {momentum}")
    if len(teacher) != len(student):
        raise ValueError(f"want as many students as teachers, got {len(student)} and {len(teacher)}")
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if t.shape != s.shape:
            raise ValueError(f"want equal shapes, got {tuple(t.shape)} and {tuple(s.shape)} at {i}")
        if t.dtype not in FLOATS or s.dtype not in FLOATS:
            raise ValueError(f"want fp32, bf16 or fp16, got {t.dtype} and {s.dtype} at {i}")
        if not t.device == s.device == teacher[0].device:
            raise ValueError(f"want all on {teacher[0].device}, got {t.device} and {s.device} at {i}")
        if not t.is_contiguous() or not s.is_contiguous():
            raise ValueError(f"want contiguous tensors, got strides {t.stride()} and {s.stride()} at {i}")
    if teacher:
        with torch.no_grad():
            _op(teacher, student, momentum)
