"""Weights in files: the checkpoint layout of facebookresearch/mae, and what other methods have beside it.

A run's `model.safetensors` holds all of the method. What an MAE checkpoint has too bears MAE's bare names:
the encoder, whose are timm's, and MAE's decoder. Everything else keeps its name in the method:

    method                     file                       part
    encoder.blocks.0...        blocks.0...                encoder
    decoder.mask_token         mask_token                 decoder
    encoder.mask_token         encoder.mask_token         encoder.mask_token
    decoder2. projector. teacher. ...   the same          decoder2, projector, teacher

So the file of MAE and R-MAE is an MAE checkpoint, and the file of any method one with additions.

Loading  The encoder must be there whole. Any other part is there whole, or not at all: then decoder and heads
         stay fresh, and a teacher is made a copy of its student, a second decoder of the first. Nothing else
         may be there but the decoder, for a method that has none. Shapes must be equal.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastmim.interop.weights_file import read_weights, write_weights

ENCODER, DECODER, DECODER2 = "encoder.", "decoder.", "decoder2."
BARE = {  # the first words of MAE's names, and of timm's Beit and Swin
    ENCODER: {"cls_token", "pos_embed", "patch_embed", "blocks", "norm", "rel_pos_bias", "layers"},
    DECODER: {
        "mask_token", "decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred",
    },
}  # fmt: skip
MASK_TOKEN = "encoder.mask_token"  # of methods that encode hidden patches; timm's ViT has none


def bare_part(name: str) -> str | None:
    """The part, `encoder.` or `decoder.`, of which this is one of MAE's names; None if of neither."""
    word = name.partition(".")[0]
    return next((prefix for prefix, words in BARE.items() if word in words), None)


def in_file(name: str) -> str:
    """What a file calls a method's parameter."""
    for prefix in BARE:
        if name.startswith(prefix) and bare_part(name.removeprefix(prefix)) == prefix:
            return name.removeprefix(prefix)
    return name


def part_in_file(name: str) -> str:
    """The part to which a name of a file belongs: what is there as a whole or not at all."""
    bare = bare_part(name)
    if bare is not None:
        return bare.rstrip(".")
    words = name.split(".")
    return ".".join(words[:2] if f"{words[0]}." in BARE else words[:1])


def check_names(names: Iterable[str]) -> None:
    """ValueError if a file would take a parameter of the method for one of MAE's encoder or decoder."""
    for name in names:
        if bare_part(name) is not None:
            raise ValueError(f"want {name} under another name: an MAE checkpoint has one of its own")


def to_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A method's state dict under the names of a file."""
    return {in_file(name): t for name, t in state.items()}


def to_mae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a method's state dict what an MAE checkpoint has: the encoder, and MAE's decoder if any."""
    return only_mae(to_file(state))


def only_mae(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a file what an MAE checkpoint has."""
    return {name: t for name, t in flat.items() if bare_part(name) is not None}


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder alone, for timm's ViT, without a mask token."""
    return {n.removeprefix(ENCODER): t for n, t in state.items() if n.startswith(ENCODER) and n != MASK_TOKEN}


def missing_in(flat: Mapping[str, Tensor], wanted: Iterable[str]) -> list[str]:
    """The names of the method that the file does not have."""
    return [name for name in wanted if in_file(name) not in flat]


def from_mae(flat: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """A file as the state dict of a method whose own is `wanted`; parts it may lack are taken from there.

    ValueError, naming `origin`, for names that are missing, left over or of another shape, as said above.
    """
    names = {name: in_file(name) for name in wanted}
    there = {part_in_file(source) for source in names.values() if source in flat}
    needed = there | {"encoder"}
    missing = sorted(s for s in names.values() if s not in flat and part_in_file(s) in needed)
    known = set(names.values())
    if not any(bare_part(source) == DECODER for source in known):
        known |= {source for source in flat if bare_part(source) == DECODER}
    left_over = sorted(flat.keys() - known)
    shapes = [
        f"{source} is {tuple(flat[source].shape)}, this model has {tuple(wanted[name].shape)}"
        for name, source in names.items()
        if source in flat and flat[source].shape != wanted[name].shape
    ]
    if missing or left_over or shapes:
        problems = [f"missing {abridged(missing)}"] * bool(missing)
        problems += [f"not of this model {abridged(left_over)}"] * bool(left_over)
        problems += [abridged(shapes)] * bool(shapes)
        raise ValueError(f"{origin} is a checkpoint of another model or method: {'; '.join(problems)}")
    state = {}
    for name, source in names.items():
        first = source.removeprefix(DECODER2) if source not in flat else source  # of an untied second decoder
        state[name] = flat[first] if first in flat else wanted[name]
    return state


def words_on_weights(flat: Mapping[str, Tensor], wanted: Iterable[str]) -> str:
    """Which parts a file gives to a method that wants these names, which stay fresh, which it has beyond."""
    parts = list(dict.fromkeys(part_in_file(in_file(name)) for name in wanted))
    there = set(map(part_in_file, flat))
    beyond = sorted(there - set(parts))
    said = [", ".join(part for part in parts if part in there)]
    said += [f"not there: {', '.join(part for part in parts if part not in there)}"] * bool(
        set(parts) - there
    )
    said += [f"left out: {', '.join(beyond)}"] * bool(beyond)
    return "; ".join(said)


def abridged(words: list[str], most: int = 3) -> str:
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")


def export_mae(source: Path, target: Path) -> None:
    """Write encoder and decoder of a run as a file that facebookresearch/mae and timm's ViT load.

    `.safetensors`, or torch's format with the weights under "model"; says which parts are left out. Raises
    ValueError on bad names.
    """
    flat = read_weights(source, "export")
    kept = only_mae(flat)
    if target.suffix == ".safetensors":
        write_weights(kept, target, {})
    elif target.suffix in (".pth", ".pt"):
        torch.save({"model": kept}, target)
    else:
        raise ValueError(f"want a file that ends in .pth, .pt or .safetensors, got {target}")
    if others := sorted({part_in_file(name) for name in flat.keys() - kept.keys()}):
        print(f"left out, for an MAE checkpoint has no place for it: {', '.join(others)}")
