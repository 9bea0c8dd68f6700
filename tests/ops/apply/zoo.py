"""timm's registry, each model at the smallest size that it builds at."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

LIMIT = 32e6  # parameters of what is run on a CPU
SIDES = (64, 112, 224)  # of patches of 14 and 16, and what hierarchies want
DEPTHS: tuple[dict[str, Any], ...] = ({"depth": 2}, {})


def architectures() -> dict[str, list[str]]:
    """Names of models by the file of timm that they are in."""
    import timm

    return {module: timm.list_models(module=module) for module in timm.list_modules()}


def smallest(name: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Options that `name` builds with and the side of its images, the smallest first."""
    import timm

    for side, depth, sized in product(SIDES, DEPTHS, (True, False)):
        options = depth | ({"img_size": side} if sized else {})
        params = LIMIT + 1
        with suppress(Exception), torch.device("meta"):
            params = sum(p.numel() for p in timm.create_model(name, **options).parameters())
        if params <= LIMIT:
            yield options, side


def build(name: str) -> tuple[nn.Module, Tensor] | None:
    """A model with lively weights in eval mode, and two images for it; None where all sizes are too large."""
    import timm

    for options, side in smallest(name):
        with suppress(Exception):
            torch.manual_seed(0)
            model = timm.create_model(name, **options).eval()
            rng = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for p in model.parameters():  # zeros and ones would hide who adds them where
                    p.add_(torch.randn(p.shape, generator=rng) * 0.02)
            x = torch.randn(2, 3, side, side, generator=rng)
            with torch.no_grad():
                model(x)
            return model, x
    return None
