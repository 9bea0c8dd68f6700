"""A small model, a batch of noise and of flat images, for every method's test."""

import pytest
import torch
from fastmim_kernels import sample_seeds

from fastmim.methods.base import Method
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig
from fastmim.views import Batch

MODEL = ViTConfig(width=32, depth=2, heads=2, patch=4, image_size=(16, 24))
DECODER = DecoderConfig(width=24, depth=2, heads=3)


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def make_batch(size: int = 5, seed: int = 3) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (size, 16, 24, 3), generator=rng, dtype=torch.uint8)
    image[0, :8] = 128  # flat patches: variance 0
    ids = torch.arange(size)
    return Batch((image,), sample_seeds(0, 0, ids), ids, 0)


def assert_overfits(method: Method, batch: Batch) -> None:
    """Sixty steps on one batch halve the loss."""
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = method(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
