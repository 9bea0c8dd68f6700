"""The command line of a run: which recipe, which size, and any field by its dotted name.

Order of precedence: recipe of the method, then its variant, its scale, --model, then dotted names. With
--resume the saved command line of the run comes first and what is given now overrides it.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastmim.engine.config import Run
from fastmim.models import VITS
from fastmim.recipes import METHOD_RECIPES, SCALES, VARIANTS, Variant

DEFAULT_METHOD = "mae"


@dataclass(frozen=True, kw_only=True)
class Command:
    """Pre-train a vision transformer by masked image modelling.

    Without --data.path the embedded sample set is trained on, with a model small enough for two CPU cores.
    """

    run: Annotated[Run, tyro.conf.arg(name="")]
    method: Literal[tuple(METHOD_RECIPES)] = DEFAULT_METHOD  # type: ignore[valid-type]
    """What to train; its own choices are --method.* below"""
    variant: Literal[tuple(sorted({n for names in VARIANTS.values() for n in names}))] | None = None  # type: ignore[valid-type]
    """Another row of the method's tables, of mae or cmae: see fastmim/recipes.py"""
    model: Literal[tuple(VITS)] | None = None  # type: ignore[valid-type]
    """Encoder size (by default the recipe's); patch and image size are --model.* below"""
    recipe: Literal[tuple(SCALES)] | None = None  # type: ignore[valid-type]
    """imagenet: as published. By default imagenet with --data.path, sample without"""
    print_config: bool = False
    """Print the resolved run as JSON, and stop"""


def parse(arguments: Sequence[str], *, quiet: bool = False) -> tuple[Command, list[str]]:
    """The command of these arguments, and the arguments it came from. Exits with 2 on what it does not know.

    `quiet` leaves the words to another rank.
    """
    arguments = [a for a in arguments if not a.startswith("--local_rank")]  # the deepspeed launcher adds it
    if value_of(arguments, "--steps") and value_of(arguments, "--epochs"):
        raise ValueError("steps, epochs: want one of them, got both")
    if "--resume" in arguments:
        arguments = saved_arguments(value_of(arguments, "--run-dir")) + arguments
    method = one_of(METHOD_RECIPES, value_of(arguments, "--method") or DEFAULT_METHOD, "method")
    has_data = value_of(arguments, "--data.path") is not None
    scale = one_of(
        SCALES, value_of(arguments, "--recipe") or ("imagenet" if has_data else "sample"), "recipe"
    )
    run = METHOD_RECIPES[method]()
    variant = value_of(arguments, "--variant")
    if variant is not None:
        run = variant_of(method, variant).of(run)
    run = SCALES[scale](run)
    size = value_of(arguments, "--model")
    if size is not None:
        preset = VITS[one_of(VITS, size, "model")]
        small = replace(preset, patch=run.model.patch, image_size=run.model.image_size)
        run = replace(run, model=preset if scale == "imagenet" else small)
    command = tyro.cli(
        Command,
        default=Command(run=run, method=method, variant=variant, recipe=scale),
        args=arguments,
        prog="fastmim train",
        console_outputs=not quiet,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return command, list(arguments)


def variant_of(method: str, name: str) -> Variant:
    known = VARIANTS.get(method, {})
    if not known:
        raise ValueError(f"variant: {method} has none, got {name!r}")
    return known[one_of(known, name, f"variant of {method}")]


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """The last value given to a flag, as `--flag value` or `--flag=value`."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, rest = argument.partition("=")
        if name.replace("_", "-") == flag:
            value = rest if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return value


def one_of(known: Iterable[str], name: str, what: str) -> str:
    """`name` if it is known; a ValueError with the nearest known name otherwise."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{what}: want one of {', '.join(known)}, got {name!r}{hint}")


def saved_arguments(run_dir: str | None) -> list[str]:
    """The command line of the run to resume, without what concerned one start only."""
    if run_dir is None:
        raise ValueError("resume: want --run-dir, the directory of the run to continue")
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"resume: want a run directory with its config.json, got nothing at {path}")
    saved = json.loads(path.read_text())["arguments"]
    if saved is None:
        raise ValueError(f"resume: {path} is of a run that no command line started")
    kept, dropping = [], False
    for argument in saved:
        if argument.startswith("--"):
            dropping = argument.partition("=")[0].replace("_", "-") in ("--resume", "--allow-changes")
        if not dropping:
            kept.append(argument)
    return kept
