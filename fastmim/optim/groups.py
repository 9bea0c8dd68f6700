"""Parameter groups: who decays, by how much a learning rate is scaled, who is clipped or frozen.

Source  The 1-D rule and the layer-wise decay of facebookresearch/mae: no weight decay for tensors of one
        dimension or whose name ends in `.bias`; scale decay^(depth + 1 - layer), layer 0 = tokens,
        positions and patch embedding, layer i + 1 = block i, layer depth + 1 = everything after. Class and
        mask tokens have three dimensions and are therefore decayed, as in MAE's pre-training.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fastmim.group import Group


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
    group: Callable[[str, nn.Parameter], Group] = lambda name, parameter: Group(),
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer; every parameter that requires gradient is in exactly one.

    Each has `params`, `weight_decay`, `name`, and what `group` says of its parameters: `decays`, `lr_scale`
    by which to multiply the schedule's rate, `schedule`, `clip`, `frozen_epochs`. The order is that of
    first appearance, so it is the same on every rank and in every run.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"optim.layer-decay: want a factor in (0, 1], got {layer_decay}")
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        layer, asked = layer_of(name, depth), group(name, parameter)
        decays = asked.decay
        if decays is None:
            decays = parameter.ndim > 1 and not name.endswith(".bias")
        key = f"layer{layer}" if layer_decay != 1.0 else "all"
        key += ("" if decays else "_no_decay") + words_of(asked)
        if key not in groups:
            groups[key] = {
                "name": key,
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": layer_decay ** (depth + 1 - layer) * asked.lr_scale,
                "decays": decays,
                "schedule": asked.schedule,
                "clip": asked.clip,
                "frozen_epochs": asked.frozen_epochs,
            }
        groups[key]["params"].append(parameter)
    return list(groups.values())


def words_of(group: Group) -> str:
    """What a group's name says of it beside layer and decay; nothing where it is as all others."""
    words = [f"lr_{group.lr_scale:g}"] * (group.lr_scale != 1)
    words += [f"schedule_{group.schedule}"] * (group.schedule is not None)
    words += [f"clip_{group.clip or 0:g}"] * (group.clip is not None)
    words += [f"frozen_{group.frozen_epochs}"] * (group.frozen_epochs > 0)
    return "".join(f"_{word}" for word in words)
