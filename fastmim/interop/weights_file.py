"""Files of weights as people have them: a run directory, safetensors, or what torch.save left; no code runs.

Wrappers  A dictionary of tensors is looked for at the top, or under one of `WRAPPERS`, which training scripts
          put beside their epoch, optimizer and command line.
Prefixes  What wraps a module while it trains leaves its name before every parameter's: `PREFIXES`, in any
          order and number, are taken off where all names begin with them.
Pickles   Read by torch's own reader, which makes tensors and nothing else. What stands beside the weights may
          be of the classes of `BESIDE`: paths, command lines, numbers of numpy, configurations. They become
          `Inert`, empty objects of ours; any other class or function is refused by its name.
"""

import argparse
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastmim.interop.layouts import under_our_names

WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "model_state", "net", "weights", "teacher")
PREFIXES = ("module.", "_orig_mod.", "model.", "_forward_module.", "_fsdp_wrapped_module.")
BESIDE = ("argparse", "pathlib", "numpy", "datetime", "omegaconf", "typing")
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Inert:
    """Stands for an object that was saved beside the weights. Takes whatever made it, and is nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_weights(path: Path, what: str = "init-from") -> dict[str, Tensor]:
    """The weights in a file, .safetensors or torch's, or in a run directory, by their bare names.

    ValueError, a line that begins with `what`, if there is no such file or it holds no dictionary of tensors.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{what}: want a run directory or a file of weights, got nothing at {path}")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else load_torch(path)
    except Exception as error:  # readers raise whatever a damaged or foreign file makes them stumble over
        raise ValueError(
            f"{what}: {path} cannot be read as weights, or holds more than tensors: {one_line(error)}"
        ) from None
    return under_our_names(without_prefixes(tensors_of(content, f"{what}: {path}")))


def write_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file, whole or not there, with the mode that the umask gives to all others."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.touch()
    mode = new.stat().st_mode
    save_file(dict(tensors), new, dict(metadata))  # which puts a file of mode 0600 in the place
    os.chmod(new, mode)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(new, path)


def load_torch(path: Path) -> Any:
    """What torch.save wrote, tensors on the CPU. Raises UnpicklingError for what it would have to run."""
    with torch.serialization.safe_globals([argparse.Namespace]), stand_ins(path):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def stand_ins(path: Path) -> Iterator[None]:
    """Lets torch's reader take `Inert` for the classes of `BESIDE` that this file names."""
    named: list[str] = []
    if zipfile.is_zipfile(path):  # torch's format since 1.6; it can say what it would need
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    wanted = [name for name in named if name.partition(".")[0] in BESIDE]
    classes = [type("Inert", (Inert,), {}) for _ in wanted]  # the reader wants a class of its own for each
    with torch.serialization.safe_globals(list(zip(classes, wanted, strict=True))):
        yield


def tensors_of(content: Any, origin: str) -> dict[str, Tensor]:
    """The dictionary of tensors at the top or under a wrapper. ValueError, naming `origin`, without one."""
    if is_flat(content):
        return content
    keys = list(content) if isinstance(content, dict) else []
    for wrapper in WRAPPERS:
        if wrapper in keys and is_flat(content[wrapper]):
            return content[wrapper]
    got = f"the keys {', '.join(map(str, keys[:6]))}" if keys else f"a {type(content).__name__}"
    raise ValueError(f"{origin}: want a dictionary of tensors, or one under {', '.join(WRAPPERS)}, got {got}")


def is_flat(content: Any) -> bool:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items())


def without_prefixes(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrapped the module in training."""
    while found := [p for p in PREFIXES if all(name.startswith(p) for name in flat)]:
        flat = {name.removeprefix(found[0]): tensor for name, tensor in flat.items()}
    return {name.replace("._orig_mod.", "."): tensor for name, tensor in flat.items()}  # of one compiled part


def one_line(error: Exception) -> str:
    """What was the matter: the lines of a library as one, without its advice and its colors."""
    text = ESCAPES.sub("", str(error))
    if unknown := re.search(r"(?:Unsupported global: GLOBAL|GLOBAL) (\S+)", text):
        return f"{unknown[1].strip('`,')} would be run"
    return " ".join(text.split())[:200] or type(error).__name__
