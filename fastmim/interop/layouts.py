"""Checkpoints as the official repositories leave them, under the names of our files.

    layout                                   told by                      becomes
    BEiT, data2vec (microsoft/unilm,         lm_head.weight               names of timm's Beit; the head; the
    facebookresearch/data2vec_vision)                                     mask token as the encoder's
    DINO, iBOT                               backbone.* and head.*        the encoder and the head; iBOT's
                                                                          masked_embed as its mask token
    MoCo v3                                  base_encoder.*               encoder, projector and predictor
    CAE                                      encoder.* and regresser.*    the encoder

Of DINO and iBOT the teacher serves, of MoCo v3 the network that is trained; averages start as copies. What a
file has beyond is bookkeeping: counts of batches, tables of indices, the second head of iBOT if it shares the
first. CAE's regressor and decoder stay fresh.

Source  the repositories named; tested on files made with these names.
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

Flat = Mapping[str, Tensor]
BOOKKEEPING = ("num_batches_tracked", "relative_position_index")
# Linear layers stand among GELUs there; in `Head` they have the GELU
MLP = {"0": "0", "2": "1", "4": "2"}


def under_our_names(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """A flat checkpoint, under the names of our files if it is of a known layout, else as it is."""
    for told_by, convert in LAYOUTS:
        if told_by(flat):
            found = convert(flat)
            return {name: t for name, t in found.items() if not name.endswith(BOOKKEEPING)}
    return flat


def of_prefix(flat: Flat, prefix: str) -> dict[str, Tensor]:
    """What bears a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in flat.items() if name.startswith(prefix)}


def renamed(flat: Flat, pairs: Mapping[str, str]) -> dict[str, Tensor]:
    """Names whose first words are exchanged."""
    found = {}
    for name, tensor in flat.items():
        old = next((old for old in pairs if name.startswith(old)), None)
        found[name if old is None else pairs[old] + name.removeprefix(old)] = tensor
    return found


def beit(flat: Flat) -> dict[str, Tensor]:
    return renamed(flat, {"lm_head.": "head.", "mask_token": "encoder.mask_token"})


def dino(flat: Flat) -> dict[str, Tensor]:
    encoder = renamed(of_prefix(flat, "backbone."), {"masked_embed": "encoder.mask_token"})
    if "encoder.mask_token" in encoder:  # [1, D] there
        encoder["encoder.mask_token"] = encoder["encoder.mask_token"].reshape(1, 1, -1)
    head = {}
    for name, tensor in of_prefix(flat, "head.").items():
        if found := re.fullmatch(r"mlp\.(\d)\.(\w+)", name):
            head[f"head.mlp.{MLP.get(found[1], found[1])}.{found[2]}"] = tensor
        elif name.startswith("last_layer."):
            head[f"head.codes.{name.removeprefix('last_layer.')}"] = tensor
    return encoder | head


def moco(flat: Flat) -> dict[str, Tensor]:
    network = renamed(of_prefix(flat, "base_encoder."), {"head.": "projector."})
    return network | {f"predictor.{name}": t for name, t in of_prefix(flat, "predictor.").items()}


def cae(flat: Flat) -> dict[str, Tensor]:
    return of_prefix(flat, "encoder.")


def has(*words: str) -> Callable[[Flat], bool]:
    """Whether names begin with each of these."""
    return lambda flat: all(any(name.startswith(word) for name in flat) for word in words)


LAYOUTS: tuple[tuple[Callable[[Flat], bool], Callable[[Flat], dict[str, Tensor]]], ...] = (
    (has("lm_head.", "blocks."), beit),
    (has("backbone.blocks.", "head."), dino),
    (has("base_encoder.blocks."), moco),
    (has("encoder.blocks.", "regresser."), cae),
)
