"""Where a number was measured: device, versions, state of the code, command, time. Every row ends with it."""

import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NULL = DEVICE == "cuda" and "NULL_CUDA" in os.environ  # a driver that runs nothing: values are garbage there
NULL_DEVICE = "a null device, which computes nothing"
if NULL:
    torch.backends.cuda.enable_cudnn_sdp(False)  # its plans want a real device
PACKAGES = (
    "torch",
    "triton",
    "xformers",
    "mslk-cuda",
    "deepspeed",
    "nvidia-dali-cuda130",
    "timm",
    "transformers",
)
SOURCES = ("fastmim/**/*.py", "kernels/**/*.py", "benchmarks/**/*.py", "csrc/*.cpp", "csrc/*.h")
CHANGES = ("status", "--porcelain", "--", ".", ":!benchmarks/results")  # rows are written while others come


def environment() -> dict[str, Any]:
    """Device, versions, state of the code, command and time: what every row ends with."""
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": None if (status := git(*CHANGES)) is None else bool(status),
        "sources": sources_digest(),
        "device": device_name(),
        "load": round(os.getloadavg()[0], 1),  # of the host: a busy one makes CPU figures worthless
        "versions": {"python": sys.version.split()[0], **versions()},
        "command": shlex.join(["python", *map(portable, sys.argv)]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name() -> str:
    if DEVICE == "cpu":
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return NULL_DEVICE if NULL else torch.cuda.get_device_name()


@cache
def import_torchvision() -> torch.library.Library | None:
    """Import it; beside a torch for CPUs its own ops lack even their schemas. What is returned must live."""
    library = None
    try:
        import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision")
    return library


def portable(argument: str) -> str:
    """An absolute path without the folders of one machine."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def git(*arguments: str) -> str | None:
    """What git says of this repository; None where there is no git or no repository."""
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


@cache
def sources_digest() -> str:
    """Twelve digits of the SHA-256 of the code, which names it where there is no commit to name."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def append(path: Path, row: dict[str, Any]) -> None:
    """One more line, whole and on disk before the next measurement begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())


def module_exists(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
