"""Folders that transformers saves, under the names of our files: ViT, ViTMAE, DINOv2.

    config.json               sizes, the number of heads, which model it is
    model.safetensors         the weights, or several files that an index names; or pytorch_model.bin
    preprocessor_config.json  mean and deviation of the pixels, if it is there

transformers keeps queries, keys and values apart: here they are one matrix, as in timm. Of ViTMAE the decoder
comes along under MAE's names, of a classifier its head. The pooler of ViT, which no evaluation uses, stays.

Source  transformers 4 and 5: modeling_vit, modeling_vit_mae, modeling_dinov2, whose files have these names.
Limits  an exact GELU and an MLP of four times the width; no registers, no SwiGLU: these are refused by name.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = ("vit", "vit_mae", "dinov2")  # model_type in config.json
WORDS = (  # of a block, in the names of ViT and of DINOv2, and ours
    (r"layernorm_before\.|norm1\.", "norm1."),
    (r"layernorm_after\.|norm2\.", "norm2."),
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"intermediate\.dense\.|mlp\.fc1\.", "mlp.fc1."),
    (r"output\.dense\.|mlp\.fc2\.", "mlp.fc2."),
    (r"layer_scale1\.lambda1", "gamma_1"),
    (r"layer_scale2\.lambda1", "gamma_2"),
)
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "embeddings.mask_token": "encoder.mask_token",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}
BLOCK = re.compile(r"(decoder\.decoder_)?(?:encoder\.)?layers?\.(\d+)\.(.+)")
QKV = re.compile(r"attention\.attention\.(query|key|value)\.(weight|bias)")


def read_config(folder: Path) -> dict[str, Any] | None:
    """What config.json says, if it is one of transformers' that we know; None for any other folder.

    ValueError for a model of transformers that is none of ours.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or "model_type" not in config:
        return None
    kind = config["model_type"]
    if kind not in KINDS:
        raise ValueError(f"{path}: want a model_type that is one of {', '.join(KINDS)}, got {kind!r}")
    width, inner = config["hidden_size"], config.get("intermediate_size")
    ratio = config["mlp_ratio"] if kind == "dinov2" else (inner or 4 * width) / width
    if config.get("use_swiglu_ffn") or config.get("hidden_act", "gelu") != "gelu" or ratio != 4:
        raise ValueError(f"{path}: want an MLP of 4 x {width} with GELU, got another")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. ValueError without any, or for one that the index names in vain."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [folder / Path(one).name for one in names]
            if missing := [path.name for path in files if not path.is_file()]:
                raise ValueError(f"want {', '.join(missing)}, which {index} names, got nothing there")
            return files
    raise ValueError(f"want model.safetensors or pytorch_model.bin beside config.json, got none in {folder}")


def from_hf(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of ViT, ViTMAE or DINOv2 under the names of our files."""
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        name = re.sub(r"^(vit|dinov2)\.", "", name)
        if name.startswith("pooler."):
            continue
        if block := BLOCK.fullmatch(name):
            prefix = f"{'decoder_blocks' if block[1] else 'blocks'}.{block[2]}."
            if part := QKV.fullmatch(block[3]):
                apart.setdefault(f"{prefix}attn.qkv.{part[2]}", {})[part[1]] = tensor
            else:
                found[prefix + renamed(block[3])] = tensor
        elif name in OUTSIDE:
            found[OUTSIDE[name]] = tensor
        else:
            found[name.removeprefix("decoder.")] = tensor
    if "encoder.mask_token" in found:  # [1, D] there
        found["encoder.mask_token"] = found["encoder.mask_token"].reshape(1, 1, -1)
    for name, parts in apart.items():
        found[name] = torch.cat([parts[word] for word in ("query", "key", "value")])
    return found


def renamed(word: str) -> str:
    """A name within a block as ours."""
    for pattern, ours in WORDS:
        if there := re.match(pattern, word):
            return ours + word[there.end() :]
    return word


def pixel_statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation that the processor subtracts and divides by; None if the folder does not say."""
    try:
        found = json.loads((folder / "preprocessor_config.json").read_text())
        return tuple(map(float, found["image_mean"])), tuple(map(float, found["image_std"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
