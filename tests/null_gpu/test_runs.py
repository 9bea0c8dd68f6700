"""Whole runs on the null device, by the real launcher: to the end, on from a checkpoint, out as weights.

Values are zeros there (README.md): what is looked at is that nothing raises and that all is written.
"""

import json
import shutil

import pytest
from safetensors import safe_open

from fastmim.methods import METHODS

PIXELS = ("mae", "rmae", "cmae_huang", "simmim")  # methods that predict them
TINY = ["--model.width", "32", "--model.depth", "1", "--model.heads", "2"]
RUN = [
    *TINY,
    "--batch", "32", "--accumulate", "2", "--optim.clip", "1.0",
    "--data.decoder", "pillow", "--data.cache", "device",
    "--save-every", "2", "--log-every", "2",
]  # fmt: skip


def train(on_null_device, *arguments):
    run = on_null_device("deepspeed", "fastmim/train.py", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_to_its_end_and_on_from_there(on_null_device, tmp_path, method):
    folder = tmp_path / "run"
    out = train(on_null_device, "--method", method, *RUN, "--run-dir", str(folder), "--steps", "4")
    assert "on  cuda, bf16, ZeRO 1" in out and "on the device of each rank" in out
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    shutil.rmtree(folder / "checkpoints" / "step-00000004")  # as if it had been killed before
    out = train(on_null_device, "--run-dir", str(folder), "--resume")
    assert "resumed  from step 2" in out
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    assert all(row["loss"] == 0.0 for row in rows(folder))
    assert {path.name for path in (folder / "checkpoints").glob("step-*")} >= {
        "step-00000002",
        "step-00000004",
    }
    with safe_open(folder / "encoder.safetensors", "pt") as file:
        assert file.get_tensor("blocks.0.attn.qkv.weight").shape == (96, 32)
    exported = on_null_device("-m", "fastmim.cli", "export", str(folder), str(tmp_path / "mae.pth"))
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert (tmp_path / "mae.pth").stat().st_size > 0
    assert (folder / "reconstruction.png").exists() == (method in PIXELS)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_other_stages_of_zero_go_to_their_end(on_null_device, tmp_path, zero):
    folder = tmp_path / "run"
    stage = ["--zero", str(zero), "--run-dir", str(folder), "--steps", "2"]
    out = train(on_null_device, "--method", "cmae_huang", *RUN, *stage)
    assert f"ZeRO {zero}" in out
    assert (folder / "model.safetensors").exists()
