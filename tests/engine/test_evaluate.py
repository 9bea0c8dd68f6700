"""`fastmim knn` and `fastmim ridge` on a run's encoder: what they read, and what they refuse."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from fastmim import cli
from fastmim.commands.evaluate import evaluate, labeled_features
from fastmim.evals.knn import knn
from fastmim.interop.encoders import load_encoder
from fastmim.interop.metadata import encoder_metadata
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from tests.data.conftest import encode

MODEL = ViTConfig(width=16, depth=2, heads=2, patch=4, image_size=(16, 24), mean=(0.5,) * 3)
CPU = torch.device("cpu")


@pytest.fixture
def run_dir(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    save_file(Encoder(MODEL).state_dict(), tmp_path / "run" / "encoder.safetensors", encoder_metadata(MODEL))
    return tmp_path / "run"


def labeled(folder, count, seed):
    """Two classes that differ in how bright they are."""
    for i in range(count):
        path = folder / ("dark", "light")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(seed + i, size=(8, 8) if i % 2 else (30, 20), fmt="PNG"))
    return folder


def test_features_are_those_of_the_encoder_it_was(run_dir, tmp_path):
    folder = labeled(tmp_path / "set", 6, 0)
    encoder = load_encoder(run_dir)
    assert encoder.config.size == MODEL.size and encoder.config.pixel_mean == MODEL.pixel_mean
    found, labels, classes = labeled_features(encoder, folder, device=CPU, threads=1)
    assert classes == ("dark", "light") and labels.tolist() == [0, 0, 0, 1, 1, 1]
    some, few, _ = labeled_features(encoder, folder, most=4, device=CPU, threads=1)
    assert few.tolist() == [0, 0, 1, 1] and torch.equal(some["cls"], found["cls"][[0, 1, 3, 4]])
    torch.manual_seed(0)
    from fastmim.data import find_images
    from fastmim.data.feed.center import center_crops

    [(pixels, _)] = center_crops(find_images(folder), (16, 24))
    z = Encoder(MODEL)(Tokens(pixels)).tokens_BTD
    assert torch.equal(found["cls"], z[:, 0]) and torch.equal(found["mean"], z[:, 1:].mean(1))


def test_the_command_prints_what_the_probe_says(run_dir, tmp_path, capsys, monkeypatch):
    train, test = labeled(tmp_path / "train", 40, 0), labeled(tmp_path / "test", 20, 100)
    (test / "dark" / "x.heic").write_bytes(b"")
    monkeypatch.setattr(
        sys, "argv", ["fastmim", "knn", str(run_dir), "--train", str(train), "--test", str(test)]
    )
    cli.main()
    said = capsys.readouterr()
    assert said.err == f"left out of {test}: 1 file that is no image by its name (.heic 1)\n"
    lines = dict(line.strip().split("  ") for line in said.out.splitlines())
    encoder = load_encoder(run_dir)
    known, y, _ = labeled_features(encoder, train, device=CPU, threads=1)
    asked, t, _ = labeled_features(encoder, test, device=CPU, threads=1)
    for feature in ("cls", "mean"):
        for name, value in knn(known[feature], y, asked[feature], t):
            assert lines[f"{feature}/{name}"] == f"{100 * value:.2f} %"
    assert len(lines) == 4  # k = 10 and 20: there are 40 images
    found = dict(evaluate("ridge", load_encoder(run_dir), train, test, fraction=0.875, threads=1))
    assert found.keys() == {f"{f}/{n}" for f in ("cls", "mean") for n in ("ridge", "ridge_lambda")}


def test_what_cannot_be_read_is_said(run_dir, tmp_path, capsys, monkeypatch):
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes(encode(0, fmt="PNG"))
    train, test = labeled(tmp_path / "train", 4, 0), labeled(tmp_path / "test", 4, 100)
    (tmp_path / "other" / "cat").mkdir(parents=True)
    (tmp_path / "other" / "cat" / "a.png").write_bytes(encode(0, fmt="PNG"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    bare = tmp_path / "bare.safetensors"
    save_file(Encoder(MODEL).state_dict(), bare)
    for arguments, message in [
        ((tmp_path / "no", train, test), "a file of weights, got nothing"),
        ((broken, train, test), "broken.safetensors is no encoder of a run"),
        ((bare, train, test), "that divides the width, 16; give it by --heads"),
        ((run_dir, flat, test), "want images with labels"),
        ((run_dir, train, tmp_path / "other"), "the same classes in both sets"),
    ]:
        run, *sets = map(str, arguments)
        monkeypatch.setattr(sys, "argv", ["fastmim", "ridge", run, "--train", sets[0], "--test", sets[1]])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2 and message in capsys.readouterr().err
