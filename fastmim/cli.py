"""fastmim <command>: train, export, doctor.

fastmim train --method rmae             what `python fastmim/train.py` does, in one process
fastmim export RUN_DIR mae.pth          a run's weights as a checkpoint of facebookresearch/mae
fastmim doctor [--json]                 what this machine will run on, and why
"""

import argparse
import difflib
import json
import signal
import sys
from collections.abc import Callable
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


COMMANDS: dict[str, Callable[[list[str]], None]] = {"train": train, "export": export, "doctor": doctor}


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
