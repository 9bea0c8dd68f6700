"""An encoder from whatever holds one: a run, an encoder.safetensors, a folder of transformers, or a file of
timm, MAE, BEiT, DINO, iBOT, data2vec, MoCo v3 or CAE.

Files of ours say what they are in their metadata. Of all others the sizes are read off the shapes:

    width, patch, channels   patch_embed.proj.weight [D, C, p, p]          depth   the number of blocks
    grid                     rows of pos_embed, or of the relative table: square, or `image_size`
    heads                    the relative table; else D / 64, as in every published size, or `heads`
    positions                sincos where the table is that one, learned for any other, relative, none
    LayerScale, biases, norm by which of their names are there

Limits  Pixel statistics are ImageNet's where nothing else is said: a file of 0.5s, as some of timm's
        classifiers, wants `mean` and `std`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastmim.interop.hf import from_hf, pixel_statistics, read_config, weight_files
from fastmim.interop.mae import ENCODER, MASK_TOKEN, abridged, bare_part
from fastmim.interop.metadata import config_of, encoder_of
from fastmim.interop.weights_file import read_weights
from fastmim.models.embed import TO_CLASS, resize_positions, sincos_2d
from fastmim.models.swin import SwinEncoder
from fastmim.models.vit import Encoder, Positions, QKVBias, ViTConfig

HEAD_WIDTH = 64
SHARED = "rel_pos_bias.relative_position_bias_table"
PER_BLOCK = "blocks.0.attn.relative_position_bias_table"


@dataclass(frozen=True)
class Pretrained:
    """An encoder with its weights, and what the file has beside it."""

    encoder: Encoder | SwinEncoder
    beside: Mapping[str, Tensor]  # decoder, heads, ..., by the names of our files
    origin: Path
    words: str  # where it comes from and what was left, in a line
    settings: Mapping[str, Any]  # config.json of transformers, if there is one


def load_pretrained(
    path: Path,
    *,
    heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Pretrained:
    """The encoder in a run directory, a folder of transformers, or a file of weights.

    `heads`, `image_size`, `mean`, `std` say what such a file cannot; of one of ours they are known already.
    ValueError for what holds no encoder, or one that ours cannot be.
    """
    settings = None
    try:
        if path.is_dir() and (settings := read_config(path)) is not None:
            flat: dict[str, Tensor] = {}
            for file in weight_files(path):
                flat |= read_weights(file, "weights")
            flat = from_hf(flat)
            heads = heads or settings["num_attention_heads"]
            if (statistics := pixel_statistics(path)) is not None:
                mean, std = mean or statistics[0], std or statistics[1]
            return foreign(flat, path, heads, image_size, mean, std, settings)
    except KeyError as error:
        raise ValueError(f"{path / 'config.json'} does not say {error}") from None
    file = whole_file(path)
    metadata = metadata_of(file)
    if "width" not in metadata:
        return foreign(read_weights(file, "weights"), path, heads, image_size, mean, std, {})
    return of_run(file, path, metadata)


def load_encoder(path: Path) -> Encoder | SwinEncoder:
    """The encoder alone, as `load_pretrained` finds it."""
    return load_pretrained(path).encoder


def whole_file(path: Path) -> Path:
    """The file of weights that a path means. ValueError without one."""
    if path.is_dir():
        for name in ("model.safetensors", "encoder.safetensors"):
            if (path / name).is_file():
                return path / name
    if not path.is_file():
        raise ValueError(
            "want a run directory with its encoder.safetensors, a folder of transformers, or a file of "
            f"weights, got nothing at {path}"
        )
    return path


def metadata_of(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing of any other file."""
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no encoder of a run: {error}") from error


def check_size(c: ViTConfig, flat: Mapping[str, Tensor]) -> None:
    """ValueError, before anything is built, for metadata of an encoder that is not in the file."""
    wanted, there = 12 * c.depth * c.width**2, sum(tensor.numel() for tensor in flat.values())
    if wanted > 2 * there:
        raise ValueError(
            f"metadata: {c.depth} blocks of width {c.width} have {wanted:,} weights, the file has {there:,}"
        )


def of_run(file: Path, origin: Path, metadata: Mapping[str, str]) -> Pretrained:
    """From a file with our metadata."""
    flat = read_weights(file, "weights")
    try:
        check_size(config_of(metadata), flat)
        encoder = encoder_of(metadata)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{origin} is no encoder of a run: {error}") from error
    state = {name: t for name, t in flat.items() if bare_part(name) == ENCODER}
    load_strictly(encoder, state, origin)
    take_mask_token(encoder, flat)
    beside = {name: t for name, t in flat.items() if name not in state}
    return Pretrained(encoder, beside, origin, f"a run's, {origin}", {})


def foreign(
    flat: dict[str, Tensor],
    origin: Path,
    heads: int | None,
    image_size: tuple[int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    settings: Mapping[str, Any],
) -> Pretrained:
    """From weights that do not say their sizes."""
    flat = {
        name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): t
        for name, t in flat.items()
    }
    state = {name: t for name, t in flat.items() if bare_part(name) == ENCODER}
    config = sizes_of(state, origin, heads, image_size)
    try:
        config = replace(config, mean=mean, std=std)
        encoder = Encoder(config)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    if config.positions.startswith("relative"):  # of BEiT's own files the class token and patches alone
        state.pop("pos_embed", None)
    beside = {name: t for name, t in flat.items() if name not in state}
    load_strictly(encoder, state, origin)
    take_mask_token(encoder, flat)
    parts = sorted({name.split(".")[0] for name in beside})
    words = f"{config.depth} blocks of width {config.width}, read off the weights in {origin}"
    return Pretrained(
        encoder, beside, origin, words + (f"; beside it {abridged(parts, 6)}" if parts else ""), settings
    )


def load_strictly(encoder: Encoder | SwinEncoder, state: Mapping[str, Tensor], origin: Path) -> None:
    """Every name and shape of the encoder, and no other. ValueError, a line, for all else."""
    wanted = encoder.state_dict()
    wanted.pop("mask_token", None)
    missing, over = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)} where {tuple(wanted[name].shape)} is wanted"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    problems = [f"missing {abridged(missing)}"] * bool(missing)
    problems += [f"not of this encoder {abridged(over)}"] * bool(over) + [abridged(shapes)] * bool(shapes)
    if problems:
        raise ValueError(f"{origin} is no encoder of ours: {'; '.join(problems)}")
    encoder.load_state_dict({name: t.float() for name, t in state.items()}, strict=False)


def transfer(found: Pretrained, target: nn.Module) -> str:
    """Fill an encoder with another's weights; says in a line what was taken, changed and left.

    Positions of another grid are resized bicubically; relative ones cannot be. ValueError where sizes differ.
    """
    if not isinstance(target, Encoder) or not isinstance(found.encoder, Encoder):
        raise ValueError(f"init-from: want a vision transformer, got another in {found.origin}")
    old, new = found.encoder.config, target.config
    state = {name: t for name, t in found.encoder.state_dict().items() if name != "mask_token"}
    words = [found.words]
    if target.norm is None and found.encoder.norm is not None:
        state = {name: t for name, t in state.items() if not name.startswith("norm.")}
        words.append("without its last norm")
    if old.grid != new.grid and "pos_embed" in state:
        state["pos_embed"] = resize_positions(state["pos_embed"], old.grid, new.grid)
        words.append(
            f"positions of {old.grid[0]} x {old.grid[1]} patches resized to {new.grid[0]} x {new.grid[1]}"
        )
    elif old.grid != new.grid:
        raise ValueError(
            f"init-from: want {old.grid[0]} x {old.grid[1]} patches, as the relative positions of "
            f"{found.origin} are of, which cannot be resized; got {new.grid[0]} x {new.grid[1]}"
        )
    load_strictly(target, state, found.origin)
    return "; ".join(words)


def take_mask_token(encoder: Encoder | SwinEncoder, flat: Mapping[str, Tensor]) -> None:
    """The mask token of an encoder that was trained with one."""
    if isinstance(encoder, Encoder) and MASK_TOKEN in flat:
        encoder.mask_token = nn.Parameter(flat[MASK_TOKEN].float())


def sizes_of(
    state: Mapping[str, Tensor], origin: Path, heads: int | None, image_size: tuple[int, int] | None
) -> ViTConfig:
    """The sizes of a ViT by the shapes of its weights. ValueError for one that is none of ours."""
    projection = state.get("patch_embed.proj.weight")
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    if projection is None or projection.ndim != 4 or not blocks or "cls_token" not in state:
        raise ValueError(
            f"{origin}: want the weights of a vision transformer with a class token, got names as "
            f"{', '.join(sorted(state)[:3]) or 'of no encoder'}"
        )
    D, channels, patch, _ = projection.shape
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    if fc1 is None or fc1.shape[0] != 4 * D:
        got = "none that is called fc1" if fc1 is None else f"one of {fc1.shape[0]}"
        raise ValueError(f"{origin}: want an MLP of 4 x {D} values, got {got}")
    table = state.get(SHARED, state.get(PER_BLOCK))
    if heads is None:
        heads = table.shape[1] if table is not None else D // HEAD_WIDTH
    if heads < 1 or D % heads:
        raise ValueError(
            f"{origin}: want the number of heads that divides the width, {D}; give it by --heads"
        )
    positions, grid = positions_of(state, table, D, patch, origin, image_size)
    biases: QKVBias = "qkv" if "blocks.0.attn.qkv.bias" in state else "none"
    if "blocks.0.attn.q_bias" in state:
        biases = "qv"
    return ViTConfig(
        width=D, depth=1 + max(blocks), heads=heads, patch=patch, channels=channels,
        image_size=(grid[0] * patch, grid[1] * patch), positions=positions, qkv_bias=biases,
        layer_scale=float("blocks.0.gamma_1" in state), final_norm="norm.weight" in state,
    )  # fmt: skip


def positions_of(
    state: Mapping[str, Tensor],
    table: Tensor | None,
    width: int,
    patch: int,
    origin: Path,
    image_size: tuple[int, int] | None,
) -> tuple[Positions, tuple[int, int]]:
    """Which positions these are, and for what grid of patches."""
    grid = None if image_size is None else (image_size[0] // patch, image_size[1] // patch)
    if table is not None:
        side = (math.isqrt(len(table) - TO_CLASS) + 1) // 2
        grid = grid or (side, side)
        if len(table) != (2 * grid[0] - 1) * (2 * grid[1] - 1) + TO_CLASS:
            raise ValueError(f"{origin}: want --image-size for a relative table of {len(table)} rows")
        return ("relative" if SHARED in state else "relative_per_block"), grid
    pos_1TD = state.get("pos_embed")
    if pos_1TD is None:
        raise ValueError(f"{origin}: want positions, absolute or relative, got none")
    N = pos_1TD.shape[1] - 1
    side = math.isqrt(N)
    grid = grid or (side, side)
    if grid[0] * grid[1] != N:
        raise ValueError(
            f"{origin}: want positions of a class token and of {grid[0]} x {grid[1]} patches, got "
            f"{pos_1TD.shape[1]} rows; --image-size says what they are of if they are not of a square"
        )
    fixed = torch.allclose(pos_1TD[0].float(), sincos_2d(width, grid), atol=1e-5) if width % 4 == 0 else False
    return ("sincos" if fixed else "learned"), grid
