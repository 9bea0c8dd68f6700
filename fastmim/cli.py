"""fastmim <command>: train, export, data, knn, ridge, doctor.

fastmim train --method rmae             what `python fastmim/train.py` does, in one process
fastmim export RUN_DIR mae.pth          a run's weights as a checkpoint of facebookresearch/mae
fastmim data pack SRC DST               a set as tar shards, which are read fastest (--short-side 256)
fastmim data verify|index|stats PATH    which images are bad; index it anew; what it is like
fastmim knn RUN_DIR --train A --test B  how well nearest neighbors read its frozen features; also: ridge
fastmim doctor [--json]                 what this machine will run on, and why
"""

import argparse
import difflib
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path


def train(arguments: list[str]) -> None:
    from fastmim import train as command

    command.main(arguments)


def export(arguments: list[str]) -> None:
    from fastmim.interop.mae import export_mae

    parser = argparse.ArgumentParser(
        prog="fastmim export", description="Write a run's weights as an MAE checkpoint."
    )
    parser.add_argument("run_dir", type=Path, help="a run directory, or a model.safetensors")
    parser.add_argument(
        "file", type=Path, help="where to write: .pth as facebookresearch/mae, or .safetensors"
    )
    args = parser.parse_args(arguments)
    try:
        export_mae(args.run_dir, args.file)
    except ValueError as error:
        parser.exit(2, f"fastmim: error: {error}\n")


def data(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="fastmim data", description="Look after a set of images.")
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser(
        "pack", help="a set as tar shards", description="Pack a set into tar shards, or go on after a kill."
    )
    pack.add_argument("source", type=Path, metavar="SRC", help="folder, list, tar or Parquet shards")
    pack.add_argument("folder", type=Path, metavar="DST", help="where the shards go")
    pack.add_argument("--short-side", type=int, help="larger images are resized to it; without it none is")
    pack.add_argument("--quality", type=int, default=90, help="of resized JPEG and WebP (default: 90)")
    pack.add_argument("--shard-mb", type=int, default=256, help="largest shard, 10^6 bytes (default: 256)")
    verify = commands.add_parser(
        "verify",
        help="which images are bad",
        description="Decode every image as a run does; exit 1 if one is bad.",
    )
    verify.add_argument(
        "--decoder", choices=("dali", "pillow"), default="dali", help="that of the run (default: dali)"
    )
    index = commands.add_parser("index", help="index a set anew", description="Index a set anew.")
    stats = commands.add_parser("stats", help="what a set is like", description="Counts, sizes, colors.")
    stats.add_argument("--json", action="store_true", help="as JSON, with every class")
    for command in (verify, index, stats):
        command.add_argument("path", type=Path, metavar="PATH", help="folder, list, tar or Parquet shards")
    for command in (pack, verify, stats):
        command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads")
    args = parser.parse_args(arguments)
    if getattr(args, "workers", 1) < 1:
        parser.exit(2, f"fastmim: error: want --workers >= 1, got {args.workers}\n")
    from fastmim.data import commands as run

    try:
        sys.exit(run.COMMANDS[args.command](args))
    except ValueError as error:
        parser.exit(2, f"fastmim: error: {error}\n")
    except OSError as error:  # a full disk, a folder that cannot be written
        parser.exit(1, f"fastmim: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "fastmim: interrupted\n")


def probe(name: str, arguments: list[str]) -> None:
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
    from fastmim.engine.evaluate import evaluate

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


def doctor(arguments: list[str]) -> None:
    from fastmim.engine.doctor import print_report, report

    parser = argparse.ArgumentParser(
        prog="fastmim doctor", description="What this machine will run on, and why."
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `fastmim doctor | head` is no error
    content = report()
    print(json.dumps(content, indent=2)) if args.json else print_report(content)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "export": export,
    "data": data,
    "knn": partial(probe, "knn"),
    "ridge": partial(probe, "ridge"),
    "doctor": doctor,
}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"fastmim: error: want one of {', '.join(COMMANDS)}, got {name!r}{hint}", file=sys.stderr)
        sys.exit(2)
    try:
        COMMANDS[name](arguments)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("fastmim"):
            raise
        print(
            f"fastmim: error: {name} needs the package {error.name}: pip install -e '.[engine]'",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
