"""fastmim <command>: train, tokenizer, methods, export, data, knn, ridge, doctor.

fastmim train --method rmae             what `python fastmim/train.py` does, in one process
fastmim tokenizer train --tokenizer dvae  codes for BEiT and CAE to predict; also: dvae_large, vq, kmeans
fastmim methods                         what can be trained: T1, T2, M, and what a step costs
fastmim export RUN_DIR mae.pth          a run's weights as a checkpoint of facebookresearch/mae, or --to timm
fastmim data pack SRC DST               a set as tar shards, which are read fastest (--short-side 256)
fastmim data verify|index|stats PATH    which images are bad; index it anew; what it is like
fastmim knn RUN_DIR --train A --test B  how well nearest neighbors read its frozen features; also: ridge
fastmim finetune WEIGHTS --data.path A --data.val B  all of an encoder on labels; also: linear, a probe
fastmim embed WEIGHTS --data P --out F  features of images, with ids and labels, as Parquet or safetensors
fastmim cka WEIGHTS... --data PATH      how far the features of each block outlast hidden patches
fastmim shape-bias WEIGHTS... --data P  whether a classifier goes by shape or by texture, on cue conflicts
fastmim psnr WEIGHTS... --data PATH     how near predicted pixels are to the true ones, in dB
fastmim reconstruct WEIGHTS IMAGES      a picture of what a checkpoint predicts; --animate over ratios
fastmim attention WEIGHTS IMAGES        what its heads look at, and the rollout; pca: patch features as colors
fastmim tables 1 4 8 --data SET         the paper's tables: their runs, resumable, beside its numbers; figures
fastmim doctor [--json]                 what this machine will run on, and why
"""

import difflib
import sys
from collections.abc import Callable
from functools import partial


def train(arguments: list[str]) -> None:
    from fastmim import train as command

    command.main(arguments)


def tokenizer(arguments: list[str]) -> None:
    from fastmim.commands.tokenizer import for_train

    given = for_train(arguments)
    if given is not None:
        train(given)


def methods(arguments: list[str]) -> None:
    from fastmim.commands import methods as command

    command.main(arguments)


def export(arguments: list[str]) -> None:
    from fastmim.commands import export as command

    command.main(arguments)


def data(arguments: list[str]) -> None:
    from fastmim.commands import data as command

    command.main(arguments)


def probe(kind: str, arguments: list[str]) -> None:
    from fastmim.commands import probe as command

    command.main(kind, arguments)


def transfer(kind: str, arguments: list[str]) -> None:
    from fastmim.commands.transfer import for_train

    given = for_train(kind, arguments)
    if given is not None:
        train(given)


def embed(arguments: list[str]) -> None:
    from fastmim.commands import embed as command

    command.main(arguments)


def cka(arguments: list[str]) -> None:
    from fastmim.commands import cka as command

    command.main(arguments)


def shape_bias(arguments: list[str]) -> None:
    from fastmim.commands import shape_bias as command

    command.main(arguments)


def maps(kind: str, arguments: list[str]) -> None:
    from fastmim.commands import maps as command

    command.main(kind, arguments)


def psnr(arguments: list[str]) -> None:
    from fastmim.commands import psnr as command

    command.main(arguments)


def reconstruct(arguments: list[str]) -> None:
    from fastmim.commands import reconstruct as command

    command.main(arguments)


def tables(arguments: list[str]) -> None:
    from fastmim.commands import tables as command

    command.main(arguments)


def figures(arguments: list[str]) -> None:
    from fastmim.commands import figures as command

    command.main(arguments)


def doctor(arguments: list[str]) -> None:
    from fastmim.commands import doctor as command

    command.main(arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "tokenizer": tokenizer,
    "methods": methods,
    "export": export,
    "data": data,
    "knn": partial(probe, "knn"),
    "ridge": partial(probe, "ridge"),
    "finetune": partial(transfer, "finetune"),
    "linear": partial(transfer, "linear"),
    "embed": embed,
    "cka": cka,
    "shape-bias": shape_bias,
    "attention": partial(maps, "attention"),
    "pca": partial(maps, "pca"),
    "psnr": psnr,
    "reconstruct": reconstruct,
    "tables": tables,
    "figures": figures,
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
