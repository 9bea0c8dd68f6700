"""Ten losses of every method, compared exactly with those on record."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastmim.methods import METHODS

LOSSES = Path(__file__).resolve().parents[1] / "losses"


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What one process says of all methods, by method."""
    command = [sys.executable, LOSSES / "golden.py", *METHODS]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(text.split("\n", 1) for text in run.stdout.strip("\n").split("\n\n"))


@pytest.mark.parametrize("method", METHODS)
def test_ten_golden_losses(method, found):
    assert found[method].splitlines() == (LOSSES / f"{method}_cpu.txt").read_text().splitlines()
