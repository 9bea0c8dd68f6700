"""Single-device networks. They know no method, no optimizer and no rank."""

from fastmim.models.vit import ViTConfig

VITS: dict[str, ViTConfig] = {  # Dosovitskiy et al., arXiv:2010.11929, Table 1; tiny and small after DeiT
    "vit_tiny": ViTConfig(width=192, depth=12, heads=3),
    "vit_small": ViTConfig(width=384, depth=12, heads=6),
    "vit_base": ViTConfig(width=768, depth=12, heads=12),
    "vit_large": ViTConfig(width=1024, depth=24, heads=16),
    "vit_huge": ViTConfig(width=1280, depth=32, heads=16, patch=14),
}
