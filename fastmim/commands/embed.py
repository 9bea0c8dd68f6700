"""`fastmim embed`: features of images to a file, with their ids, paths and labels.

fastmim embed runs/mae --data photos --out photos.parquet
fastmim embed runs/mae --data photos --out photos.safetensors --feature patches --block 8
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastmim.commands.weights import add_reading, add_weights, check_counts, device_here, pretrained
from fastmim.data import find_images
from fastmim.data.features_file import check_suffix, write_features
from fastmim.data.feed.center import center_crops, spread_ids
from fastmim.evals.features import KINDS, features_in_batches

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fastmim embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_weights(parser)
    parser.add_argument("--data", type=Path, required=True, help="images, with or without labels")
    parser.add_argument("--out", type=Path, required=True, help="a .parquet or .safetensors file")
    parser.add_argument("--feature", nargs="+", choices=KINDS, default=["cls"], help="(cls)")
    parser.add_argument("--block", type=int, help="behind this block, 1 the first (behind the final norm)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the features in the file (fp32)")
    parser.add_argument("--most", type=int, metavar="N", help="N images, evenly spaced (all)")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (64)")
    add_reading(parser)
    args = parser.parse_args(arguments)
    try:
        check_counts(args, "most", "batch", "workers", "block")
        check_suffix(args.out)
        print(f"{args.out}: {embedded(args)} images")
    except (ValueError, OSError) as error:
        parser.exit(2, f"fastmim: error: {error}\n")


def embedded(args: argparse.Namespace) -> int:
    """Write the file; how many rows it has. ValueError for features that the encoder does not have."""
    found = pretrained(args, args.weights)
    images = find_images(args.data)
    config = found.encoder.config
    crops = center_crops(
        images, config.size, ids=spread_ids(len(images), args.most), channels=config.channels,
        fraction=args.crop, batch=args.batch, threads=args.workers,
    )  # fmt: skip
    device = device_here()

    def batches() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for ids_B, features in features_in_batches(found.encoder, crops, device, args.feature, args.block):
            yield ids_B, {name: value.to(DTYPES[args.dtype]) for name, value in features.items()}

    block = "the final norm" if args.block is None else f"block {args.block}"
    about = {"weights": found.words, "images": str(images.root), "behind": block}
    return write_features(
        args.out, batches(), names=images.names, labels=images.labels, classes=images.classes, about=about
    )
