"""A method with its weights, to look at what it predicts: of a run directory, or of a file in MAE's layout.

A run directory says of itself what it is. A file, and a folder of transformers' ViTMAE, is an encoder with
MAE's decoder: the sizes are read off the shapes, and what they do not say is asked for.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fastmim_kernels.philox import sample_seeds
from torch import Tensor

from fastmim.commands.weights import pretrained
from fastmim.data import Images
from fastmim.data.feed.center import center_crops
from fastmim.engine.config import from_dict
from fastmim.engine.frozen import check_files, place_frozen
from fastmim.interop.encoders import Pretrained
from fastmim.interop.mae import DECODER, bare_part, from_mae
from fastmim.interop.weights_file import read_weights
from fastmim.methods import METHODS
from fastmim.methods.base import Method, MethodConfig, Reconstruction
from fastmim.methods.mae import MAEConfig
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.views import Batch

DECODER_WIDTH, DECODER_HEADS = 512, 16  # of every published decoder


def add_decoder(parser: argparse.ArgumentParser) -> None:
    """What a file does not say of MAE's decoder, and what is hidden."""
    parser.add_argument("--ratio", type=float, help="share of the patches that is hidden (the method's own)")
    parser.add_argument("--seed", type=int, default=0, help="of what is hidden (0)")
    parser.add_argument(
        "--decoder-heads",
        type=int,
        help=f"of a file: the decoder's heads ({DECODER_HEADS} of width {DECODER_WIDTH})",
    )
    parser.add_argument(
        "--norm-pix", action=argparse.BooleanOptionalAction, default=None,
        help="of a file: whether it predicts patch-normalized pixels (yes)",
    )  # fmt: skip


@dataclass(frozen=True)
class Predictor:
    """A method in evaluation, on a device, with the share of patches it hides."""

    method: Method
    name: str
    device: torch.device

    @property
    def model(self) -> ViTConfig:
        return self.method.model

    def of(self, crops: Sequence[Tensor], ids_B: Tensor, seed: int) -> Reconstruction:
        """What is predicted of these images, uint8 `[B, H, W, C]` for each crop that the method asks for.

        What is hidden of an image depends on `seed` and its id alone. ValueError for a method without a
        picture.
        """
        seeds_B = sample_seeds(seed, 0, ids_B).to(self.device)
        batch = Batch(tuple(crop.to(self.device) for crop in crops), seeds_B, ids_B, epoch=0)
        found = self.method.reconstruct(batch)
        if found is None:
            raise ValueError(f"want a method that predicts something to look at, got {self.name}")
        return found


def predictor(args: argparse.Namespace, path: Path, device: torch.device, ratio: float | None) -> Predictor:
    """The method at a path as the arguments say. ValueError for what cannot predict."""
    path = path.parent if path.name == "model.safetensors" and saved_run(path.parent) else path
    saved = saved_run(path)
    method = of_file(args, path, ratio) if saved is None else of_run(saved, path, ratio)
    place_frozen(method, device)
    return Predictor(method.to(device).eval(), method.config.name, device)


def saved_run(path: Path) -> dict[str, Any] | None:
    """The configuration that a run directory keeps; None for any other path."""
    try:
        content = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return content["run"] if isinstance(content, dict) and isinstance(content.get("run"), dict) else None


def of_run(saved: dict[str, Any], path: Path, ratio: float | None) -> Method:
    name = saved["method"]["name"]
    if name not in METHODS:
        raise ValueError(f"want a run of {', '.join(METHODS)}, got one of {name} in {path}")
    config, model = from_dict(METHODS[name], saved["method"]), from_dict(ViTConfig, saved["model"])
    config = hiding(config, ratio)
    check_files(config)
    method = config.build(replace(model, attention="auto"))
    flat = read_weights(path, "weights")
    method.load_state_dict(from_mae(flat, method.state_dict(), str(path)))
    return method


def hiding(config: MethodConfig, ratio: float | None) -> MethodConfig:
    """The same method with another share of hidden patches. ValueError for a method that has none."""
    if ratio is None:
        return config
    if not hasattr(config, "mask_ratio"):
        raise ValueError(f"--ratio: want a method that hides patches, got {config.name}")
    return replace(config, mask_ratio=ratio)  # type: ignore[call-arg]


def of_file(args: argparse.Namespace, path: Path, ratio: float | None) -> Method:
    """MAE, with the encoder and the decoder of a file."""
    found = pretrained(args, path)
    config = hiding(MAEConfig(decoder=decoder_of(args, found), norm_pix=norm_pix_of(args, found)), ratio)
    assert isinstance(found.encoder, Encoder)
    method = config.build(found.encoder.config)
    flat = {name: t.float() for name, t in found.beside.items() if bare_part(name) == DECODER}
    flat |= {name: t for name, t in found.encoder.state_dict().items() if name != "mask_token"}
    method.load_state_dict(from_mae(flat, method.state_dict(), str(path)))
    return method


def decoder_of(args: argparse.Namespace, found: Pretrained) -> DecoderConfig:
    """The sizes of MAE's decoder by the shapes of its weights. ValueError without one."""
    weight = found.beside.get("decoder_embed.weight")
    blocks = {int(name.split(".")[1]) for name in found.beside if name.startswith("decoder_blocks.")}
    if weight is None or not blocks or not isinstance(found.encoder, Encoder):
        raise ValueError(f"want weights with MAE's decoder, or a run directory, got none in {found.origin}")
    known = DECODER_HEADS if weight.shape[0] == DECODER_WIDTH else 0
    heads = args.decoder_heads or found.settings.get("decoder_num_attention_heads", known)
    if heads < 1 or weight.shape[0] % heads:
        raise ValueError(
            f"want --decoder-heads that divide the decoder's width, {weight.shape[0]}, got {heads}"
        )
    return DecoderConfig(width=weight.shape[0], depth=1 + max(blocks), heads=heads)


def norm_pix_of(args: argparse.Namespace, found: Pretrained) -> bool:
    if args.norm_pix is not None:
        return bool(args.norm_pix)
    return bool(found.settings.get("norm_pix_loss", True))


def crops_of(
    method: Method, images: Images, ids: Sequence[int], *, fraction: float, batch: int, threads: int
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """The central part of each image at the size of each crop that the method asks for, and the ids."""
    sizes = [crop.size for crop in method.crops]
    streams = [
        center_crops(
            images, size, ids=ids, channels=method.model.channels, fraction=fraction, batch=batch,
            threads=threads,
        )
        for size in dict.fromkeys(sizes)
    ]  # fmt: skip
    places = [list(dict.fromkeys(sizes)).index(size) for size in sizes]
    for parts in itertools.zip_longest(*streams):
        yield tuple(parts[place][0] for place in places), parts[0][1]
