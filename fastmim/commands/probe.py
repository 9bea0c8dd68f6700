"""`fastmim knn` and `fastmim ridge`: how well simple readers read an encoder's frozen features."""

import argparse
from pathlib import Path

from fastmim.commands.weights import add_reading, add_weights, check_counts, pretrained


def main(name: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"fastmim {name}", description="Read an encoder's frozen features of labeled images."
    )
    add_weights(parser)
    parser.add_argument("--train", type=Path, required=True, help="labeled images to read from")
    parser.add_argument("--test", type=Path, required=True, help="labeled images to be read")
    parser.add_argument("--most", type=int, metavar="N", help="N images of each set, evenly spaced (all)")
    add_reading(parser)
    args = parser.parse_args(arguments)
    from fastmim.commands.evaluate import evaluate

    try:
        check_counts(args, "most", "workers")
        encoder = pretrained(args, args.weights).encoder
        how = {"fraction": args.crop, "most": args.most, "threads": args.workers}
        for what, value in evaluate(name, encoder, args.train, args.test, **how):
            print(f"{what:>18}  {value:.4g}" if "lambda" in what else f"{what:>18}  {100 * value:.2f} %")
    except ValueError as error:
        parser.exit(2, f"fastmim: error: {error}\n")
