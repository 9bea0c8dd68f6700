"""`fastmim export`: a run's weights as a checkpoint that other code loads."""

import argparse
from pathlib import Path


def main(arguments: list[str]) -> None:
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
