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
    """What `encoder_metadata` was made of, as far as it shapes the encoder.

    KeyError for what is missing, ValueError, with its name, for what is no value of it.
    """
    sizes: dict[str, Any] = {name: literal(metadata, name, int) for name in SIZES}
    parts: dict[str, Any] = {name: metadata[name] for name in PARTS if name in metadata}
    for name in {"layer_scale", "final_norm"} & parts.keys():
        parts[name] = literal(metadata, name, bool if name == "final_norm" else float)
    return ViTConfig(
        **sizes,
        image_size=(literal(metadata, "image_height", int), literal(metadata, "image_width", int)),
        mean=tuple(literal(metadata, "mean", list)),
        std=tuple(literal(metadata, "std", list)),
        **parts,
    )


def literal(metadata: Mapping[str, str], name: str, kind: type) -> Any:
    """A value that was written as text. ValueError if it is none of this kind, or hides something else."""
    text = str(metadata[name])
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        value = None
    items = value if kind is list else [value]
    kinds = (int, float) if kind in (float, list) else (kind,)
    if not isinstance(items, list) or any(type(item) not in kinds for item in items):
        raise ValueError(f"metadata {name}: want {kind.__name__}, got {text[:60]!r}")
    return value


def architecture_of(encoder: nn.Module) -> str:
    """The name of an encoder's class in a file. ValueError for a class that has none."""
    for name, kind in ARCHITECTURES.items():
        if isinstance(encoder, kind):
            return name
    raise ValueError(f"want one of {', '.join(ARCHITECTURES)} as an encoder, got {type(encoder).__name__}")


def encoder_of(metadata: Mapping[str, str]) -> Encoder | SwinEncoder:
    """An encoder as a file describes it, with fresh weights. KeyError for what is missing or unknown."""
    return ARCHITECTURES[metadata.get("architecture", "vit")](config_of(metadata))
