"""Single-device networks. They know no method, no optimizer and no rank."""

from dataclasses import replace

from fastmim.models.vit import ViTConfig

VITS: dict[str, ViTConfig] = {  # Dosovitskiy et al., arXiv:2010.11929, Table 1; tiny and small after DeiT
    "vit_tiny": ViTConfig(width=192, depth=12, heads=3),
    "vit_small": ViTConfig(width=384, depth=12, heads=6),
    "vit_base": ViTConfig(width=768, depth=12, heads=12),
    "vit_large": ViTConfig(width=1024, depth=24, heads=16),
    "vit_huge": ViTConfig(width=1280, depth=32, heads=16, patch=14),
}


def resized(model: ViTConfig, name: str) -> ViTConfig:
    """The encoder with width, depth and heads of this size, and its patch if the name has one of its own.

    All else stays: image size, positions, first weights. KeyError for an unknown name.
    """
    size = VITS[name]
    patch = model.patch if size.patch == ViTConfig.patch else size.patch
    return replace(model, width=size.width, depth=size.depth, heads=size.heads, patch=patch)
