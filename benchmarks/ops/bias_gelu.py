"""bias_gelu in the MLP of a ViT-B: 3072 values of each of an image's 197 tokens.

Question   what does one pass save over an addition and a GELU?
Expected   memory bound: one tensor read and one written where two ops read and write two each; the backward
           keeps the product alone and reads it with the gradient. 90 % of a copy's bandwidth. compile fuses
           both directions too and is met, not beaten, but for the sum over rows.
Baselines  the reference in the dtype of its inputs, eager and compiled whole; all are checked against it in
           fp32. A linear layer of torch adds its bias in its product's epilogue where it can: there an eager
           model has one pass less than the eager form here.
Bytes      x read, y written; backward: x and the gradient read, the gradient of x written.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fastmim_kernels import bias_gelu
from fastmim_kernels.bias_gelu import bias_gelu_reference
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

IMAGES = [64, 512] if DEVICE == "cuda" else [8]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
T, D = 197, 3072
PROVIDERS: dict[str, Callable[..., Any]] = {
    "eager": bias_gelu_reference,
    "compile": torch.compile(bias_gelu_reference, dynamic=False),
    "fastmim": bias_gelu,
}


def forward(provider: str, x: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (PROVIDERS[provider](x, bias),)


def forward_backward(provider: str, x: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    out = PROVIDERS[provider](x, bias)
    return out.detach(), *torch.autograd.grad(out, (x, bias), grad)


def oracle(run: str, x: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves: list[Any] = [v.detach().float().requires_grad_() for v in (x, bias)]
    wide_x, wide_bias = leaves
    found = forward_backward("eager", wide_x, wide_bias, grad.float())
    return found[:1] if run == "forward" else found


def cases() -> Iterator[list[Case]]:
    for images in IMAGES:
        x = torch.randn(images, T, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
        bias = torch.randn(D, device=DEVICE, dtype=DTYPE, requires_grad=True)
        grad = torch.randn(images, T, D, device=DEVICE, dtype=DTYPE)
        for run, passes in ((forward, 2), (forward_backward, 5)):
            yield [
                Case(
                    op="bias_gelu",
                    provider=provider,
                    mode=run.__name__,
                    shape={"M": images * T, "D": D},
                    dtype=str(DTYPE).removeprefix("torch."),
                    bytes_moved=passes * x.numel() * DTYPE.itemsize,
                    run=partial(run, provider, x, bias, grad),
                    oracle=partial(oracle, run.__name__, x, bias, grad),
                )
                for provider in PROVIDERS
            ]
