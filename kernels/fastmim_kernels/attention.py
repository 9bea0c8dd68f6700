"""Multi-head attention without bias, dense or block-diagonal along the token axis.

    out_i = sum over j in segment(i) of softmax_j(q_i . k_j / sqrt(d)) v_j

`segments` splits the T tokens of every sample into runs that do not see one another. R-MAE packs its
two views so: segments (50, 148) of T = 198 tokens, one linear layer and one attention call for both.

Backends  "xformers": memory_efficient_attention of xformers or its heir MSLK, one call with a
          BlockDiagonalMask over the batch, attention_xformers.py.
          "sdpa": torch's scaled_dot_product_attention, once per segment.
          "tile": our own kernels for segments of at most 256 tokens, attention_tile.py.
          "varlen": torch.nn.attention.varlen, one call over the packed segments, attention_varlen.py.
          "auto": on the CPU sdpa. On CUDA those that can serve are timed, once for each kind of call, and
          the fastest serves; `attention_choices` says which, and the milliseconds of each.
Numbers   the backends differ by rounding only. Two ranks, or two runs, may measure differently: where the
          bits matter name a backend, or `pin_attention_choices` to those of the run before.
Tracing   torch.compile measures while it traces and takes the answer as a constant. A CUDA graph may not
          be measured in: what its warm-up has not chosen is served by sdpa, and not remembered.
Shapes    q, k, v `[B, T, H, d]`, any strides with a contiguous last dim; out `[B, T, H, d]`.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim_kernels.attention_tile import HALF, attention_tile, why_no_tile
from fastmim_kernels.attention_timing import (
    HEADS,
    Call,
    Layout,
    Serve,
    attention_choices,
    cuda_ms,
    fastest,
    pin_attention_choices,
)
from fastmim_kernels.attention_varlen import attention_varlen, why_no_varlen
from fastmim_kernels.attention_xformers import attention_xformers, remedy, why_no_xformers
from fastmim_kernels.tracing import constant_in_graphs

__all__ = [
    "Backend", "attention", "attention_choices", "attention_reference", "choose_attention", "obstacles",
    "pin_attention_choices",
]  # fmt: skip

Backend = Literal["auto", "xformers", "sdpa", "tile", "varlen"]
MEASURED_ON = "cuda"


def attention_reference(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...] | None = None) -> Tensor:
    """The definition, with a dense block-diagonal mask, in the dtype of its inputs. `[B, T, H, d]`."""
    T, d = q.shape[1], q.shape[3]
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * d**-0.5
    if segments is not None:
        owner_T = torch.arange(len(segments), device=q.device).repeat_interleave(
            torch.tensor(segments, device=q.device), output_size=T
        )
        logits = logits.masked_fill(owner_T[:, None] != owner_T[None, :], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)


# --- backends ---------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...]) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    runs = zip(*(x.split(segments, dim=2) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*run) for run in runs]
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)).transpose(1, 2)


BACKENDS: dict[str, Serve] = {
    "xformers": attention_xformers,
    "sdpa": _sdpa,
    "tile": attention_tile,
    "varlen": attention_varlen,
}


# --- what can serve -------------------------------------------------------------------------------------


def obstacles(segments: Sequence[int], width: int, dtype: torch.dtype, device: str) -> dict[str, str | None]:
    """Every backend and what keeps it from such a call, None if nothing does."""
    if device != "cuda":  # here too the remedy: the machine with a GPU may be installed like this one
        xformers: str | None = f"xformers has no {device} operator; {remedy()}"
    elif dtype not in HALF:
        xformers = f"xformers' fast operators want bf16 or fp16, this is {str(dtype).removeprefix('torch.')}"
    else:
        xformers = why_no_xformers()
    return {
        "xformers": xformers,
        "sdpa": None,
        "tile": why_no_tile(segments, width, dtype, device),
        "varlen": why_no_varlen(width, dtype, device),
    }


def choose_attention(requested: Backend, device: str, dtype: torch.dtype) -> tuple[Backend, str]:
    """What `requested` means on `device` ("cuda", "cpu") in `dtype`, and why, for a person to read.

    "auto" where it is still to be measured. Raises ValueError where a backend asked for by name cannot serve.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"attention: want auto, {', '.join(BACKENDS)}, got {requested!r}")
    found = obstacles((1,), 64, dtype, device)  # the shape of a call may be an obstacle to the tile as well
    if requested != "auto":
        if found[requested] is not None:
            raise ValueError(f"attention: {requested} asked for, but {found[requested]}")
        return requested, "asked for by name"
    if device != MEASURED_ON:
        return "sdpa", f"torch's own kernels serve on {device}"
    able = [name for name, obstacle in found.items() if obstacle is None]
    reasons = [obstacle for obstacle in found.values() if obstacle is not None]
    if able == ["sdpa"]:
        return "sdpa", "; ".join(reasons)
    why = f"the fastest of {', '.join(able)}, measured at the first call of each shape"
    return "auto", "; ".join((why, *reasons))


# --- the fastest ------------------------------------------------------------------------------------------


@constant_in_graphs
def _fastest(
    segments: tuple[int, ...], heads: int, width: int, batch: int, layout: Layout,
    dtype: torch.dtype, grad: bool, device: torch.device,
) -> str:  # fmt: skip
    """The backend for such calls, measured at the first of them."""
    dtype_name = str(dtype).removeprefix("torch.")
    call = Call(segments, heads, width, batch, layout, dtype_name, grad, _name_of(device))
    found = obstacles(segments, width, dtype, device.type)
    return fastest(call, dtype, device, BACKENDS, found, cuda_ms, attention_reference)


@cache
def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _choose(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...]) -> str:
    """`auto`. Sizes that a compiler holds open are only compared here, or become constants."""
    B, _, H, d = q.shape
    if q.device.type != MEASURED_ON or B == 0 or H == 0 or d == 0:
        return "sdpa"
    batch = 1
    while batch * 2 <= B and batch * H < HEADS:
        batch *= 2
    layout: Layout = "plain"
    if q.stride(1) == 3 * H * d:
        layout = "packed"
    elif q.stride(1) < q.stride(2):
        layout = "heads"
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    heads, width, *lengths = (len(range(n)) for n in (H, d, *segments))  # constants, for a compiler as well
    return _fastest(tuple(lengths), heads, width, batch, layout, q.dtype, grad, q.device)


# --- public function --------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, segments: tuple[int, ...] | None = None, backend: Backend = "auto"
) -> Tensor:
    """Attention over `[B, T, H, d]`, dense, or block-diagonal with `segments` (lengths that sum to T).

    Differentiable in q, k and v. Raises ValueError on mismatched shapes or segments, and where
    a backend asked for by name cannot serve.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"want three [B, T, H, d], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    segments = (q.shape[1],) if segments is None else tuple(segments)
    if sum(segments) != q.shape[1] or not segments or any(n < 1 for n in segments):
        raise ValueError(f"want positive segments that sum to T = {q.shape[1]}, got {segments}")
    if backend == "auto":
        chosen = _choose(q, k, v, segments)
    else:
        chosen = choose_attention(backend, q.device.type, q.dtype)[0]
    return BACKENDS[chosen](q, k, v, segments)
