"""The checkpoint layout of facebookresearch/mae: one flat dictionary for encoder and decoder.

A method's parameters are named encoder.*, decoder.* (and decoder2.* for R-MAE's untied second decoder);
without the prefixes encoder and decoder together are an MAE checkpoint, and the encoder alone is timm's.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastmim.models.vit import ViTConfig

ENCODER, DECODER, DECODER2 = "encoder.", "decoder.", "decoder2."


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of one submodule, without its prefix."""
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def to_mae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A method's state dict as an MAE checkpoint's `model`. A second decoder has no place in it."""
    return part_of(state, ENCODER) | part_of(state, DECODER)


def from_mae(flat: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """An MAE checkpoint's `model` as the state dict of a method that wants the names and shapes of `wanted`.

    Strict: ValueError, naming `origin`, if a name is missing, left over or of another shape. An untied
    second decoder starts as a copy of the one there is.
    """
    sources = {
        name: name.removeprefix(DECODER2).removeprefix(ENCODER).removeprefix(DECODER) for name in wanted
    }
    missing = sorted({source for source in sources.values() if source not in flat})
    left_over = sorted(flat.keys() - set(sources.values()))
    shapes = [
        f"{source} is {tuple(flat[source].shape)}, this model has {tuple(wanted[name].shape)}"
        for name, source in sources.items()
        if source in flat and flat[source].shape != wanted[name].shape
    ]
    if missing or left_over or shapes:
        problems = [f"missing {abridged(missing)}"] * bool(missing)
        problems += [f"not of this model {abridged(left_over)}"] * bool(left_over)
        problems += [abridged(shapes)] * bool(shapes)
        raise ValueError(f"{origin} is a checkpoint of another model or method: {'; '.join(problems)}")
    return {name: flat[source] for name, source in sources.items()}


def abridged(words: list[str], most: int = 3) -> str:
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The flat weights in a file, .safetensors or torch's, or in a run directory. Executes no pickled code.

    Raises ValueError if there is no such file or it holds no flat dictionary of tensors.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"init-from: want a run directory or a file of weights, got nothing at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # the reference saves its command line, an argparse.Namespace, beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers raise whatever a damaged or foreign file makes them stumble over
        raise ValueError(
            f"init-from: {path} cannot be read as weights, or holds more than tensors: {error}"
        ) from error
    flat = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(flat, dict) or not all(isinstance(t, Tensor) for t in flat.values()):
        raise ValueError(f"init-from: want a dictionary of tensors or one under 'model' in {path}")
    return flat


def encoder_metadata(c: ViTConfig) -> dict[str, str]:
    """What a reader of the encoder's weights needs to know, as safetensors metadata: strings only."""
    height, width = c.size
    values = {
        "format": "pt", "width": c.width, "depth": c.depth, "heads": c.heads, "patch": c.patch,
        "channels": c.channels, "image_height": height, "image_width": width,
        "mean": list(c.pixel_mean), "std": list(c.pixel_std),
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def export_mae(source: Path, target: Path) -> None:
    """Write the weights of a run as a file that facebookresearch/mae and timm's ViT load.

    `.safetensors`, or torch's format with the weights under "model". Raises ValueError on bad names.
    """
    flat = read_weights(source)
    if target.suffix == ".safetensors":
        save_file(flat, target)
    elif target.suffix in (".pth", ".pt"):
        torch.save({"model": flat}, target)
    else:
        raise ValueError(f"want a file that ends in .pth, .pt or .safetensors, got {target}")
