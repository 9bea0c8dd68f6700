"""The command line of a run: which recipe, which size, and any field by its dotted name.

Order of precedence: recipe of the method, then its variant, its scale, --model, then dotted names; of a flag
given more than once the last, and a note says so. Paths are made absolute, so that a saved command line means
the same in any folder.

Resume  What is given replaces what the saved command line of the run had; --epochs and --steps replace one
        another, and the schedule is from then on that of a run of the new length. A run keeps its method,
        variant, recipe, model and first weights: another is refused by name. What else shapes the numbers is
        in the checkpoint, which refuses by name what differs.
"""

import difflib
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastmim.engine.config import Run
from fastmim.flags import field_of, is_on, value_of, with_absolute_paths, without
from fastmim.methods import METHODS
from fastmim.methods.base import MethodConfig
from fastmim.methods.transfer import TRANSFERS
from fastmim.methods.variants import Variant
from fastmim.models import VITS, resized
from fastmim.recipes import RECIPES, SCALES, varied

DEFAULT_METHOD = "mae"
VARIANT_NAMES = tuple(
    sorted({name for method in (*METHODS.values(), *TRANSFERS.values()) for name in method.variants})
)
VARIANT_HELP = "Another row of the method's tables. " + "; ".join(
    f"{name}: {', '.join(method.variants)}"
    for name, method in {**METHODS, **TRANSFERS}.items()
    if method.variants
)
ONE_START = {"resume", "resume-step", "allow-changes", "print-config"}  # flags that say nothing of the run


@dataclass(frozen=True, kw_only=True)
class Command:
    """Pre-train a vision transformer by masked image modeling.

    Without --data.path the embedded sample set is trained on, with a model small enough for two CPU cores.
    """

    run: Annotated[Run, tyro.conf.arg(name="")]
    method: Literal[tuple(RECIPES)] = DEFAULT_METHOD  # type: ignore[valid-type]
    """What to train; its own choices are --method.* below. finetune and linear want weights; the last
    four are tokenizers, for beit and cae"""
    variant: Annotated[Literal[VARIANT_NAMES] | None, tyro.conf.arg(help=VARIANT_HELP)] = None  # type: ignore[valid-type]
    model: Literal[tuple(VITS)] | None = None  # type: ignore[valid-type]
    """Encoder size (by default the recipe's); patch and image size are --model.* below"""
    recipe: Literal[tuple(SCALES)] | None = None  # type: ignore[valid-type]
    """imagenet: as published. By default imagenet with --data.path, sample without"""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the resolved run as JSON, and stop"""


@dataclass(frozen=True)
class Choices:
    """What decides, before any field by its name, which fields a run has and what they are."""

    method: str = DEFAULT_METHOD
    variant: str | None = None
    recipe: str = "sample"
    model: str | None = None

    @classmethod
    def of(cls, arguments: Sequence[str]) -> "Choices":
        implied = "sample" if value_of(arguments, "data.path") is None else "imagenet"
        return cls(
            method=value_of(arguments, "method") or DEFAULT_METHOD,
            variant=value_of(arguments, "variant"),
            recipe=value_of(arguments, "recipe") or implied,
            model=value_of(arguments, "model"),
        )

    def run(self) -> Run:
        """The run of these choices. ValueError, with the nearest known name, for one that there is not."""
        scale = SCALES[one_of(SCALES, self.recipe, "recipe")]
        run = RECIPES[one_of(RECIPES, self.method, "method")]()
        if self.variant is not None:
            run = varied(run, variant_of(run.method, self.variant))
        run = scale(run)
        if self.model is None:
            return run
        model = resized(run.model, one_of(VITS, self.model, "model"))
        if self.recipe != "imagenet":  # the patch is that of its small images
            model = replace(model, patch=run.model.patch)
        return replace(run, model=model)


def parse(arguments: Sequence[str], *, quiet: bool = False) -> tuple[Command, list[str]]:
    """The command of these arguments, and the arguments it came from, with absolute paths.

    Exits with 2 on flags that it does not know; ValueError for values that cannot be. `quiet` leaves the
    words to another rank.
    """
    given = [a for a in arguments if not a.startswith("--local_rank")]  # the deepspeed launcher adds it
    names = [name for name in map(field_of, given) if name is not None]
    if {"steps", "epochs"} <= set(names):
        raise ValueError("steps, epochs: want one of them, got both")
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        if not quiet:
            print(f"fastmim: note: --{name} is given more than once; the last counts", file=sys.stderr)
    given = with_absolute_paths(given)
    resumes = is_on(given, "resume")
    if resumes:
        given = with_absolute_paths(resumed(given, quiet=quiet))
    command = command_of(Choices.of(given), given, quiet=quiet)
    if resumes and {"steps", "epochs"} & set(names):  # whoever says how long means another length
        allowed = (*command.run.allow_changes, "total_steps")
        command = replace(command, run=replace(command.run, allow_changes=allowed))
    return command, given


def command_of(c: Choices, arguments: list[str], *, quiet: bool) -> Command:
    """What tyro makes of the arguments. What a configuration refuses is a line, all else tyro's frame."""
    default = Command(run=c.run(), method=c.method, variant=c.variant, recipe=c.recipe)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(
                Command, default=default, args=arguments, prog="fastmim train", console_outputs=not quiet
            )
    except SystemExit as stopped:
        if (refusal := own_refusal(stopped)) is not None:
            raise refusal from None
        if not quiet:
            print(said.getvalue(), end="", file=sys.stderr)
        raise


def own_refusal(error: BaseException | None) -> ValueError | None:
    """The ValueError behind an error if a configuration of ours raised it, not tyro at a word."""
    while error is not None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        ours = frames and frames[-1].f_globals["__name__"].startswith("fastmim.")
        if isinstance(error, ValueError) and ours:
            return error
        error = error.__context__
    return None


# --- what is chosen by name ---------------------------------------------------------------------------


def variant_of(method: MethodConfig, name: str) -> Variant:
    known = method.variants
    if not known:
        raise ValueError(f"variant: {method.name} has none, got {name!r}")
    return known[one_of(known, name, f"variant of {method.name}")]


def one_of(known: Iterable[str], name: str, what: str) -> str:
    """`name` if it is known; a ValueError with the nearest known name otherwise."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{what}: want one of {', '.join(known)}, got {name!r}{hint}")


# --- --resume -----------------------------------------------------------------------------------------


def resumed(given: list[str], *, quiet: bool) -> list[str]:
    """The saved command line of the run in --run-dir, with what is given now in the place of what it had.

    ValueError, naming the flag, for what a run keeps: what it is of, and what it started from.
    """
    run_dir = value_of(given, "run-dir")
    if run_dir is None:
        raise ValueError("resume: want --run-dir, the directory of the run to continue")
    saved, was_in = saved_start(Path(run_dir))
    had = Choices.of(saved)
    for field in ("method", "recipe", "variant", "model"):
        check_kept(had, field, value_of(given, field), run_dir)
    check_start(value_of(saved, "init-from"), value_of(given, "init-from"))
    over = {field for field in map(field_of, given) if field is not None}
    if value_of(saved, "recipe") is None:
        saved = ["--recipe", had.recipe, *saved]  # --data.path given anew is no other recipe
    if over & {"steps", "epochs"}:
        over |= {"steps", "epochs"}
    if "data.path" not in over and was_in is not None:
        saved = with_moved_data(saved, was_in, Path(run_dir), quiet=quiet)
    return without(saved, over | ONE_START) + given


def saved_start(run_dir: Path) -> tuple[list[str], Path | None]:
    """The command line that config.json has, and the run directory as it was called then, if it says so."""
    path = run_dir / "config.json"
    if not os.path.isfile(path):
        raise ValueError(f"resume: want a run directory with its config.json, got nothing at {path}")
    try:
        content = json.loads(path.read_text())
        arguments, was_in = content["arguments"], content.get("run_dir")
        words = arguments if isinstance(arguments, list) else [] if arguments is None else [None]
        if not all(isinstance(word, str) for word in words) or not isinstance(was_in, str | None):
            raise TypeError
    except OSError as error:
        raise ValueError(f"resume: {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"resume: {path} is damaged, or no run wrote it") from None
    if arguments is None:
        raise ValueError(f"resume: {path} is of a run that no command line started")
    return arguments, None if was_in is None else Path(was_in)


def check_kept(had: Choices, field: str, got: str | None, run_dir: str) -> None:
    """ValueError if `got` would make another run of it; another name for the same is none."""
    was = getattr(had, field)
    if got is None or got == was:
        return
    if field == "method":
        one_of(RECIPES, got, field)
    elif replace(had, **{field: got}).run() == had.run():
        return
    started = f"without --{field}" if was is None else f"with {was}"
    raise ValueError(
        f"{field}: the run was started {started}, got {got}: --resume continues the same run; "
        f"--init-from {run_dir} starts another from its weights"
    )


def check_start(was: str | None, got: str | None) -> None:
    if got is None or (was is not None and os.path.realpath(was) == os.path.realpath(got)):
        return
    started = "from fresh weights" if was is None else f"from {was}"
    raise ValueError(
        f"init-from: the run started {started}, got {got}: --resume continues from its checkpoint"
    )


def with_moved_data(saved: list[str], was_in: Path, run_dir: Path, *, quiet: bool) -> list[str]:
    """The saved arguments; where the run directory was moved and its data with it, with the data's new place.

    That is the place which it has from the run directory, as it had before. ValueError if it is at neither.
    """
    path = value_of(saved, "data.path")
    now = Path(os.path.realpath(run_dir))
    if path is None or now == was_in or is_there(path):
        return saved
    moved = os.path.normpath(now / os.path.relpath(path, was_in))
    if not is_there(moved):
        raise ValueError(
            f"data.path: the run had its data at {path}, where nothing is, nor at {moved}, where it would be "
            "if it had been moved with the run; give its place by --data.path"
        )
    if not quiet:
        print(f"fastmim: note: the data is no more at {path}: taken from {moved}", file=sys.stderr)
    return [*without(saved, {"data.path"}), "--data.path", moved]


def is_there(path: str) -> bool:
    """Whether a path exists; of a pattern, whether the folder of its first `*`, `?`, `[` or `{` does."""
    fixed = re.split(r"[*?\[{]", path, maxsplit=1)[0]
    return os.path.exists(path) or (fixed != path and os.path.isdir(os.path.dirname(fixed)))
