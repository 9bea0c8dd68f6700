"""What a reader of an encoder's weights needs to know beside them: the metadata of a safetensors file.

    width, depth, heads, patch, channels, mean, std, image_height, image_width     of every encoder
    positions, layer_scale, qkv_bias, final_norm, architecture                      where they are not MAE's

Files without a word of the second line are of encoders from before there was a choice: MAE's.
"""

import ast
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from fastmim.models.swin import SwinEncoder
from fastmim.models.vit import Encoder, ViTConfig

SIZES = ("width", "depth", "heads", "patch", "channels")
PARTS = ("positions", "layer_scale", "qkv_bias", "final_norm")  # what shapes the state dict or the forward
ARCHITECTURES: dict[str, type[Encoder | SwinEncoder]] = {"vit": Encoder, "swin": SwinEncoder}


def encoder_metadata(c: ViTConfig, architecture: str = "vit") -> dict[str, str]:
    """The metadata of an encoder; strings only, as safetensors wants them."""
    height, width = c.size
    values: dict[str, object] = {"format": "pt"} | {name: getattr(c, name) for name in SIZES}
    values |= {"image_height": height, "image_width": width}
    values |= {"mean": list(c.pixel_mean), "std": list(c.pixel_std)}
    defaults = {field.name: field.default for field in fields(c)}
    values |= {name: getattr(c, name) for name in PARTS if getattr(c, name) != defaults[name]}
    if architecture != "vit":
        values["architecture"] = architecture
    return {name: str(value) for name, value in values.items()}


def config_of(metadata: Mapping[str, str]) -> ViTConfig:
    """What `encoder_metadata` was made of, as far as it shapes the encoder. KeyError for what is missing."""
    sizes: dict[str, Any] = {name: int(metadata[name]) for name in SIZES}
    parts: dict[str, Any] = {name: metadata[name] for name in PARTS if name in metadata}
    for name in {"layer_scale", "final_norm"} & parts.keys():
        parts[name] = ast.literal_eval(str(parts[name]))
    return ViTConfig(
        **sizes,
        image_size=(int(metadata["image_height"]), int(metadata["image_width"])),
        mean=tuple(ast.literal_eval(metadata["mean"])),
        std=tuple(ast.literal_eval(metadata["std"])),
        **parts,
    )


def architecture_of(encoder: nn.Module) -> str:
    """The name of an encoder's class in a file. ValueError for a class that has none."""
    for name, kind in ARCHITECTURES.items():
        if isinstance(encoder, kind):
            return name
    raise ValueError(f"want one of {', '.join(ARCHITECTURES)} as an encoder, got {type(encoder).__name__}")


def encoder_of(metadata: Mapping[str, str]) -> Encoder | SwinEncoder:
    """An encoder as a file describes it, with fresh weights. KeyError for what is missing or unknown."""
    return ARCHITECTURES[metadata.get("architecture", "vit")](config_of(metadata))
