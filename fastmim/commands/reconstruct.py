"""`fastmim reconstruct`: what a checkpoint predicts of images that it sees a part of.

fastmim reconstruct runs/mae photos --ratio 0.75
fastmim reconstruct mae_visualize_vit_base.pth photos --no-norm-pix --animate

Writes a grid: original, what is seen, the prediction with what is seen pasted over it, the prediction alone;
with --animate a moving one, over ratios from 0.1 to 0.95, as far as they leave a patch.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fastmim.commands.predicting import add_decoder, crops_of, predictor
from fastmim.commands.weights import add_reading, add_weights, check_counts, device_here
from fastmim.data import Images, find_images
from fastmim.data.decode.header import EXTENSIONS
from fastmim.data.feed.center import spread_ids
from fastmim.engine.pictures import reconstruction_sheet

RATIOS = tuple(round(0.05 * i, 2) for i in range(2, 20))
MS = 250  # that a picture of the moving one is shown


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fastmim reconstruct", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_weights(parser)
    parser.add_argument("images", type=Path, help="a folder, an image, or any other set of images")
    parser.add_argument("--out", type=Path, help="file to write (reconstruction.png; .gif with --animate)")
    parser.add_argument("--rows", type=int, default=8, help="images, evenly spaced over the set (8)")
    parser.add_argument("--animate", action="store_true", help="one picture after the other over ratios")
    add_decoder(parser)
    add_reading(parser, crop=1.0)
    args = parser.parse_args(arguments)
    out = args.out or Path("reconstruction.gif" if args.animate else "reconstruction.png")
    try:
        check_counts(args, "rows", "workers")
        check_suffix(out, args.animate)
        if args.animate and args.ratio is not None:
            raise ValueError("want --ratio or --animate, which shows all, got both")
        write(sheets(args), out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"fastmim: error: {error}\n")
    print(out)


def check_suffix(out: Path, animate: bool) -> None:
    """ValueError for a file that cannot hold the picture."""
    known = (".gif", ".webp") if animate else (".png", ".jpg", ".jpeg", ".webp")
    if out.suffix.lower() not in known:
        raise ValueError(f"--out: want a file that ends in {', '.join(known)}, got {out}")


def chosen(path: Path, rows: int) -> tuple[Images, list[int]]:
    """Images of a set, evenly spaced, or the one that is named. ValueError for none."""
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        images = find_images(path.parent)
        return images, [list(images.names).index(path.name)]
    images = find_images(path)
    return images, spread_ids(len(images), rows)


def sheets(args: argparse.Namespace) -> list[Image.Image]:
    """A grid for each ratio, of the same images and, as far as the method allows, of nested masks."""
    device = device_here()
    images, ids = chosen(args.images, args.rows)
    ratios: Sequence[float | None] = (args.ratio,)
    if args.animate:
        N = predictor(args, args.weights, device, None).model.num_patches
        ratios = [ratio for ratio in RATIOS if N * (1 - ratio) >= 1]
    found = []
    for ratio in ratios:
        one = predictor(args, args.weights, device, ratio)
        [(crops, ids_B)] = crops_of(
            one.method, images, ids, fraction=args.crop, batch=len(ids), threads=args.workers
        )
        title = "" if ratio is None else f"{100 * ratio:.0f} %"
        found.append(reconstruction_sheet(one.of(crops, ids_B, args.seed), one.model, args.rows, title))
    return found


def write(pictures: Sequence[Image.Image], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    first, *others = pictures
    if others:
        first.save(out, save_all=True, append_images=[*others, *reversed(others[:-1])], duration=MS, loop=0)
    else:
        first.save(out)
