"""attention at the shapes of MAE and R-MAE: short sequences, many of them.

Question   which back end is fastest at 50 tokens, at 197 tokens of heads of 32, and at two views packed into
           one sequence; and does `auto` choose it? "fastmim" is `auto`, "tile" our own kernels, "varlen"
           torch's FlashAttention over the packed segments.
Expected   3 to 8 % of a step. At 50 tokens a tile is half empty, so kernels made for long sequences leave
           much; two packed views cost sdpa two calls, xformers and varlen one, the tile kernels one of each
           length.
           The tile's forward holds whole rows of logits: bound by bytes at 50 tokens, near the exponentials'
           rate at 197 tokens of heads of 32.
Baselines  the reference (a softmax of a matrix) in the dtype of its inputs, eager and compiled whole; torch's
           and xformers' kernels. All are checked against the reference in fp32.
FLOP       4 T^2 d of each head, segment by segment; backward twice that. Recomputation earns nothing.
Bytes      q, k, v read and out written; backward those and the gradient read, three gradients written.
Layout     that of training: q, k and v are views of one product [B, T, 3, H, d], and so is their gradient,
           which a back end that makes three has to put together.
Bias       of SimMIM, BEiT and data2vec: one matrix of each head, added to the logits of every image, as the
           encoder makes it of its table, with the strides of a permuted view, and with its gradient.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fastmim_kernels import attention
from fastmim_kernels.attention import (
    attention_choices,
    attention_reference,
    choose_attention,
    obstacles_of_general,
)
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

IMAGES = [1024] if DEVICE == "cuda" else [16]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = [  # segments, heads, width of a head, whether there is a bias
    ((197,), 16, 32, False),  # the decoder of MAE
    ((197,), 12, 64, True),  # SimMIM, BEiT and data2vec ViT-B
    ((197,), 12, 64, False),  # an encoder that sees all: supervised ViT-B
    ((50, 148), 12, 64, False),  # the encoder of R-MAE ViT-B, two views packed
    ((50,), 12, 64, False),  # the encoder of MAE ViT-B
]


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, segments: tuple[int, ...], bias: Tensor | None = None
) -> Tensor:
    """The definition, called as `attention` is."""
    return attention_reference(q, k, v, segments, None, None if bias is None else (bias,))


PROVIDERS: dict[str, Callable[..., Any]] = {
    "eager": reference,
    "compile": torch.compile(reference, dynamic=False),
    "sdpa": partial(attention, backend="sdpa"),
    "xformers": partial(attention, backend="xformers"),
    "tile": partial(attention, backend="tile"),
    "varlen": partial(attention, backend="varlen"),
    "fastmim": attention,
}


def oracle(
    q: Tensor, k: Tensor, v: Tensor, *, segments: tuple[int, ...], bias: Tensor | None = None
) -> Tensor:
    bias = None if bias is None else bias.float()
    return reference(q.float(), k.float(), v.float(), segments=segments, bias=bias).to(q.dtype)


def forward_backward(
    provider: str, qkv: Tensor, segments: tuple[int, ...], grad: Tensor, table_TTH: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Output, and the gradients of q, k, v and the bias, each compared by its own largest value."""
    attend: Callable[..., Tensor] = oracle if provider == "oracle" else PROVIDERS[provider]
    if table_TTH is None:
        out = attend(*qkv.unbind(2), segments=segments)
        (dqkv,) = torch.autograd.grad(out, qkv, grad)
        return out.detach(), *dqkv.unbind(2)
    out = attend(*qkv.unbind(2), segments=segments, bias=table_TTH.permute(2, 0, 1))
    dqkv, dbias = torch.autograd.grad(out, (qkv, table_TTH), grad)
    return out.detach(), *dqkv.unbind(2), dbias


def served(provider: str, segments: tuple[int, ...], d: int, biased: bool) -> str:
    """What a provider's calls went to; of `auto`, the fastest as it was measured."""
    if provider == "tile":
        return "triton" if DEVICE == "cuda" else "reference"
    if provider != "fastmim":
        return provider
    uses = {
        c["use"]
        for c in attention_choices()
        if (tuple(c["segments"]), c["width"], any(c.get("biased") or ())) == (segments, d, biased)
    }
    return ", ".join(sorted(uses)) or choose_attention("auto", DEVICE, DTYPE)[0]


def cases() -> Iterator[list[Case]]:
    for images in IMAGES:
        for segments, heads, d, biased in SHAPES:
            T = sum(segments)
            qkv = torch.randn(images, T, 3, heads, d, device=DEVICE, dtype=DTYPE, requires_grad=True)
            absent = obstacles_of_general(segments, segments, biased, d, DTYPE, DEVICE)
            table = (
                torch.randn(T, T, heads, device=DEVICE, dtype=DTYPE, requires_grad=True) if biased else None
            )
            grad = torch.randn(images, T, heads, d, device=DEVICE, dtype=DTYPE)
            yield [
                Case(
                    op="attention",
                    provider=provider,
                    mode="forward_backward",
                    shape={"B": images, "T": T, "segments": len(segments), "H": heads, "d": d}
                    | ({"bias": True} if biased else {}),
                    dtype=str(DTYPE).removeprefix("torch."),
                    bytes_moved=12 * grad.numel() * DTYPE.itemsize,
                    flops=3 * 4 * images * heads * d * sum(n * n for n in segments),
                    run=partial(forward_backward, provider, qkv, segments, grad, table),
                    oracle=partial(forward_backward, "oracle", qkv, segments, grad, table),
                    absent=absent.get(provider),
                    served=partial(served, provider, segments, d, biased),
                )
                for provider in PROVIDERS
            ]
