"""Multi-head attention, dense or block-diagonal along the token axis, with a bias, to keys of another length.

    out_i = sum over j in segment(i) of softmax_j(q_i . k_j / sqrt(d) + bias_ij) v_j

`segments` splits the T tokens of every sample into runs that do not see one another. R-MAE packs its two
branches so: segments (50, 148) of T = 198 tokens, one linear layer and one attention call for both. With
`key_segments` the keys of a run are another number than its queries (cross-attention).

Backends  "xformers": memory_efficient_attention of xformers or its heir MSLK, memory_efficient.py: one call
          with a BlockDiagonalMask over the batch; with a bias one for each segment.
          "sdpa": torch's scaled_dot_product_attention, once per segment.
          "tile": our own kernels for segments of at most 256 tokens, tile.py; with a bias tile_bias.py.
          "varlen": torch.nn.attention.varlen, one call over the packed segments, varlen.py; takes no bias.
          "auto": on the CPU sdpa. On CUDA those that can serve are timed, once for each kind of call, and
          the fastest serves; `attention_choices` says which, and the milliseconds of each.
Numbers   the backends differ by rounding only. Two ranks, or two runs, may measure differently: where the
          bits matter name a backend, or `pin_attention_choices` to those of the run before.
Tracing   torch.compile measures while it traces and takes the answer as a constant. A CUDA graph may not
          be measured in: what its warm-up has not chosen is served by sdpa, and not remembered.
Shapes    q, k, v `[B, T, H, d]`, any strides with a contiguous last dim; out `[B, T, H, d]`. A bias is
          `[H, n, m]`, of n queries and m keys of a segment, the same for all samples, in any float dtype.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim_kernels.attention.memory_efficient import (
    attention_xformers,
    attention_xformers_general,
    remedy,
    why_no_xformers,
)
from fastmim_kernels.attention.tile import HALF, attention_tile, why_no_tile
from fastmim_kernels.attention.tile_bias import attention_tile_bias
from fastmim_kernels.attention.timing import (
    HEADS,
    Biases,
    Call,
    Layout,
    Serve,
    ServeGeneral,
    attention_choices,
    cuda_ms,
    fastest,
    pin_attention_choices,
)
from fastmim_kernels.attention.varlen import attention_varlen, attention_varlen_cross, why_no_varlen
from fastmim_kernels.tracing import constant_in_graphs

__all__ = [
    "Backend", "attention", "attention_choices", "attention_reference", "choose_attention", "obstacles",
    "pin_attention_choices",
]  # fmt: skip

Backend = Literal["auto", "xformers", "sdpa", "tile", "varlen"]
MEASURED_ON = "cuda"


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: tuple[int, ...] | None = None,
    key_segments: tuple[int, ...] | None = None,
    biases: Biases | None = None,
) -> Tensor:
    """The definition, with a dense block-diagonal mask, in the dtype of its inputs. `[B, T, H, d]`."""
    T, S, d = q.shape[1], k.shape[1], q.shape[3]
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * d**-0.5
    if segments is not None:
        key_segments = key_segments or segments
        owner_T, owner_S = (
            torch.arange(len(lengths), device=q.device).repeat_interleave(
                torch.tensor(lengths, device=q.device), output_size=total
            )
            for lengths, total in ((segments, T), (key_segments, S))
        )
        if biases is not None:
            parts = (
                torch.zeros(n, m, device=q.device).expand(q.shape[2], n, m) if bias is None else bias
                for n, m, bias in zip(segments, key_segments, biases, strict=True)
            )
            logits = logits + torch.stack([torch.block_diag(*heads) for heads in zip(*parts, strict=True)])
        logits = logits.masked_fill(owner_T[:, None] != owner_S[None, :], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)


# --- backends ---------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...]) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    runs = zip(*(x.split(segments, dim=2) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*run) for run in runs]
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)).transpose(1, 2)


def _sdpa_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: tuple[int, ...],
    key_segments: tuple[int, ...],
    biases: Biases | None,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lengths = segments, key_segments, key_segments
    runs = zip(*(x.split(n, dim=2) for x, n in zip((q, k, v), lengths, strict=True)), strict=True)
    masks = [None] * len(segments) if biases is None else biases
    outs = [
        F.scaled_dot_product_attention(qs, ks, vs, None if bias is None else bias.to(q.dtype)[None])
        for (qs, ks, vs), bias in zip(runs, masks, strict=True)
    ]
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)).transpose(1, 2)


BACKENDS: dict[str, Serve] = {
    "xformers": attention_xformers,
    "sdpa": _sdpa,
    "tile": attention_tile,
    "varlen": attention_varlen,
}
GENERAL: dict[str, ServeGeneral] = {  # with a bias, or keys of another length
    "xformers": attention_xformers_general,
    "sdpa": _sdpa_general,
    "tile": attention_tile_bias,
    "varlen": attention_varlen_cross,
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


def obstacles_of_general(
    segments: tuple[int, ...], key_segments: tuple[int, ...], biased: bool, d: int, dtype: torch.dtype,
    device: str,
) -> dict[str, str | None]:  # fmt: skip
    """The same of a call with a bias, or with keys of another length."""
    found = obstacles((*segments, *key_segments), d, dtype, device)
    if biased and found["varlen"] is None:
        found["varlen"] = "torch's varlen_attn takes no bias"
    if segments != key_segments and found["tile"] is None:
        found["tile"] = "the tile kernels want as many keys as queries"
    return found


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


def _choose_general(
    q: Tensor, k: Tensor, segments: tuple[int, ...], key_segments: tuple[int, ...], biases: Biases | None
) -> str:
    """`auto` of a call with a bias, or with keys of another length."""
    B, _, H, d = q.shape
    if q.device.type != MEASURED_ON or B == 0 or H == 0 or d == 0:
        return "sdpa"
    batch = 1
    while batch * 2 <= B and batch * H < HEADS:
        batch *= 2
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    lengths = tuple(len(range(n)) for n in segments), tuple(len(range(n)) for n in key_segments)
    biased = None if biases is None else tuple(bias is not None for bias in biases)
    return _fastest_general(*lengths, biased, len(range(H)), len(range(d)), batch, q.dtype, grad, q.device)


@constant_in_graphs
def _fastest_general(
    segments: tuple[int, ...], key_segments: tuple[int, ...], biased: tuple[bool, ...] | None,
    heads: int, width: int, batch: int, dtype: torch.dtype, grad: bool, device: torch.device,
) -> str:  # fmt: skip
    dtype_name = str(dtype).removeprefix("torch.")
    call = Call(
        segments, heads, width, batch, "plain", dtype_name, grad, _name_of(device),
        key_segments=key_segments, biased=biased,
    )  # fmt: skip
    found = obstacles_of_general(segments, key_segments, biased is not None, width, dtype, device.type)
    return fastest(call, dtype, device, GENERAL, found, cuda_ms, attention_reference)


# --- public function --------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: tuple[int, ...] | None = None,
    key_segments: tuple[int, ...] | None = None,
    bias: Tensor | Biases | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention over `[B, T, H, d]`, dense, or block-diagonal with `segments` (lengths that sum to T).

    `key_segments` are the lengths of the runs of k and v where they differ from those of q. `bias`,
    `[H, n, m]` of the one segment or a tuple with one for each, or None, is added to the logits.
    Differentiable in q, k, v and the bias. Raises ValueError on mismatched shapes or segments, and where
    a backend asked for by name cannot serve.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"want three [B, T, H, d], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if key_segments is None and k.shape[1] != q.shape[1]:
        raise ValueError(
            f"want three [B, T, H, d], or key_segments, got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    segments = (q.shape[1],) if segments is None else tuple(segments)
    _check_segments("segments", segments, q.shape[1])
    if key_segments is not None:
        key_segments = tuple(key_segments)
        _check_segments("key_segments", key_segments, k.shape[1])
        if len(key_segments) != len(segments):
            raise ValueError(f"want as many segments of keys as of queries, got {key_segments}, {segments}")
    biases = (bias,) if isinstance(bias, Tensor) else bias
    if biases is not None and all(one is None for one in biases):
        biases = None
    if not len(q):  # of no images torch's sdpa gives None on CUDA
        return attention_reference(q, k, v, segments, key_segments, biases)
    if biases is None and key_segments in (None, segments):
        if backend == "auto":
            chosen = _choose(q, k, v, segments)
        else:
            chosen = choose_attention(backend, q.device.type, q.dtype)[0]
        return BACKENDS[chosen](q, k, v, segments)
    key_segments = key_segments or segments
    if biases is not None:
        _check_biases(biases, segments, key_segments, q)
        # as they are measured: torch's fused kernels leave one with other strides to its unfused path
        biases = tuple(None if bias is None else bias.contiguous() for bias in biases)
    if backend == "auto":
        chosen = _choose_general(q, k, segments, key_segments, biases)
    else:
        chosen = choose_attention(backend, q.device.type, q.dtype)[0]
        biased, d = biases is not None, q.shape[3]
        found = obstacles_of_general(segments, key_segments, biased, d, q.dtype, q.device.type)
        if found[chosen] is not None:
            raise ValueError(f"attention: {chosen} asked for, but {found[chosen]}")
    return GENERAL[chosen](q, k, v, segments, key_segments, biases)


def _check_segments(name: str, segments: tuple[int, ...], total: int) -> None:
    if sum(segments) != total or not segments or any(n < 1 for n in segments):
        raise ValueError(f"want positive {name} that sum to T = {total}, got {segments}")


def _check_biases(
    biases: Biases, segments: tuple[int, ...], key_segments: tuple[int, ...], q: Tensor
) -> None:
    """ValueError unless there is one of the right shape and place for each segment."""
    if len(biases) != len(segments):
        raise ValueError(f"want a bias, or None, for each of {len(segments)} segments, got {len(biases)}")
    for bias, n, m in zip(biases, segments, key_segments, strict=True):
        if bias is None:
            continue
        if bias.shape != (q.shape[2], n, m) or not bias.is_floating_point() or bias.device != q.device:
            raise ValueError(
                f"want a bias of floats {(q.shape[2], n, m)} on {q.device}, got {bias.dtype} "
                f"{tuple(bias.shape)} on {bias.device}"
            )
