"""A command line as words: which field a flag sets, to what, and the words without it.

Flags are `--field value...` or `--field=value`, booleans `--field` and `--no-field`; `_` is `-`.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

PATHS = ("data.path", "data.val", "probe.data", "init-from", "run-dir", "method.tokenizer")


def field_of(argument: str) -> str | None:
    """The field that a flag sets: `method.norm-pix` for `--method.no-norm_pix`. None for a value."""
    if not argument.startswith("--"):
        return None
    room, dot, name = argument[2:].partition("=")[0].replace("_", "-").rpartition(".")
    return f"{room}{dot}{name.removeprefix('no-')}"


def value_of(arguments: Sequence[str], field: str) -> str | None:
    """The last value given to a field, as `--field value` or `--field=value`."""
    value = None
    for i, argument in enumerate(arguments):
        if field_of(argument) == field:
            _, equals, rest = argument.partition("=")
            value = rest if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return value


def is_on(arguments: Sequence[str], field: str) -> bool:
    """Whether the last of `--field` and `--no-field` is the first."""
    flags = [argument for argument in arguments if field_of(argument) == field]
    return bool(flags) and not flags[-1].startswith("--no-")


def without(arguments: Sequence[str], fields: Collection[str]) -> list[str]:
    """The arguments but for these fields, with all their values."""
    kept, dropping = [], False
    for argument in arguments:
        if (field := field_of(argument)) is not None:
            dropping = field in fields
        if not dropping:
            kept.append(argument)
    return kept


def with_absolute_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments as they mean the same in any folder. ValueError for a path without a letter."""
    made, field = [], None
    for argument in arguments:
        flag = field_of(argument)
        head, equals, value = argument.partition("=") if flag else ("", "", argument)
        if (flag or field) in PATHS and (equals or not flag):
            if not value:
                raise ValueError(f"{flag or field}: want a path, got nothing")
            argument = f"{head}{equals}{Path(value).absolute()}"
        made.append(argument)
        field = flag
    return made
