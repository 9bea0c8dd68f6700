"""Tiny models of every family, and what a step of one gives: outputs, loss and every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.apply.mae_layout import MaskedAutoencoder

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
MLP = {"intermediate_size": 96}
DECODER = {
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def libraries(torchvision_loads):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")


def images(batch: int = 3, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


def timm_vit(**options) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    given = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**(given | options))


def hf(name: str, kwargs: dict | None = None, **options) -> nn.Module:
    """`ViTModel` from a `ViTConfig` and so on; kwargs are those of the model."""
    import transformers

    family = next(f for f in ("ViTMAE", "ViT", "Dinov2", "Beit") if name.startswith(f))
    sizes = SIZES | ({} if family == "Dinov2" else MLP) | (DECODER if family == "ViTMAE" else {})
    config = getattr(transformers, f"{family}Config")(**(sizes | options))
    return getattr(transformers, name)(config, **(kwargs or {}))


def livelier(model: nn.Module) -> nn.Module:
    """Biases, norms, tokens are zeros and ones at first and eps is small: that hides who adds them where."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.1)
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = 0.1 * (i + 1)
    return model


def make(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return livelier(build())


def mae_layout(**options) -> nn.Module:
    return MaskedAutoencoder(**options)


def named(outputs: Any) -> dict[str, Tensor]:
    """Tensors of whatever a model returns."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    pairs = outputs.items() if hasattr(outputs, "items") else ((str(i), o) for i, o in enumerate(outputs))
    found = {}
    for key, value in pairs:
        values = value if isinstance(value, tuple | list) else (value,)
        found |= {f"{key}.{i}": v for i, v in enumerate(values) if isinstance(v, Tensor)}
    return found


def step(model: nn.Module, call: Callable[[nn.Module, Tensor], Any], x: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradients of their sum with fixed random weights; draws from seed 0."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    outputs = named(call(model, x))
    rng = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=torch.float64)
    for out in outputs.values():
        if out.requires_grad:
            total = total + (out.double() * torch.randn(out.shape, generator=rng).double()).sum()
    total.backward()
    grads = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: out.detach() for name, out in outputs.items()} | grads


def skip_layers_of_earlier_releases() -> None:
    """Layers of transformers before 5.23 hold dense and activation apart, and are left as they are."""
    import transformers

    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 23):
        pytest.skip(f"layers of transformers {transformers.__version__} are left, as test_left has it")
