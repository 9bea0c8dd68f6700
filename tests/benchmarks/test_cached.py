"""The cache races on the same images as its baseline."""

import json

import numpy as np
import pytest
import torch

from benchmarks.pipeline import cached, loader

pytest.importorskip("PIL")


def test_the_baseline_cuts_its_pixels():
    rng = np.random.default_rng(0)
    pixels = [np.full((9, 7, 3), value, np.uint8) for value in (3, 200)]
    pixels.append(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    images = cached.DecodedImages(pixels, 8)
    assert len(images) == 3
    assert images[0].unique().tolist() == [3] and images[1].unique().tolist() == [200]
    torch.manual_seed(0)
    crops = [images[2] for _ in range(4)]
    assert crops[0].shape == (8, 8, 3) and crops[0].dtype == torch.uint8
    assert not any(torch.equal(crops[0], crop) for crop in crops[1:])


@pytest.mark.slow
def test_a_race_of_caches(tmp_path, capsys):
    loader.make_photographs(tmp_path / "photographs", 6, height=60, width=50)
    flags = "--batch 4 --size 16 --threads 1 --seconds 0.1 --rounds 1 --providers dataloader ram device"
    folder = str(tmp_path / "photographs")
    assert cached.main([folder, *flags.split(), "--results", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "cached.jsonl").read_text().splitlines()]
    names = ["dataloader", "ram"] + ["device"] * (cached.DEVICE == "cuda")
    assert [row["provider"] for row in rows] == names
    assert all(row["images_per_s"] > 0 and row["turns"] == 1 for row in rows)


def test_a_provider_that_fails_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cached, "turns", lambda a: [("ram", [], "no image")])
    assert cached.main([str(tmp_path), "--providers", "ram", "--results", str(tmp_path)]) == 1
    assert "ram  no image" in capsys.readouterr().out
    assert json.loads((tmp_path / "cached.jsonl").read_text())["failed"] == "no image"
