"""norm_pix_loss_image at the shapes of MAE pre-training: 147 of the 196 patches of each image are scored.

Question   what does the fused loss save, straight from the uint8 image, over eager and over torch.compile?
Expected   memory bound. At 1024 images in bf16 eager moves 10 to 13 GB; the op itself needs 0.58 GB if
           every value is read once and the gradient written once, 0.92 GB as a forward and a backward that
           each read their inputs. 12x over eager on a GPU; 1.5x over compile, which gathers for each pass.
Baselines  the reference with its casts, eager and compiled whole. Eager copies its constants to the device
           at each call and so waits for the host: at 64 images that is a part of its time.
Bytes      pred and target pixels once, the gradient once (forward_backward), the losses once.
"""

from collections.abc import Iterator
from functools import partial

import torch
from fastmim_kernels import norm_pix_loss_image
from fastmim_kernels.norm_pix_loss_image import norm_pix_loss_image_reference
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

IMAGES = [64, 256, 1024] if DEVICE == "cuda" else [32]
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
SIZE, PATCH, SCORED = 224, 16, 147
P = PATCH * PATCH * 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def eager(pred: Tensor, image: Tensor, index: Tensor) -> Tensor:
    return norm_pix_loss_image_reference(pred.float(), image, index, PATCH, MEAN, STD)


def fused(pred: Tensor, image: Tensor, index: Tensor) -> Tensor:
    return norm_pix_loss_image(pred, image, index, PATCH, MEAN, STD)


PROVIDERS = {"eager": eager, "compile": torch.compile(eager, dynamic=False), "fastmim": fused}


def forward(provider: str, pred: Tensor, image: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (PROVIDERS[provider](pred, image, index),)


def forward_backward(provider: str, pred: Tensor, image: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    loss = PROVIDERS[provider](pred, image, index)
    return loss.detach(), *torch.autograd.grad(loss.mean(), pred)


def cases() -> Iterator[list[Case]]:
    for images in IMAGES:
        image = torch.randint(0, 256, (images, SIZE, SIZE, 3), dtype=torch.uint8, device=DEVICE)
        index = torch.rand(images, (SIZE // PATCH) ** 2, device=DEVICE).argsort(1)[:, :SCORED].sort(1).values
        for dtype in DTYPES:
            pred = torch.randn(images, SCORED, P, device=DEVICE, dtype=dtype, requires_grad=True)
            values, size = images * SCORED * P, dtype.itemsize
            for run, traffic in ((forward, size + 1), (forward_backward, 2 * size + 1)):
                yield [
                    Case(
                        op="norm_pix_loss_image",
                        provider=provider,
                        mode=run.__name__,
                        shape={"B": images, "L": SCORED, "P": P},
                        dtype=f"{str(dtype).removeprefix('torch.')}, uint8",
                        bytes_moved=values * traffic + 4 * images * SCORED,
                        run=partial(run, provider, pred, image, index),
                    )
                    for provider in PROVIDERS
                ]
