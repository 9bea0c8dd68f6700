"""The encoder of a run as timm's models load it: strictly, with equal tokens.

    VisionTransformer   sine-cosine or learned positions, one bias of queries, keys and values
    Beit                relative positions, LayerScale, biases of queries and values alone

timm's Beit has a relative table in each block, as BEiT has in fine-tuning: a shared one is copied into every
block, which is the same function. A classifier (`--method supervised`) takes its norm and head along.

Limits  timm's models by name, as `beit_base_patch16_224`, may pool patches before a norm of their own: give
        them `global_pool="token"`, whose norm is the encoder's.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastmim.interop.mae import ENCODER, bare_part
from fastmim.interop.weights_file import read_weights, write_weights

SHARED = "rel_pos_bias.relative_position_bias_table"
CLASSIFIER = ("fc_norm.", "head.")


def for_timm(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a run's `model.safetensors` or `encoder.safetensors` under timm's names."""
    kept = {name: tensor for name, tensor in flat.items() if bare_part(name) == ENCODER}
    if "fc_norm.weight" in flat:
        kept |= {name: tensor for name, tensor in flat.items() if name.startswith(CLASSIFIER)}
    shared = kept.pop(SHARED, None)
    if shared is not None:
        blocks = {name.split(".")[1] for name in kept if name.startswith("blocks.")}
        kept |= {f"blocks.{i}.attn.relative_position_bias_table": shared.clone() for i in sorted(blocks)}
    return kept


def class_in_timm(state: Mapping[str, Tensor]) -> str:
    """The class of timm's that has these names."""
    if "layers.0.blocks.0.attn.qkv.weight" in state:
        return "SwinTransformer"
    parts = ("attn.q_bias", "gamma_1", "attn.relative_position_bias_table")
    return "Beit" if any(f"blocks.0.{part}" in state for part in parts) else "VisionTransformer"


def export_timm(source: Path, target: Path) -> None:
    """Write the encoder of a run, or of a file of weights, for timm. ValueError on bad names.

    `.safetensors`, or torch's format; says which class of timm's it is for.
    """
    state = for_timm(read_weights(source, "export"))
    if not state:
        raise ValueError(f"export: want the weights of an encoder, got none in {source}")
    if target.suffix == ".safetensors":
        write_weights(state, target, {})
    elif target.suffix in (".pth", ".pt"):
        torch.save(state, target)
    else:
        raise ValueError(f"want a file that ends in .pth, .pt or .safetensors, got {target}")
    print(f"for timm's {class_in_timm(state)}")
