"""A new method is one file and two lines: it trains, exports, is counted and rehearsed like the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.flops import step_flops
from fastmim.interop.encoders import load_encoder
from fastmim.methods import METHODS, suited
from fastmim.models.vit import ViTConfig
from tests.engine.conftest import images  # noqa: F401  a fixture
from tests.made_up import MadeUpConfig

ROOT = Path(__file__).resolve().parents[1]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """`main` of a module, once the method is in the two tables."""
    code = f"from tests.made_up import register; register(); from {module} import main; main()"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def flags(folder, *more: str) -> list[str]:
    sizes = {"width": 16, "depth": 1, "heads": 2, "patch": 4, "image-size": 16}
    model = [part for name, value in sizes.items() for part in (f"--model.{name}", str(value))]
    return [
        "--method", "made_up", "--recipe", "sample", "--data.decoder", "pillow", "--data.threads", "1",
        *model, "--batch", "8", "--log-every", "1", "--data.path", str(folder), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(images, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("made_up") / "run"
    first = flags(
        images, "--run-dir", str(folder), "--steps", "4", "--save-every", "2", "--precision", "bf16"
    )
    done = run("fastmim.train", *first)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_it_trains_by_the_command(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert json.loads((run_dir / "config.json").read_text())["run"]["method"]["hidden"] == 256  # of `fit`


def test_frozen_modules_are_not_saved(run_dir):
    with safe_open(run_dir / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "head.0.weight" in names and not any("tokenizer" in name or "frozen" in name for name in names)


def test_its_encoder_is_read_by_the_evaluation(run_dir):
    encoder = load_encoder(run_dir)
    assert encoder.config.positions == "learned" and encoder.config.layer_scale == 0.1
    done = run("fastmim.cli", "export", str(run_dir), str(run_dir.parent / "x.pth"))
    assert done.returncode == 0 and "head" in done.stdout
    assert "cls_token" in torch.load(run_dir.parent / "x.pth", weights_only=True)["model"]


def test_help_names_it_and_its_variants():
    done = run("fastmim.train", "--method", "made_up", "--help")
    words = " ".join(done.stdout.replace("│", " ").split())
    assert "--method.tokenizer" in words and "made_up: tall" in words


def test_a_frozen_module_that_is_not_there_is_one_clear_line(images, tmp_path):  # noqa: F811
    done = run("fastmim.train", *flags(images, "--method.tokenizer", str(tmp_path / "none.pth")))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "fastmim: error: method.tokenizer: want the file of a frozen module, got nothing at "
        f"{tmp_path / 'none.pth'}"
    )


def test_it_is_counted_and_rehearsed(monkeypatch, tmp_path):
    from benchmarks.gpu import stages

    monkeypatch.setitem(METHODS, "made_up", MadeUpConfig)
    model = ViTConfig(width=16, depth=1, heads=2, patch=4, image_size=16)
    config, suited_model = suited("made_up", model)
    assert step_flops(config, suited_model) == config.work(suited_model).flops > 0
    parts = [part for stage in stages.rehearsal(tmp_path) for part in stage.parts if part.name == "made_up"]
    assert parts, "the rehearsal has no part for it"
    (module, *arguments) = parts[0].command[1:]
    assert module == "benchmarks.throughput"
    done = run(module, *arguments, "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "throughput.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"made_up"} and rows[0]["images_per_s"] > 0
