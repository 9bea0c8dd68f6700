"""Frozen features of finished runs are read, compared and drawn; what is trained, other tests train."""

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import frozen
from fastmim.interop.metadata import encoder_metadata
from fastmim.models.vit import Encoder, ViTConfig
from tests.engine.conftest import write_images

MODEL = ViTConfig(width=16, depth=1, heads=2, patch=4, image_size=16)


@pytest.fixture
def finished(tmp_path):
    """Two runs that are done, so that nothing is trained, and labeled images."""
    for i, name in enumerate(("mae", "cmae-mask")):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        torch.manual_seed(i)
        save_file(Encoder(MODEL).state_dict(), run / "encoder.safetensors", encoder_metadata(MODEL))
        rows = [{"step": s, "epoch": 0.1, "loss": 1 / s, "feature_std": 0.9, "seconds": 2.0} for s in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("train", "test"):
        write_images(tmp_path / "data" / split, 48)
    return tmp_path


def test_rows_picture_and_status(finished, capsys):
    flags = ["--methods", "mae", "cmae:mask", "--runs", str(finished / "runs"), "--most", "36"]
    flags += ["--threads", "1", "--results", str(finished), "--name", "short"]
    status = frozen.main([str(finished / "data"), *flags])
    assert status == 1  # weights nobody trained
    assert "clearly above the first weights in ridge: none" in capsys.readouterr().out
    rows = [json.loads(line) for line in (finished / "short.jsonl").read_text().splitlines()]
    named = [row["method"] for row in rows]
    assert named == ["first weights of mae", "mae", "first weights of cmae:mask", "cmae:mask"]
    for row in rows:
        assert row["train_images"] == row["test_images"] == 36
        assert all(0 <= row[f"{f}/{p}"] <= 1 for f in ("cls", "mean") for p in ("knn", "ridge"))
    assert rows[1]["last"] == {"feature_std": 0.9, "loss": 0.5}
    assert (finished / "short.png").stat().st_size > 10_000


def test_an_encoder_is_read_once_and_a_changed_one_anew(finished, monkeypatch):
    said = []
    monkeypatch.setattr(frozen, "read", lambda encoder, *_: said.append(encoder) or {"n": len(said)})
    runs, run = finished / "runs", finished / "runs" / "mae"
    how = finished / "data", 36, 1
    assert [frozen.read_once(runs, run, *how)["n"] for _ in range(2)] == [1, 1]
    assert frozen.read_once(runs, run, finished / "data", 48, 1)["n"] == 2
    save_file(Encoder(MODEL).state_dict(), run / "encoder.safetensors", encoder_metadata(MODEL))
    assert frozen.read_once(runs, run, *how)["n"] == 3


@pytest.mark.parametrize(("share", "clear"), [(0.5, False), (0.53, False), (0.55, True), (0.4, False)])
def test_clearly_is_three_standard_errors(share, clear):
    def row(best):
        return {"cls/knn": 0.1, "mean/knn": best, "test_images": 5000}

    assert frozen.clearly_above(row(share), row(0.51), "knn") is clear


def test_a_run_that_is_not_finished_is_trained_by_the_command(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(frozen.subprocess, "run", lambda command, **_: said.append(command))
    frozen.train("cmae:mask", tmp_path, tmp_path, ["--steps", "5"])
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    frozen.train("mae", tmp_path, tmp_path, ["--steps", "5"])
    assert said[0][2:4] == ["--method", "cmae"] and said[0][6:8] == ["--variant", "mask"]
    assert "--resume" not in said[0] and said[1][-1] == "--resume" and "--variant" not in said[1]


def test_a_tokenizer_is_trained_first_and_slow_teachers_are_hurried(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(frozen.subprocess, "run", lambda command, **_: said.append(command))
    for name in ("beit", "dino"):
        frozen.train(name, tmp_path / name, tmp_path, [])
    assert [command[3] for command in said] == ["kmeans", "beit", "dino"]
    assert said[1][-2:] == ["--method.tokenizer", str(tmp_path / "kmeans")]
    assert said[2][-2:] == ["--method.ema", "0.99"]
