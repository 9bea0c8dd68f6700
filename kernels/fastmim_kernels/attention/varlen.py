"""torch.nn.attention.varlen as a backend of attention.py: FlashAttention over segments packed end to end.

One launch for all segments of all samples, dense attention included, whatever their lengths.

Shapes  q, k, v, out `[B, T, H, d]`. `segments` are lengths that sum to T; the offsets of all runs are int32
        `[B * len(segments) + 1]`, made on the device: a copy from the host would wait, and has no place in a
        CUDA graph.
Dtypes  bf16 and fp16.
Limits  CUDA from sm_80; d a multiple of 8 up to 256; torch from 2.10. A layout whose samples and tokens do
        not make one dimension (`[B, H, T, d]` transposed) is copied first.
"""

from functools import cache, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from fastmim_kernels.attention.memory_efficient import why_broken
from fastmim_kernels.attention.tile import HALF
from fastmim_kernels.tracing import constant_in_graphs

MAX_WIDTH = 256


def _offsets(segments: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """Where each run begins among all B * T tokens, and their end. `[batch * len(segments) + 1]`, int32."""
    firsts = torch.arange(batch + 1, dtype=torch.int32, device=device) * sum(segments)
    starts = torch.stack([firsts + before for before in accumulate(segments[:-1], initial=0)], dim=1)
    return starts.flatten()[: batch * len(segments) + 1]


@lru_cache(maxsize=64)
def _kept_offsets(segments: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a training step may be the next to take them
        return _offsets(segments, batch, device)


def _may_be_kept(q: Tensor) -> bool:
    """Not by a compiler, which makes them once for all layers; not where only shapes are looked at; not in a
    CUDA graph, whose memory is its own."""
    if torch.compiler.is_compiling() or type(q) is not Tensor:
        return False
    return not (q.is_cuda and torch.cuda.is_current_stream_capturing())


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Attention over `[B, T, H, d]` in `segments`, checked by attention.py. Differentiable in q, k, v."""
    from torch.nn.attention.varlen import varlen_attn

    offsets = (_kept_offsets if _may_be_kept(q) else _offsets)(segments, len(q), q.device)
    longest = max(segments)
    packed_q, packed_k, packed_v = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(packed_q, packed_k, packed_v, offsets, offsets, longest, longest)
    assert isinstance(out, Tensor)  # and no tuple, without return_aux
    return out.view(q.shape)


def attention_varlen_cross(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: tuple[int, ...],
    key_segments: tuple[int, ...],
    biases: tuple[Tensor | None, ...] | None,
) -> Tensor:
    """The same where the keys of a segment are another number than its queries; there is no bias."""
    from torch.nn.attention.varlen import varlen_attn

    assert biases is None, "attention.py serves by what can serve"
    offsets_of = _kept_offsets if _may_be_kept(q) else _offsets
    offsets, key_offsets = (offsets_of(runs, len(q), q.device) for runs in (segments, key_segments))
    longest, packed_q, packed_k, packed_v = max(segments), *(x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(packed_q, packed_k, packed_v, offsets, key_offsets, longest, max(key_segments))
    assert isinstance(out, Tensor)
    return out.view(q.shape)


@constant_in_graphs
@cache
def _why_not_here() -> str | None:
    """What keeps it from serving on this CUDA device. Tried, once: a torch or a device may lack it."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen, torch 2.10 has"
    try:
        q = torch.zeros(1, 8, 1, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        attention_varlen(q, q, q, (3, 5)).sum().backward()
    except Exception as error:
        return f"torch's varlen_attn does not work here ({why_broken(error)})"
    return None


def why_no_varlen(width: int, dtype: torch.dtype, device: str) -> str | None:
    """What keeps it from serving such calls, or None if nothing does."""
    if device != "cuda":
        return f"torch's varlen_attn has no {device} operator"
    if dtype not in HALF:
        return f"torch's varlen_attn wants bf16 or fp16, this is {str(dtype).removeprefix('torch.')}"
    if width % 8 or not 0 < width <= MAX_WIDTH:
        return f"torch's varlen_attn wants heads of a multiple of 8 up to {MAX_WIDTH}, these are {width} wide"
    return _why_not_here()
