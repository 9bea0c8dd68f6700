"""Parameter groups: who decays, and by how much a layer's learning rate is scaled.

Source  The 1-D rule and the layer-wise decay of facebookresearch/mae: no weight decay for tensors of one
        dimension or whose name ends in `.bias`; scale decay^(depth + 1 - layer), layer 0 = tokens,
        positions and patch embedding, layer i + 1 = block i, layer depth + 1 = everything after. Class and
        mask tokens have three dimensions and are therefore decayed, as in MAE's pre-training.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def layer_of(name: str, depth: int) -> int:
    """Layer id of a parameter by its name: 0 for the embedding, i + 1 for block i, depth + 1 for the rest."""
    block = re.match(r"encoder\.blocks\.(\d+)\.", name)
    if block:
        return int(block.group(1)) + 1
    embedding = ("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.", "encoder.mask_token")
    return 0 if name.startswith(embedding) else depth + 1


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    depth: int = 0,
    decays: Callable[[str, nn.Parameter], bool | None] = lambda name, parameter: None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer; every parameter that requires gradient is in exactly one.

    Each has `params`, `weight_decay`, `name`, and `lr_scale`, by which to multiply the schedule's rate. The
    order is that of first appearance, so it is the same on every rank and in every run. `decays` may settle
    for a parameter what the 1-D rule would otherwise.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"optim.layer-decay: want a factor in (0, 1], got {layer_decay}")
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth)
        decayed = decays(name, parameter)
        if decayed is None:
            decayed = parameter.ndim > 1 and not name.endswith(".bias")
        key = f"layer{layer}" if layer_decay != 1.0 else "all"
        key += "" if decayed else "_no_decay"
        if key not in groups:
            groups[key] = {
                "name": key,
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": layer_decay ** (depth + 1 - layer),
            }
        groups[key]["params"].append(parameter)
    return list(groups.values())
