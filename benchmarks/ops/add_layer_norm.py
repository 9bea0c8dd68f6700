"""add_layer_norm between the branches of a ViT-B block: all 197 tokens, as SimMIM and data2vec encode them.

Question   what does one pass save over an addition and a LayerNorm, plain, and with LayerScale and drop path?
Expected   memory bound: two tensors read and two written where the ops apart read three and write two; with
           LayerScale and drop path they move nine. 90 % of a copy's bandwidth; compile fuses the forward too,
           so what is won over it is won in the backward, whose sums over all rows it makes apart.
Baselines  the reference in the dtype of its inputs, which is torch's own LayerNorm, eager and compiled whole;
           all are checked against the reference in fp32.
Bytes      branch and residual read, sum and normed written; backward: two gradients and the sum read, one
           gradient written that serves both inputs; with LayerScale the branch is read and written as well.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fastmim_kernels import add_layer_norm
from fastmim_kernels.add_layer_norm import add_layer_norm_reference
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

IMAGES = [256, 1024] if DEVICE == "cuda" else [16]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
T, D, EPS, KEPT = 197, 768, 1e-6, 0.9


def eager(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, keep: Tensor | None
):
    """`keep` is in fp32, and would make fp32 of all that it is multiplied with."""
    keep = None if keep is None else keep.to(x.dtype)
    return add_layer_norm_reference(x, residual, weight, bias, EPS, scale, keep)


def fused(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, keep: Tensor | None
):
    return add_layer_norm(x, residual, weight, bias, eps=EPS, scale=scale, keep=keep)


PROVIDERS: dict[str, Callable[..., Any]] = {
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
    "fastmim": fused,
}


def forward(
    provider: str, inputs: tuple, keep: Tensor | None, grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return PROVIDERS[provider](*inputs, keep)


def forward_backward(
    provider: str, inputs: tuple, keep: Tensor | None, grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    outs = PROVIDERS["eager" if provider == "oracle" else provider](*inputs, keep)
    learn = [v for v in inputs if v is not None]
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, learn, grads)


def oracle(run: str, inputs: tuple, keep: Tensor | None, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    wide = tuple(None if v is None else v.detach().float().requires_grad_() for v in inputs)
    found = forward_backward("oracle", wide, keep, tuple(g.float() for g in grads))
    return found[:2] if run == "forward" else found


def cases() -> Iterator[list[Case]]:
    for images in IMAGES:
        for form in ("plain", "scale and keep"):
            shapes = [(images, T, D)] * 2 + [(D,)] * (2 if form == "plain" else 3)
            inputs: tuple[Any, ...] = tuple(
                torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for shape in shapes
            )
            keep: Tensor | None = None
            inputs = (*inputs, None)
            if form != "plain":
                inputs, keep = inputs[:-1], torch.rand(images, device=DEVICE).lt(KEPT).float() / KEPT
            grads = tuple(torch.randn(images, T, D, device=DEVICE, dtype=DTYPE) for _ in range(2))
            tensor = images * T * D * DTYPE.itemsize
            back = 4 if form == "plain" else 6
            for run, passes in ((forward, 4), (forward_backward, 4 + back)):
                yield [
                    Case(
                        op="add_layer_norm",
                        provider=provider,
                        mode=f"{run.__name__}, {form}",
                        shape={"B": images, "T": T, "D": D},
                        dtype=str(DTYPE).removeprefix("torch."),
                        bytes_moved=passes * tensor,
                        run=partial(run, provider, inputs, keep, grads),
                        oracle=partial(oracle, run.__name__, inputs, keep, grads),
                    )
                    for provider in PROVIDERS
                ]
