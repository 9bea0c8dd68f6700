"""Multi-head attention without bias, dense or block-diagonal along the token axis.

    out_i = sum over j in segment(i) of softmax_j(q_i . k_j / sqrt(d)) v_j

`segments` splits the T tokens of every sample into runs that do not see one another. R-MAE packs its
two views so: segments (50, 148) of T = 198 tokens, one linear layer and one attention call for both.

Backends  "xformers": memory_efficient_attention, one call with a BlockDiagonalMask over the batch.
          "sdpa": torch's scaled_dot_product_attention, once per segment. Same numbers up to rounding.
          "auto": xformers on CUDA in half precision where it is installed, sdpa elsewhere.
Shapes    q, k, v `[B, T, H, d]`, any strides with a contiguous last dim; out `[B, T, H, d]`.
Limits    xformers 0.0.34 to 0.0.35: the releases after them move its attention to another package.

This is the only file that knows xformers.
"""

from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "xformers", "sdpa"]


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


@lru_cache(maxsize=16)
def _block_diagonal(segments: tuple[int, ...], batch: int, device: torch.device):
    # built once per shape: its offsets go to the device, which would be a copy per layer and step
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(list(segments) * batch, device=device)


def _xformers(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...]) -> Tensor:
    from xformers.ops import memory_efficient_attention

    B, T, H, d = q.shape
    if len(segments) == 1:
        return memory_efficient_attention(q, k, v)
    mask = _block_diagonal(segments, B, q.device)
    packed = (x.reshape(1, B * T, H, d) for x in (q, k, v))
    return memory_efficient_attention(*packed, attn_bias=mask).view(B, T, H, d)


# --- choice -----------------------------------------------------------------------------------------


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


XFORMERS = _installed("xformers")  # looked up once: the choice below is made at every call


@torch.compiler.assume_constant_result
@cache
def why_no_xformers() -> str | None:
    """What keeps xformers from serving on this CUDA device, or None if nothing does.

    Tried, not deduced, once: a wheel installs beside any torch, and its operators may yet fail to load.
    """
    if XFORMERS is None:
        return "xformers is not installed"
    try:
        q = torch.zeros(1, 8, 1, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        _xformers(q, q, q, (3, 5)).sum().backward()
    except Exception as error:
        return f"xformers {XFORMERS} does not work here: {str(error).strip().splitlines()[0]}"
    return None


def choose_attention(requested: Backend, device: str, dtype: torch.dtype) -> tuple[Backend, str]:
    """What `requested` means on `device` ("cuda", "cpu") in `dtype`, and why, for a person to read.

    Raises ValueError where a backend asked for by name cannot serve.
    """
    if requested not in ("auto", "xformers", "sdpa"):
        raise ValueError(f"attention: want auto, xformers or sdpa, got {requested!r}")
    if device != "cuda":
        obstacle = f"xformers has no {device} operator"
    elif dtype not in (torch.bfloat16, torch.float16):
        obstacle = f"xformers' fast operators want bf16 or fp16, this is {str(dtype).removeprefix('torch.')}"
    else:
        obstacle = why_no_xformers()
    if requested == "sdpa":
        return "sdpa", "asked for by name"
    if obstacle is None:
        return "xformers", "asked for by name" if requested == "xformers" else f"xformers {XFORMERS} on CUDA"
    if requested == "xformers":
        raise ValueError(f"attention: xformers asked for, but {obstacle}")
    return "sdpa", obstacle


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
    if sum(segments) != q.shape[1] or min(segments, default=0) < 1:
        raise ValueError(f"want positive segments that sum to T = {q.shape[1]}, got {segments}")
    chosen = choose_attention(backend, q.device.type, q.dtype)[0]
    return (_xformers if chosen == "xformers" else _sdpa)(q, k, v, segments)
