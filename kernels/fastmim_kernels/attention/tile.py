"""Attention of short sequences, whole rows of logits at a time: a backend of attention.py.

    s_ij   = q_i . k_j / sqrt(d)            for the tokens j of i's own segment
    lse_i  = log sum over j of exp(s_ij)
    out_i  = sum over j of exp(s_ij - lse_i) v_j

Shapes  q, k, v, out `[B, T, H, d]`, lse `[B, H, T]`. `segments` are lengths that sum to T.
Dtypes  bf16 and fp16, and on the CPU fp32: its products would take more registers than a GPU has, and sdpa
        serves there. Logits, softmax and sums fp32, lse fp32; the probabilities enter their products in the
        dtype of the inputs; out and gradients in it too.
FLOP    4 * n^2 * d per head and segment of n tokens, 10 backward; 14 above 64 tokens, where the logits are
        made by the kernel of the queries and again by that of the keys.
Bytes   q, k, v read, out written, 4 bytes of lse per row; backward 7 of these tensors at up to 64 tokens.
Limits  1 to 256 tokens a segment; d 16 to 64 in steps of 8, to 128 in steps of 16; the last dim contiguous,
        any other strides. CUDA runs tile_triton.py; the CPU the definition, a few samples at a time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmim_kernels.attention.tile_triton import launch_backward, launch_forward, runs
from fastmim_kernels.once import differentiable_once

MAX_TOKENS = 256
WIDTHS = (*range(16, 64, 8), *range(64, 129, 16))  # others take more registers than sm_80 has
HALF = (torch.bfloat16, torch.float16)
CHUNK = 1 << 20  # logits that the CPU holds at once: 4 MB


# --- CPU: the definition, a few samples at a time -------------------------------------------------


def _blocks(q: Tensor, segments: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Samples that are worked on together, and the tokens of one segment."""
    B, _, H, _ = q.shape
    for start, length, count in runs(segments):
        step = max(1, CHUNK // max(1, H * length**2))
        for first in range(start, start + length * count, length):
            for b in range(0, B, step):
                yield slice(b, b + step), slice(first, first + length)


def _heads(x: Tensor, block: tuple[slice, slice]) -> Tensor:
    """`[B, T, H, d]` -> the block's `[b, H, n, d]` in fp32."""
    return x[block].transpose(1, 2).float()


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    B, T, H, d = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)
    for block in _blocks(q, segments):
        s = (_heads(q, block) @ _heads(k, block).mT).mul_(d**-0.5)
        lse[block[0], :, block[1]] = s.logsumexp(-1)
        out[block] = (s.softmax(-1) @ _heads(v, block)).transpose(1, 2)
    return out, lse


def cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, segments: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, their logits made again; no samples for one that is not needed."""
    scale = q.shape[3] ** -0.5
    dq, dk, dv = (q.new_empty(len(q) if need else 0, *q.shape[1:]) for need in needs)
    for block in _blocks(q, segments):
        do, qs, ks, vs = (_heads(x, block) for x in (dout, q, k, v))
        p = (qs @ ks.mT).mul_(scale).sub_(lse[block[0], :, block[1], None]).exp_()
        if needs[2]:
            dv[block] = (p.mT @ do).transpose(1, 2)
        if needs[0] or needs[1]:
            dp = do @ vs.mT
            ds = p.mul_(dp.sub_((p * dp).sum(-1, keepdim=True))).mul_(scale)
            if needs[0]:
                dq[block] = (ds @ ks).transpose(1, 2)
            if needs[1]:
                dk[block] = (ds.mT @ qs).transpose(1, 2)
    return dq, dk, dv


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::attention_tile", mutates_args=(), device_types="cuda")
def _op(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int]) -> tuple[Tensor, Tensor]:
    return launch_forward(q, k, v, segments)


@_op.register_kernel("cpu")
def _(q, k, v, segments):
    return cpu_forward(q, k, v, segments)


@_op.register_fake
def _(q, k, v, segments):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("fastmim::attention_tile_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Sequence[int],
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(dout, q, k, v, out, lse, segments, (need_q, need_k, need_v))


@_op_backward.register_kernel("cpu")
def _(dout, q, k, v, out, lse, segments, need_q, need_k, need_v):
    return cpu_backward(dout, q, k, v, lse, segments, (need_q, need_k, need_v))


@_op_backward.register_fake
def _(dout, q, k, v, out, lse, segments, need_q, need_k, need_v):
    B, *rest = q.shape
    dq, dk, dv = (q.new_empty(B if need else 0, *rest) for need in (need_q, need_k, need_v))
    return dq, dk, dv


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, ctx.segments = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx, dout: Tensor | None, _dlse: None):
    if dout is None:
        return (None,) * 4
    needs = ctx.needs_input_grad[:3]
    grads = _op_backward(dout, *ctx.saved_tensors, ctx.segments, *needs)
    dq, dk, dv = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dq, dk, dv, None


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- for attention.py ------------------------------------------------------------------------------


def why_no_tile(segments: Sequence[int], d: int, dtype: torch.dtype, device: str) -> str | None:
    """What keeps these kernels from serving, or None if nothing does."""
    if dtype not in HALF and not (device == "cpu" and dtype == torch.float32):
        return f"the tile kernels want bf16 or fp16, this is {str(dtype).removeprefix('torch.')}"
    if d not in WIDTHS:
        steps = "16 to 64 in steps of 8, to 128 in steps of 16"
        return f"the tile kernels want heads of {steps}, these are {d} wide"
    if max(segments) > MAX_TOKENS:
        return f"the tile kernels want at most {MAX_TOKENS} tokens a segment, there are {max(segments)}"
    return None


def attention_tile(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Attention over `[B, T, H, d]` in `segments`, which attention.py has checked. Differentiable in q, k, v.

    Raises ValueError for what the kernels do not take.
    """
    obstacle = why_no_tile(segments, q.shape[3], q.dtype, q.device.type)
    if obstacle is not None:
        raise ValueError(f"attention: {obstacle}")
    if not all(x.stride(3) == 1 for x in (q, k, v)):
        raise ValueError("attention: the tile kernels want q, k and v with a contiguous last dim")
    return _op(q, k, v, segments)[0]
