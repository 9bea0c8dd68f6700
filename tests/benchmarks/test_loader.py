"""The loaders race on the same files; the baseline draws its boxes by RandomResizedCrop's law."""

import json

import numpy as np
import pytest
import torch
from fastmim_kernels import sample_keys

from benchmarks.pipeline import loader
from fastmim.data.crop import draw_boxes
from fastmim.views import View

pytest.importorskip("PIL")


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (40, 900)])
def test_the_baselines_boxes_have_the_law_of_ours(height, width):
    """Means of place, size and aspect over many draws, each within five standard errors."""
    torch.manual_seed(0)
    count = 4000
    theirs = np.array([loader.random_box(height, width) for _ in range(count)], float)
    assert (theirs[:, 0] >= 0).all() and (theirs[:, 2] <= width).all() and (theirs[:, 3] <= height).all()
    sizes = np.tile([[height, width]], (count, 1))
    top, left, h, w = draw_boxes(sample_keys(0, 0, torch.arange(count)), sizes, View(size=(224, 224)))[0].T
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
    loader.make_photographs(tmp_path / "photographs", 12)
    flags = "--batch 4 --threads 1 --seconds 0.1 --rounds 1 --providers dataloader pillow"
    folder = str(tmp_path / "photographs")
    assert loader.main([folder, *flags.split(), "--results", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "loader.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["dataloader", "pillow"]
    assert all(row["images_per_s"] > 0 and row["turns"] == 1 for row in rows)


def test_a_provider_that_fails_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "turns", lambda wanted, a: ({n: [] for n in wanted}, {"pillow": "no image"}))
    assert loader.main([str(tmp_path), "--providers", "pillow", "--results", str(tmp_path)]) == 1
    assert "pillow  no image" in capsys.readouterr().out
    assert json.loads((tmp_path / "loader.jsonl").read_text())["failed"] == "no image"
