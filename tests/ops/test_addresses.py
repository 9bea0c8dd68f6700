"""Offsets beyond 2**31 values: rows as far apart as in a large batch, though few pages are ever touched."""

from importlib import import_module

import pytest
import torch
from fastmim_kernels.info_nce_triton import launch_backward_keys
from fastmim_kernels.info_nce_triton import launch_forward as info_nce

FAR = 2**30  # the third row begins where 32 bits end; the stride itself fits them
D = 16
FP16, FP32 = torch.float16, torch.float32


@pytest.fixture(scope="module")
def memory() -> torch.Tensor:
    """4 GB and a little, hardly any of it ever backed by memory on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(2 * FAR + 2**12, dtype=torch.int16, device=device).view(FP16)
    except RuntimeError as error:
        pytest.skip(f"4 GB of address space cannot be had: {error}")


def apart(memory: torch.Tensor, *shape: int) -> torch.Tensor:
    """Random values whose first dim of 3 has a stride of FAR."""
    inner = torch.empty(shape[1:], device="meta").stride()
    x = memory.as_strided(shape, (FAR, *inner))
    return x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def launch(name: str):
    return import_module(f"fastmim_kernels.{name}")


def same(call, x: torch.Tensor, *rest) -> None:
    """`call` on the far rows gives what it gives on a copy of them."""
    expected = call(x.contiguous(), *rest)
    found = call(x, *rest)
    for a, b in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
        assert b.isfinite().all()
        assert torch.equal(a, b)


def test_rows(memory):
    x, vector = apart(memory, 3, D), torch.randn(D, device=memory.device)
    loss, gelu = launch("norm_pix_loss"), launch("bias_gelu")
    for normalize in (True, False):
        dloss = torch.ones(3, device=x.device)
        for other in (x.contiguous(), x):  # a target as far apart
            same(lambda p, t: loss.launch_forward(p, t, normalize, 1e-6), x, other)  # noqa: B023
            needs = True, not normalize
            same(lambda p, t: loss.launch_backward(dloss, p, t, normalize, 1e-6, needs), x, other)  # noqa: B023
    same(gelu.launch_forward, x, vector)
    same(lambda x: gelu.launch_backward(torch.ones(3, D, device=x.device), x, vector, (True, True)), x)


def test_samples(memory):
    x, vector = apart(memory, 3, 4, D), torch.randn(D, device=memory.device)
    index = torch.tensor([[0, 3], [2, 1], [1, 3]], device=x.device)
    norm = launch("add_layer_norm")
    same(lambda x: launch("gather_tokens").launch_forward(x, index, None, vector), x)
    for rows in ((x, x.contiguous()), (x.contiguous(), x)):
        found = norm.launch_forward(*rows, vector, vector, vector, None, 1e-6)
        expected = norm.launch_forward(x.contiguous(), x.contiguous(), vector, vector, vector, None, 1e-6)
        assert all(torch.equal(a, b) and b.isfinite().all() for a, b in zip(found, expected, strict=True))
    saved = expected[1:], vector
    ones = torch.ones(3, 4, D, device=x.device, dtype=FP16)
    needs = (True,) * 5
    same(lambda x: norm.launch_backward(ones, ones, *saved[0], vector, x, vector, None, FP16, needs), x)


def test_tokens(memory):
    tokens, vector = apart(memory, 3, D), torch.randn(D, device=memory.device)
    source = torch.tensor([[2, -1], [0, 1]], device=tokens.device)
    same(lambda x: launch("restore_tokens").launch_forward(x, source, vector, vector.expand(2, D)), tokens)


def test_images(memory):
    """16 x 16 pixels; in a batch of 224 x 224 it is the 14,266th image that lies beyond."""
    image = apart(memory, 3, 8, 8, 3)
    index = torch.tensor([[0, 3], [2, 1], [1, 3]], device=image.device)
    norm = 4, (0.5,) * 3, (0.25,) * 3
    same(lambda x: launch("gather_patches").launch_forward(x, index, *norm, FP32), image)
    loss = launch("norm_pix_loss_image")
    pred = torch.randn(3, 2, 48, device=image.device)
    same(lambda x: loss.launch_forward(pred, x, index, *norm, True, 1e-6), image)


def test_predictions(memory):
    pred = apart(memory, 3, 2, 48)
    image = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8, device=pred.device)
    index = torch.tensor([[0, 3], [2, 1], [1, 3]], device=pred.device)
    options = image, index, 4, (0.5,) * 3, (0.25,) * 3, True, 1e-6
    loss = launch("norm_pix_loss_image")
    same(lambda x: loss.launch_forward(x, *options), pred)
    same(lambda x: loss.launch_backward(torch.ones(3, 2, device=x.device), x, *options), pred)


@pytest.mark.parametrize("which", [0, 1])
def test_queries_and_keys(which, memory):
    x = apart(memory, 3, 2, D)
    dloss = torch.ones(3, 2, device=x.device)

    def both(x):
        q, k = (x, near) if which == 0 else (near, x)
        loss, lse, rate, pull, norm = info_nce(q, k, 0.2, 0, True, True)
        return loss, lse, pull, launch_backward_keys(dloss, q, k, lse, rate, norm, 0.2, 0, True)

    near = x.contiguous().flip(0)
    same(both, x)
