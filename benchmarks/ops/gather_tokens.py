"""gather_tokens as MAE's encoder wants it: 49 of 196 embedded patches, positions added, class token in front.

Question   what does one pass over the visible tokens save over adding to all of them, gathering and joining?
Expected   memory bound: a quarter of the tokens read, as many written; the backward writes a gradient for all
           of them, zeros for the hidden. 90 % of a copy's bandwidth; 1.3x over MAE's form and over compile.
Baselines  the reference with its casts to fp32, which gathers first, eager and compiled whole. "whole" adds
           the positions to all tokens first, as MAE's own code does, in the tokens' dtype: the one to beat.
Bytes      visible tokens and their index read once, the output written once; backward: its gradient read
           once, that of all tokens written once. Positions and class token are too small to count.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fastmim_kernels import gather_tokens
from fastmim_kernels.gather_tokens import gather_tokens_reference
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

IMAGES = [256, 1024] if DEVICE == "cuda" else [32]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
N, K, D = 196, 49, 768


def eager(tokens: Tensor, index: Tensor, pos: Tensor, cls: Tensor) -> Tensor:
    return gather_tokens_reference(tokens.float(), index, pos.float(), cls.float()).to(tokens.dtype)


def whole(tokens: Tensor, index: Tensor, pos: Tensor, cls: Tensor) -> Tensor:
    seen = (tokens + pos).gather(1, index[..., None].expand(-1, -1, D))
    return torch.cat([cls.expand(len(seen), 1, D), seen], dim=1)


PROVIDERS: dict[str, Callable[..., Any]] = {
    "eager": eager,
    "whole": whole,
    "compile": torch.compile(eager, dynamic=False),
    "fastmim": gather_tokens,
}


def forward(provider: str, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (PROVIDERS[provider](*inputs),)


def forward_backward(provider: str, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    tokens, _, _, cls = inputs
    out = PROVIDERS[provider](*inputs)
    return out.detach(), *torch.autograd.grad(out, (tokens, cls), grad)


def cases() -> Iterator[list[Case]]:
    for images in IMAGES:
        tokens = torch.randn(images, N, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
        cls = torch.randn(D, device=DEVICE, dtype=DTYPE, requires_grad=True)
        pos = torch.randn(N, D, device=DEVICE, dtype=DTYPE)
        index = torch.rand(images, N, device=DEVICE).argsort(1)[:, :K].sort(1).values
        inputs = (tokens, index, pos, cls)
        grad = torch.randn(images, K + 1, D, device=DEVICE, dtype=DTYPE)
        token = D * DTYPE.itemsize
        once = images * (K * token + (K + 1) * token + 8 * K)
        back = images * ((K + 1) * token + N * token + 8 * K)
        for run, traffic in ((forward, once), (forward_backward, once + back)):
            yield [
                Case(
                    op="gather_tokens",
                    provider=provider,
                    mode=run.__name__,
                    shape={"B": images, "N": N, "K": K, "D": D},
                    dtype=str(DTYPE).removeprefix("torch."),
                    bytes_moved=traffic,
                    run=partial(run, provider, inputs, grad),
                )
                for provider in PROVIDERS
            ]
