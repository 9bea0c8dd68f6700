"""Collected by `make null-gpu` alone: everywhere else these files are not even imported."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WANTED = os.environ.get("FASTMIM_NULL_GPU") == "1"
collect_ignore_glob = [] if WANTED else ["test_*.py"]

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="pin the counts of training steps anew")


@pytest.fixture(scope="session")
def null_environment() -> dict[str, str]:
    """Of a process that sees the null device."""
    from tests.null_gpu.build import Unavailable
    from tests.null_gpu.run import environment

    # tests/conftest.py sets this, for it sees no GPU: here the kernels are compiled
    base = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        return environment(base, ROOT)
    except Unavailable as error:
        pytest.skip(f"null CUDA device: {error}")


@pytest.fixture(scope="session")
def on_null_device(null_environment: dict[str, str]) -> Run:
    """Runs a command on the null device; its output, whatever became of it."""

    def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, *command] if command[0].endswith(".py") or command[0][0] == "-" else command
        return subprocess.run(
            words, cwd=ROOT, env=null_environment | variables, capture_output=True, text=True, timeout=1800
        )

    return run
