"""gather_patches as MAE's patch embedding wants it: 49 of the 196 patches of each uint8 image.

Question   what does one pass from uint8 to normalized rows save over normalizing and gathering apart?
Expected   memory bound: one byte read, two written per value on a GPU. 90 % of a copy's bandwidth, 1.3x over
           compile. The float image with its gradient is the case of those who augment on the device.
Baselines  the reference, eager and compiled whole. It gathers first and normalizes what it gathered; the
           provider "whole" normalizes and cuts up the whole image first, as MAE's own code does.
Bytes      chosen pixels read once, rows written once; backward: rows read once, the image's gradient written
           once, all of it.
"""

from collections.abc import Iterator
from functools import partial

import torch
from fastmim_kernels import gather_patches
from fastmim_kernels.gather_patches import gather_patches_reference
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

IMAGES = [256, 1024] if DEVICE == "cuda" else [32]
ROWS = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SIZE, PATCH, SEEN = 224, 16, 49
P = PATCH * PATCH * 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def eager(image: Tensor, index: Tensor) -> Tensor:
    return gather_patches_reference(image, index, PATCH, MEAN, STD, ROWS)


def whole(image: Tensor, index: Tensor) -> Tensor:
    x = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    x = (x - x.new_tensor(MEAN)) / x.new_tensor(STD)
    cells = x.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).transpose(2, 3)
    return cells.reshape(len(x), -1, P).gather(1, index[..., None].expand(-1, -1, P)).to(ROWS)


def fused(image: Tensor, index: Tensor) -> Tensor:
    return gather_patches(image, index, PATCH, MEAN, STD, dtype=ROWS)


PROVIDERS = {
    "eager": eager,
    "whole": whole,
    "compile": torch.compile(eager, dynamic=False),
    "fastmim": fused,
}


def forward(provider: str, image: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (PROVIDERS[provider](image, index),)


def forward_backward(provider: str, image: Tensor, index: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    rows = PROVIDERS[provider](image, index)
    return rows.detach(), *torch.autograd.grad(rows, image, grad)


def cases() -> Iterator[list[Case]]:
    for images in IMAGES:
        pixels = torch.randint(0, 256, (images, SIZE, SIZE, 3), dtype=torch.uint8, device=DEVICE)
        floats = (pixels.float() / 255).requires_grad_()
        index = torch.rand(images, (SIZE // PATCH) ** 2, device=DEVICE).argsort(1)[:, :SEEN].sort(1).values
        grad = torch.randn(images, SEEN, P, device=DEVICE, dtype=ROWS)
        values, row = images * SEEN * P, ROWS.itemsize
        for run, image, traffic in (
            (forward_backward, floats, values * (4 + 2 * row) + 4 * floats.numel()),
            (forward, pixels, values * (1 + row)),
        ):
            yield [
                Case(
                    op="gather_patches",
                    provider=provider,
                    mode=run.__name__,
                    shape={"B": images, "K": SEEN, "P": P},
                    dtype=f"{str(image.dtype).removeprefix('torch.')} to {str(ROWS).removeprefix('torch.')}",
                    bytes_moved=traffic,
                    run=partial(run, provider, image, index, grad),
                )
                for provider in PROVIDERS
            ]
