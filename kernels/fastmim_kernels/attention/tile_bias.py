"""The tile kernels with a bias of the logits, its gradient included: a backend of attention.py.

    s_ij      = q_i . k_j / sqrt(d) + bias_ij
    dbias_ij  = sum over the samples of p_ij (dp_ij - delta_i)

Biases travel as one tensor: of the segments that have one, `[H, n, n]` each, flat and end to end in `bias_L`;
`offsets` says where each segment's begins, -1 where it has none.

Shapes  as tile.py; a bias is of all samples.
Dtypes  as tile.py; a bias in any float dtype, added in fp32, and its gradient in it.
FLOP    8 * n^2 * d per head, sample and biased segment for the gradient of the bias, beside tile.py's: the
        products are made again, so that the sum over samples is one program's and its order fixed.
Bytes   beside tile.py's, the bias once for each sample that is not in L2, and for its gradient q, k, v and
        dout once more for each tile of 64 x 64 logits in a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmim_kernels.attention.tile import _heads, why_no_tile
from fastmim_kernels.attention.tile_triton import launch_backward, launch_backward_bias, launch_forward
from fastmim_kernels.once import differentiable_once


def biases_of(bias_L: Tensor, H: int, segments: Sequence[int], offsets: Sequence[int]) -> list[Tensor | None]:
    """The bias of each segment, `[H, n, n]`, out of what they travel as."""
    return [
        None if at < 0 else bias_L[at : at + H * n * n].view(H, n, n)
        for n, at in zip(segments, offsets, strict=True)
    ]


def _parts(segments: Sequence[int]) -> list[slice]:
    starts = [sum(segments[:s]) for s in range(len(segments))]
    return [slice(start, start + n) for start, n in zip(starts, segments, strict=True)]


def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, a sample at a time."""
    B, T, H, d = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)
    for part, bias in zip(_parts(segments), biases, strict=True):
        for b in range(B):
            block = slice(b, b + 1), part
            s = (_heads(q, block) @ _heads(k, block).mT).mul_(d**-0.5)
            s = s if bias is None else s.add_(bias.float())
            lse[b : b + 1, :, part] = s.logsumexp(-1)
            out[block] = (s.softmax(-1) @ _heads(v, block)).transpose(1, 2)
    return out, lse


def cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    segments: Sequence[int],
    biases: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Gradients of q, k, v and the biases, their logits made again."""
    scale = q.shape[3] ** -0.5
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    dbiases: list[Tensor | None] = []
    for part, bias in zip(_parts(segments), biases, strict=True):
        total = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for b in range(len(q)):
            block = slice(b, b + 1), part
            do, qs, ks, vs = (_heads(x, block) for x in (dout, q, k, v))
            s = (qs @ ks.mT).mul_(scale)
            s = s if bias is None else s.add_(bias.float())
            p = s.sub_(lse[b : b + 1, :, part, None]).exp_()
            dv[block] = (p.mT @ do).transpose(1, 2)
            dp = do @ vs.mT
            ds = p.mul_(dp.sub_((p * dp).sum(-1, keepdim=True)))
            if total is not None:
                total += ds[0]
            ds = ds.mul_(scale)
            dq[block] = (ds @ ks).transpose(1, 2)
            dk[block] = (ds.mT @ qs).transpose(1, 2)
        dbiases.append(None if total is None or bias is None else total.to(bias.dtype))
    return dq, dk, dv, dbiases


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::attention_tile_bias", mutates_args=(), device_types="cuda")
def _op(
    q: Tensor, k: Tensor, v: Tensor, bias_L: Tensor, segments: Sequence[int], offsets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return launch_forward(q, k, v, segments, biases_of(bias_L, q.shape[2], segments, offsets))


@_op.register_kernel("cpu")
def _(q, k, v, bias_L, segments, offsets):
    return cpu_forward(q, k, v, segments, biases_of(bias_L, q.shape[2], segments, offsets))


@_op.register_fake
def _(q, k, v, bias_L, segments, offsets):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("fastmim::attention_tile_bias_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_L: Tensor,
    segments: Sequence[int],
    offsets: Sequence[int],
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    biases = biases_of(bias_L, q.shape[2], segments, offsets)
    dq, dk, dv = launch_backward(dout, q, k, v, out, lse, segments, (True, True, True), biases)
    if not need_bias:
        return dq, dk, dv, bias_L[:0].clone()
    return dq, dk, dv, _flat(launch_backward_bias(dout, q, k, v, out, lse, segments, biases))


@_op_backward.register_kernel("cpu")
def _(dout, q, k, v, out, lse, bias_L, segments, offsets, need_bias):
    biases = biases_of(bias_L, q.shape[2], segments, offsets)
    dq, dk, dv, dbiases = cpu_backward(dout, q, k, v, lse, segments, biases)
    return dq, dk, dv, _flat(dbiases) if need_bias else bias_L[:0].clone()


@_op_backward.register_fake
def _(dout, q, k, v, out, lse, bias_L, segments, offsets, need_bias):
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    return dq, dk, dv, bias_L.new_empty(len(bias_L) if need_bias else 0)


def _flat(biases: Sequence[Tensor | None]) -> Tensor:
    """Biases as they travel."""
    parts = [bias.flatten() for bias in biases if bias is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, bias_L, ctx.segments, ctx.offsets = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, bias_L)


def _backward(ctx, dout: Tensor | None, _dlse: None):
    if dout is None:
        return (None,) * 6
    needs = ctx.needs_input_grad[:4]
    grads = _op_backward(dout, *ctx.saved_tensors, ctx.segments, ctx.offsets, needs[3])
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- for attention.py ------------------------------------------------------------------------------


def attention_tile_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: tuple[int, ...],
    key_segments: tuple[int, ...],
    biases: tuple[Tensor | None, ...] | None,
) -> Tensor:
    """Attention over `[B, T, H, d]` in `segments`, each with its bias or none, as attention.py has checked.

    Differentiable in q, k, v and the biases. Raises ValueError for what the kernels do not take.
    """
    obstacle = why_no_tile(segments, q.shape[3], q.dtype, q.device.type)
    if obstacle is not None:
        raise ValueError(f"attention: {obstacle}")
    if not all(x.stride(3) == 1 for x in (q, k, v)):
        raise ValueError("attention: the tile kernels want q, k and v with a contiguous last dim")
    assert biases is not None and key_segments == segments, "attention.py serves by what can serve"
    offsets, at = [], 0
    for bias in biases:
        offsets.append(-1 if bias is None else at)
        at += 0 if bias is None else bias.numel()
    dtype = next(bias.dtype for bias in biases if bias is not None)
    bias_L = _flat([None if bias is None else bias.to(dtype) for bias in biases])
    return _op(q, k, v, bias_L, segments, offsets)[0]
