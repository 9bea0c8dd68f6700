"""What every evaluation asks for: weights, and what their file may not say of them; images; threads."""

import argparse
import os
from pathlib import Path

import torch

from fastmim.data.feed.center import FRACTION
from fastmim.interop.encoders import Pretrained, load_pretrained

WEIGHTS = "a run directory, a folder of transformers, or a file of weights (.safetensors, .pth)"


def add_weights(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """WEIGHTS, and what can be said of a file that does not say it."""
    parser.add_argument("weights", type=Path, nargs="+" if several else None, metavar="WEIGHTS", help=WEIGHTS)
    group = parser.add_argument_group("of weights that do not say it themselves")
    group.add_argument("--heads", type=int, help="attention heads (width / 64)")
    group.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels (a square)")
    group.add_argument("--mean", type=float, nargs="+", help="of the pixels, in 0 to 1 (ImageNet's)")
    group.add_argument("--std", type=float, nargs="+", help="of the pixels, in 0 to 1 (ImageNet's)")


def add_reading(parser: argparse.ArgumentParser, *, crop: float = FRACTION) -> None:
    """How images are read."""
    parser.add_argument("--crop", type=float, default=crop, help=f"central part of the short side ({crop:g})")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="decoding threads")


def pretrained(args: argparse.Namespace, path: Path) -> Pretrained:
    """The weights at a path, as the arguments say. ValueError for what is none."""
    return load_pretrained(
        path,
        heads=args.heads,
        image_size=None if args.image_size is None else tuple(args.image_size),
        mean=None if args.mean is None else tuple(args.mean),
        std=None if args.std is None else tuple(args.std),
    )


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """ValueError for an argument of these that is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"want --{name.replace('_', '-')} of at least 1, got {value}")


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
