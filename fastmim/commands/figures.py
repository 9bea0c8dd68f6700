"""`fastmim figures`: the runs behind the figures of arXiv:2208.04164, and the figures.

fastmim figures 1 2 3 --data CIFAR10 --out tables
fastmim figures 4 --data IMAGENET --scale full --cue-conflict cue-conflict

    1   CKA under occlusion of pre-trained encoders, and of one that labels trained from scratch
    2   the same after fine-tuning
    3   the same of encoders pre-trained on few images and fine-tuned
    4   shape bias after fine-tuning, of classifiers of ImageNet's classes

Runs are those of `fastmim tables`, in OUT/runs: what is finished is kept. Figures are OUT/figure_N.png, .pdf
and .csv.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmim.commands import cka, shape_bias
from fastmim.commands.paper import CMAE, MAE, RANDOM, RMAE, SCRATCH, TABLES, Row
from fastmim.commands.tables import SCALES, Maker, Stopped, add_maker

MOCO = next(row for row in TABLES[1].rows if row.method == "mocov3")
FIGURES: dict[int, tuple[Row, ...]] = {
    1: (MAE, RMAE, CMAE, MOCO, RANDOM),
    2: (MAE, RMAE, CMAE, MOCO, RANDOM),
    3: (*(row for row in TABLES[6].rows if row.method != SCRATCH), RANDOM),
    4: (MAE, RMAE, CMAE, MOCO, RANDOM),
}
PRETRAINED = 1  # the figure of encoders before fine-tuning
SHAPE_BIAS = 4


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fastmim figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="+", type=int, choices=sorted(FIGURES), metavar="N", help="1 to 4")
    parser.add_argument("--cue-conflict", type=Path, help="the images of figure 4, SHAPE/SHAPEn-TEXTUREm.png")
    parser.add_argument("--images", type=int, help="validation images of a CKA (5000; tiny: 1024)")
    add_maker(parser)
    args = parser.parse_args(arguments)
    try:
        if SHAPE_BIAS in args.figures and args.cue_conflict is None:
            raise ValueError("--cue-conflict: want the images of figure 4, got none")
        maker = Maker(args, SCALES[args.scale])
        for number in args.figures:
            encoders = {row.label: run_of(maker, row, number) for row in FIGURES[number]}
            if not args.dry_run:
                draw(args, maker, number, encoders)
    except (ValueError, OSError) as error:
        parser.exit(2, f"fastmim: error: {error}\n")
    except Stopped as error:
        parser.exit(1, f"fastmim: error: {error}; the same command goes on from here\n")


def run_of(maker: Maker, row: Row, number: int) -> Path:
    """The run directory of a row's encoder, trained if it is not there."""
    weights = None if row.method == SCRATCH else maker.pretrained(row, seed=0)
    if weights is not None and number == PRETRAINED:
        return weights
    maker.transferred(row, weights, "FT", seed=0)
    return maker.place(f"{row.key}-ft", seed=0)


def draw(args: argparse.Namespace, maker: Maker, number: int, encoders: dict[str, Path]) -> None:
    """By the command that anyone would give. Its own exit is this one's."""
    out = args.out / f"figure_{number}"
    words: Sequence[object] = [*encoders.values(), "--names", *encoders, "--out", out]
    if number == SHAPE_BIAS:
        shape_bias.main([*map(str, words), "--data", str(args.cue_conflict)])
        return
    images = args.images or (1024 if args.scale == "tiny" else 5000)
    crop = [] if args.scale == "full" else ["--crop", "1"]
    sys.stdout.flush()
    cka.main([*map(str, words), "--data", str(maker.val), "--images", str(images), *crop])
