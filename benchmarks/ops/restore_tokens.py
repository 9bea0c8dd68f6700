"""restore_tokens as MAE's decoder wants it: 49 of 196 patches and the class token come back, width 512.

Question   what does writing the decoder's input once save over expand, concatenate, gather and add?
Expected   memory bound: a quarter of the tokens read, all written. 90 % of a copy's bandwidth; 1.3x over
           the gather form and over compile.
Baselines  the reference (one index of a table) with its casts to fp32, eager and compiled whole: its backward
           sums all mask tokens into one row of the table, which is slow and in bf16 would be wrong. "gather",
           the form of MAE's code, in the dtype of the tokens, is the one to beat.
Bytes      encoded tokens read once, the output written once, the index read once; backward: its gradient
           read once, that of the tokens written once. Positions and mask token are too small to count.
"""

from collections.abc import Iterator
from functools import partial

import torch
from fastmim_kernels import restore_tokens
from fastmim_kernels.restore_tokens import restore_tokens_reference
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

IMAGES = [256, 1024] if DEVICE == "cuda" else [32]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
PATCHES, SEEN, D = 196, 49, 512
N, K = 1 + PATCHES, 1 + SEEN


def eager(tokens: Tensor, mask_token: Tensor, pos: Tensor, source: Tensor, _: Tensor) -> Tensor:
    floats = (x.float() for x in (mask_token, pos))
    return restore_tokens_reference(tokens.float(), source, *floats).to(tokens.dtype)


def gather(tokens: Tensor, mask_token: Tensor, pos: Tensor, source: Tensor, restore: Tensor) -> Tensor:
    """Mask tokens behind each image's own tokens, then one gather, each row of them taken once."""
    x = tokens.view(len(source), K, D)
    table = torch.cat([x, mask_token.expand(len(source), N - K, D)], dim=1)
    return table.gather(1, restore[..., None].expand(-1, -1, D)) + pos


def fused(tokens: Tensor, mask_token: Tensor, pos: Tensor, source: Tensor, _: Tensor) -> Tensor:
    return restore_tokens(tokens, source, mask_token, pos)


PROVIDERS = {
    "eager": eager,
    "gather": gather,
    "compile": torch.compile(eager, dynamic=False),
    "fastmim": fused,
}


def forward(provider: str, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (PROVIDERS[provider](*inputs),)


def forward_backward(provider: str, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    tokens, mask_token = inputs[:2]
    out = PROVIDERS[provider](*inputs)
    return out.detach(), *torch.autograd.grad(out, (tokens, mask_token), grad)


def places(images: int) -> tuple[Tensor, Tensor]:
    """For every position its row of all tokens or -1, and its row of its image's table. Both `[B, N]`.

    The class token comes first, each image's K - 1 patches are at random places.
    """
    place = torch.rand(images, PATCHES, device=DEVICE).argsort(1)[:, :SEEN].sort(1).values + 1
    place = torch.cat([place.new_zeros(images, 1), place], dim=1)
    rows = torch.arange(images * K, device=DEVICE).view(images, K)
    source = torch.full((images, N), -1, device=DEVICE).scatter_(1, place, rows)
    hidden = source < 0
    return source, torch.where(hidden, K - 1 + hidden.cumsum(1), source - rows[:, :1])


def cases() -> Iterator[list[Case]]:
    for images in IMAGES:
        tokens = torch.randn(images * K, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
        mask_token = torch.randn(D, device=DEVICE, dtype=DTYPE, requires_grad=True)
        pos = torch.randn(N, D, device=DEVICE, dtype=DTYPE)
        inputs = (tokens, mask_token, pos, *places(images))
        grad = torch.randn(images, N, D, device=DEVICE, dtype=DTYPE)
        once = (images * N * D + images * K * D) * DTYPE.itemsize + 8 * images * N
        for run, traffic in ((forward, once), (forward_backward, 2 * once)):
            yield [
                Case(
                    op="restore_tokens",
                    provider=provider,
                    mode=run.__name__,
                    shape={"B": images, "N": N, "R": images * K, "D": D},
                    dtype=str(DTYPE).removeprefix("torch."),
                    bytes_moved=traffic,
                    run=partial(run, provider, inputs, grad),
                )
                for provider in PROVIDERS
            ]
