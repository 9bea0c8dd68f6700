"""The loaders race on the same files; the baseline draws its boxes by RandomResizedCrop's law."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fastmim_kernels import sample_seeds

from benchmarks.pipeline import loader, providers
from fastmim.data.augment.crop import draw_boxes
from fastmim.views import Crop

pytest.importorskip("PIL")


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (40, 900)])
def test_the_baselines_boxes_have_the_law_of_ours(height, width):
    """Means of place, size and aspect over many draws, each within five standard errors."""
    torch.manual_seed(0)
    count = 4000
    theirs = np.array([providers.random_box(height, width) for _ in range(count)], float)
    assert (theirs[:, 0] >= 0).all() and (theirs[:, 2] <= width).all() and (theirs[:, 3] <= height).all()
    sizes = np.tile([[height, width]], (count, 1))
    top, left, h, w = draw_boxes(sample_seeds(0, 0, torch.arange(count)), sizes, Crop(size=(224, 224)))[0].T
    x0, y0, x1, y1 = theirs.T
    found = (x0, y0, x1 - x0, y1 - y0, np.log((x1 - x0) / (y1 - y0)))
    for a, b in zip(found, (left, top, w, h, np.log(w / h)), strict=True):
        error = np.hypot(a.std(), b.std()) / count**0.5
        assert abs(a.mean() - b.mean()) <= 5 * error + 0.01 * max(height, width) * (error == 0)


def test_photographs_are_of_imagenets_size(tmp_path):
    from PIL import Image

    loader.make_photographs(tmp_path, 3)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 and len({path.read_bytes() for path in files}) == 3
    with Image.open(files[0]) as image:
        assert image.size == (500, 375) and image.mode == "RGB"
    assert 60e3 < files[0].stat().st_size < 200e3


@pytest.mark.slow
def test_a_race_of_loaders(tmp_path, capsys):
    """From files and from shards: rows that say what was compared, and a table."""
    from fastmim import cli

    folder, shards = tmp_path / "photographs", tmp_path / "shards"
    loader.make_photographs(folder, 12)
    with pytest.raises(SystemExit, match="0"):
        cli.data(["pack", str(folder), str(shards), "--short-side", "256"])
    names = ["dataloader_uint8", "pillow", "pillow_packed"]
    flags = ["--batch", "4", "--threads", "1", "--seconds", "0.1", "--rounds", "1", "--packed", str(shards)]
    assert loader.main([str(folder), *flags, "--results", str(tmp_path), "--providers", *names]) == 0
    rows = [json.loads(line) for line in (tmp_path / "loader.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == names
    for row in rows:
        assert row["images_per_s"] > 0 and row["turns"] == 1
        assert row["images_per_s_per_core"] == pytest.approx(row["images_per_s"] / row["cores"])
        assert row["of_baseline"] == pytest.approx(row["images_per_s"] / rows[0]["images_per_s"])
    assert "x dataloader_uint8" in capsys.readouterr().out


@pytest.mark.parametrize("name", providers.PROVIDERS)
def test_what_each_provider_delivers(name, tmp_path, torchvision_loads):
    needs = providers.NEEDS[name]
    pytest.importorskip(needs)
    loader.make_photographs(tmp_path, 6)
    turn = providers.Turn(tmp_path, 3, 1, 0.65)
    batches = providers.PROVIDERS[name](turn)
    crops = next(batches)
    batches.close()
    if name == "dataloader":  # as main_pretrain.py of MAE hands it to the model
        assert crops.shape == (3, 3, 224, 224) and crops.dtype == torch.float32
        assert -2.2 < crops.min() < crops.max() < 2.7 and abs(crops.mean()) < 1.5
        assert not torch.equal(crops, (crops * 255).round() / 255)  # normalized, not merely scaled
    else:
        assert crops.shape == (3, 224, 224, 3) and crops.dtype == torch.uint8
        assert crops.float().std() > 5


def test_maes_transforms_are_maes(torchvision_loads):
    pytest.importorskip("torchvision")
    names = [type(t).__name__ for t in providers.maes_transforms().transforms]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"]
    crop, _, _, normalize = providers.maes_transforms().transforms
    assert crop.interpolation.value == "bicubic" and crop.scale == (0.2, 1.0) and crop.size == (224, 224)
    assert tuple(normalize.mean) == (0.485, 0.456, 0.406)


def test_the_baseline_of_a_choice_has_as_many_threads():
    def choice(name, threads):
        return name, providers.Turn(Path("x"), 4, threads, 0.65)

    medians = {
        choice("dataloader_uint8", 1): 5.0, choice("dataloader", 2): 10.0, choice("dali", 2): 30.0,
        choice("dali", 1): 20.0, choice("dataloader_uint8", 2): 12.0, choice("dali", 4): 40.0,
    }  # fmt: skip
    assert loader.baseline_of(choice("dali", 2), medians) == ("dataloader", 10.0)
    assert loader.baseline_of(choice("dali", 1), medians) == ("dataloader_uint8", 5.0)
    assert loader.baseline_of(choice("dali", 4), medians) is None


@pytest.mark.parametrize(("device", "dali"), [("cpu", 2), ("cuda", 6)])
def test_a_sweep_of_threads_and_of_the_jpeg_decoders_load(device, dali, monkeypatch, capsys):
    """The load is compared where it matters only: DALI on a GPU."""
    monkeypatch.setattr(loader, "DEVICE", device)
    monkeypatch.setattr(
        loader, "why_absent", lambda name, a: "no shards" if a.packed is None and "_p" in name else None
    )
    a = loader.parser().parse_args(["x", "--threads", "4", "8", "--hw-decoder-load", "0.5", "0.65", "0.9"])
    choices = loader.wanted(a)
    assert len(set(choices)) == len(choices)
    count = {
        name: sum(n == name for n, _ in choices) for name in ("dali", "pillow", "dataloader", "dali_packed")
    }
    assert count == {"dali": dali, "pillow": 2, "dataloader": 2, "dali_packed": 0}
    assert "dali_packed  absent: no shards" in capsys.readouterr().out


def test_a_provider_that_fails_is_named(tmp_path, monkeypatch, capsys):
    def turns(choices, a):
        return {choice: [] for choice in choices}, {choice: "no image" for choice in choices}

    monkeypatch.setattr(loader, "turns", turns)
    assert loader.main([str(tmp_path), "--providers", "pillow", "--results", str(tmp_path)]) == 1
    assert "no image" in capsys.readouterr().out
    assert json.loads((tmp_path / "loader.jsonl").read_text())["failed"] == "no image"
