"""`fastmim psnr`: how near predicted pixels are to the true ones, in dB.

composite  visible patches pasted over the prediction
masked     hidden patches alone
raw        the prediction alone, where patches are visible too

A prediction of patch-normalized pixels is undone with the true patch's mean and deviation, which no model
knows: see fastmim/evals/psnr.py before comparing.
"""

import argparse
from pathlib import Path

import torch

from fastmim.commands.predicting import add_decoder, crops_of, predictor
from fastmim.commands.weights import add_reading, add_weights, check_counts, device_here
from fastmim.data import find_images
from fastmim.data.feed.center import spread_ids
from fastmim.evals.psnr import psnr


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fastmim psnr", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_weights(parser, several=True)
    parser.add_argument("--data", type=Path, required=True, help="images, with or without labels")
    parser.add_argument("--most", type=int, metavar="N", help="N images, evenly spaced (all)")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (64)")
    add_decoder(parser)
    add_reading(parser)
    args = parser.parse_args(arguments)
    try:
        check_counts(args, "most", "batch", "workers")
        for path in args.weights:
            print(
                f"{path}  "
                + "  ".join(f"{name} {value:.2f} dB" for name, value in measured(args, path).items())
            )
    except (ValueError, OSError) as error:
        parser.exit(2, f"fastmim: error: {error}\n")


def measured(args: argparse.Namespace, path: Path) -> dict[str, float]:
    """The mean over the images of each of the three. ValueError for a method that predicts no pixels."""
    found = predictor(args, path, device_here(), args.ratio)
    images = find_images(args.data)
    ids = spread_ids(len(images), args.most)
    parts: dict[str, list[torch.Tensor]] = {}
    for crops, ids_B in crops_of(
        found.method, images, ids, fraction=args.crop, batch=args.batch, threads=args.workers
    ):
        r = found.of(crops, ids_B, args.seed)
        c = found.model
        values = psnr(r.image_BHWC, r.seen_BK, r.pred_BNP, c.pixel_mean, c.pixel_std, norm_pix=r.norm_pix)
        for name, value_B in values.items():
            parts.setdefault(name, []).append(value_B.cpu())
    return {name: float(torch.cat(values).mean()) for name, values in parts.items()}
