"""`fastmim data pack|verify|index|stats`: look after a set of images."""

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
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
    from fastmim.commands import data_reports as run

    try:
        sys.exit(run.COMMANDS[args.command](args))
    except ValueError as error:
        parser.exit(2, f"fastmim: error: {error}\n")
    except OSError as error:  # a full disk, a folder that cannot be written
        parser.exit(1, f"fastmim: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "fastmim: interrupted\n")
