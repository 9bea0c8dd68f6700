"""Ten losses of every method, compared exactly with those on record."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastmim.methods import METHODS

LOSSES = Path(__file__).resolve().parents[1] / "losses"


@pytest.mark.parametrize("method", METHODS)
def test_ten_golden_losses(method):
    run = subprocess.run(
        [sys.executable, LOSSES / "golden.py", method], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == (LOSSES / f"{method}_cpu.txt").read_text().splitlines()
