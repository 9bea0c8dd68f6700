"""`fastmim export`: a run's weights as a checkpoint that other code loads."""

import argparse
from pathlib import Path


def main(arguments: list[str]) -> None:
    from fastmim.interop.mae import export_mae
    from fastmim.interop.timm import export_timm

    parser = argparse.ArgumentParser(
        prog="fastmim export", description="Write a run's weights as an MAE checkpoint, or for timm."
    )
    parser.add_argument("run_dir", type=Path, help="a run directory, or a model.safetensors")
    parser.add_argument("file", type=Path, help="where to write: .pth, or .safetensors")
    parser.add_argument(
        "--to",
        choices=["mae", "timm"],
        default="mae",
        help="mae: encoder and decoder; timm: the encoder, as VisionTransformer or Beit load it strictly",
    )
    args = parser.parse_args(arguments)
    try:
        (export_timm if args.to == "timm" else export_mae)(args.run_dir, args.file)
    except ValueError as error:
        parser.exit(2, f"fastmim: error: {error}\n")
