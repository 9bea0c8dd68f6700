"""`fastmim knn` and `fastmim ridge`: how well simple readers read an encoder's frozen features."""

import argparse
import os
from pathlib import Path


def main(name: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"fastmim {name}", description="Read an encoder's frozen features of labeled images."
    )
    parser.add_argument("run_dir", type=Path, help="a run directory, or an encoder.safetensors")
    parser.add_argument("--train", type=Path, required=True, help="labeled images to read from")
    parser.add_argument("--test", type=Path, required=True, help="labeled images to be read")
    parser.add_argument(
        "--crop", type=float, default=224 / 256, help="central part of the short side (0.875)"
    )
    parser.add_argument("--most", type=int, metavar="N", help="N images of each set, evenly spaced (all)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="decoding threads")
    args = parser.parse_args(arguments)
    if (args.most is not None and args.most < 1) or args.workers < 1:
        parser.exit(2, f"fastmim: error: want --most and --workers >= 1, got {args.most}, {args.workers}\n")
    from fastmim.commands.evaluate import evaluate

    try:
        for what, value in evaluate(
            name,
            args.run_dir,
            args.train,
            args.test,
            fraction=args.crop,
            most=args.most,
            threads=args.workers,
        ):
            print(f"{what:>18}  {value:.4g}" if "lambda" in what else f"{what:>18}  {100 * value:.2f} %")
    except ValueError as error:
        parser.exit(2, f"fastmim: error: {error}\n")
