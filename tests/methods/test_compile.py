"""torch.compile of a method as deep as a ViT, forward and backward, against eager."""

import pytest
import torch
from fastmim_kernels import sample_seeds

from fastmim.methods import METHODS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig
from fastmim.views import Batch


@pytest.mark.long  # a minute or two; two blocks are compiled in tests/benchmarks/test_throughput.py
@pytest.mark.parametrize("name", ["mae", "rmae"])
def test_twelve_blocks_compile_and_equal_eager(name):
    """On torch 2.11 this did not end before fastmim_kernels/inductor.py: depth two passed there."""
    model = ViTConfig(width=32, depth=12, heads=2, patch=8, image_size=(32, 32))
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 32, 32, 3), generator=rng, dtype=torch.uint8)
    batch = Batch((image,), sample_seeds(0, 0, torch.arange(2)), torch.arange(2), 0)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        method = METHODS[name](decoder=DecoderConfig(width=32, depth=1, heads=2)).build(model)
        if compiled:
            torch._dynamo.reset()
            method.compile(dynamic=False)
        loss = method(batch).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in method.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
