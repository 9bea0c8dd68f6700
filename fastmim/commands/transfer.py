"""`fastmim finetune` and `fastmim linear`: `fastmim train` from the encoder of a checkpoint.

The command line that results, which `--resume` reads, has the sizes of the encoder and the number of classes.
`deepspeed fastmim/train.py --method finetune --init-from WEIGHTS ...` with these flags is the same on several
ranks; `fastmim tables --dry-run` prints such lines.
"""

import sys
from pathlib import Path
from typing import Any

from fastmim.data import find_images
from fastmim.flags import is_on, value_of, without
from fastmim.interop.encoders import load_pretrained
from fastmim.models.vit import Encoder, ViTConfig

USAGE = """usage: fastmim {name} WEIGHTS --data.path TRAIN --data.val VAL [flags of fastmim train]
       {more}

`--variant mocov3` of linear is MoCo v3's SGD without batch norm.
WEIGHTS is a run directory, a folder of transformers, or a file of timm's or of an official repository.
--labels 10% trains on a tenth of each class, --labels FILE on the images of a list, as SimCLR's.
`fastmim train --method {name} --help` lists all flags."""
MORE = {
    "finetune": "fastmim finetune --from scratch ...     [--recipe kz|mae_repo]",
    "linear": "fastmim linear --from scratch ...       features of first weights: what a probe begins at",
}
RECIPES = {"kz": "kz", "mae_repo": "mae-repo", "mae-repo": "mae-repo"}
OURS = {"from", "labels", "heads"}


def for_train(name: str, arguments: list[str]) -> list[str] | None:
    """The arguments of `fastmim train`; None after the usage. Exits with 2 on what cannot be."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(name=name, more=MORE[name]))
        return None
    try:
        return ["--method", name, *arguments] if is_on(arguments, "resume") else translated(name, arguments)
    except ValueError as error:
        print(f"fastmim: error: {name}: {error}", file=sys.stderr)
        sys.exit(2)


def translated(name: str, arguments: list[str]) -> list[str]:
    """What `fastmim train` is told. ValueError for weights that are none, or none at all."""
    weights = None if arguments[0].startswith("--") else Path(arguments[0])
    given = arguments[1:] if weights is not None else arguments
    source = value_of(given, "from")
    if (weights is None) == (source is None) or source not in (None, "scratch"):
        raise ValueError(f"want WEIGHTS or --from scratch, got {arguments[0]!r}")
    made = ["--method", name]
    if weights is not None:
        made += ["--init-from", str(weights), *model_flags(name, weights, given)]
    recipe = value_of(given, "recipe")
    if recipe in RECIPES:
        if name != "finetune":
            raise ValueError(f"--recipe {recipe}: is of fine-tuning; got {name}")
        made += ["--variant", RECIPES[recipe]]
        given = [*without(given, {"recipe"}), "--recipe", "imagenet"]
    if (labels := value_of(given, "labels")) is not None:
        made += ["--data.subset", labels]
    path = value_of(given, "data.path")
    if path is not None and value_of(given, "method.classes") is None:
        made += ["--method.classes", str(max(2, len(find_images(Path(path)).classes)))]
    return [*made, *without(given, OURS)]


def model_flags(name: str, weights: Path, given: list[str]) -> list[str]:
    """The encoder of the weights as flags, but for what is given."""
    heads = value_of(given, "heads")
    encoder = load_pretrained(weights, heads=None if heads is None else int(heads)).encoder
    if not isinstance(encoder, Encoder):
        raise ValueError(f"want a vision transformer, got Swin in {weights}")
    made: list[str] = []
    for field, value in fields_of(encoder.config, name).items():
        flag = f"model.{field.replace('_', '-')}"
        if value_of(given, flag) is None and not any(a == f"--{flag}" for a in given):
            made += flag_of(flag, value)
    return made


def fields_of(config: ViTConfig, name: str) -> dict[str, Any]:
    """What the transfer's encoder shares with that of the weights."""
    names = ("width", "depth", "heads", "patch", "channels", "positions", "layer_scale", "qkv_bias")
    fields = {field: getattr(config, field) for field in names}
    fields |= {"mean": config.pixel_mean, "std": config.pixel_std}
    height, width = config.size
    fields["image_size"] = height if height == width else (height, width)
    if name == "linear":
        fields["final_norm"] = config.final_norm
    elif config.positions == "sincos":
        fields["positions"] = "learned"
    return fields


def flag_of(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        room, _, name = flag.rpartition(".")
        return [f"--{flag}" if value else f"--{room}.no-{name}"]
    words = value if isinstance(value, tuple) else (value,)
    return [f"--{flag}", *map(str, words)]
