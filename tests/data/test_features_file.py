"""`fastmim embed`: what is in the file is what the encoder gives, with ids, paths and labels."""

import json
import sys

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastmim import cli
from fastmim.data import find_images
from fastmim.data.features_file import write_features
from fastmim.data.feed.center import center_crops
from fastmim.interop.metadata import encoder_metadata
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from tests.data.conftest import encode

MODEL = ViTConfig(width=16, depth=2, heads=2, patch=4, image_size=(8, 12))


@pytest.fixture
def there(tmp_path):
    """Weights, and seven images of two classes."""
    torch.manual_seed(0)
    encoder = Encoder(MODEL).eval()
    save_file(encoder.state_dict(), tmp_path / "x.safetensors", encoder_metadata(MODEL))
    for i in range(7):
        path = tmp_path / "set" / ("a", "b")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(i, size=(20, 16), fmt="PNG"))
    return encoder, tmp_path


def embed(monkeypatch, folder, out, *more):
    arguments = ["embed", folder / "x.safetensors", "--data", folder / "set", "--out", out, *more]
    monkeypatch.setattr(sys, "argv", ["fastmim", *map(str, arguments), "--batch", "3", "--workers", "1"])
    cli.main()


def wanted(encoder, folder, block):
    images = find_images(folder / "set")
    [(pixels, _)] = center_crops(images, MODEL.size)
    with torch.no_grad():
        found = encoder(Tokens(pixels), outputs=[0])
    z = found.tokens_BTD if block is None else found.blocks[0]
    return images, {"cls": z[:, 0], "mean": z[:, 1:].mean(1), "patches": z[:, 1:]}


@pytest.mark.parametrize("block", [None, 1])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_file_has_what_the_encoder_gives(block, dtype, there, monkeypatch, capsys):
    encoder, folder = there
    images, features = wanted(encoder, folder, block)
    more = ["--feature", "cls", "mean", "patches", "--dtype", dtype]
    more += ["--block", block] if block else []
    close = 1e-6 if dtype == "fp32" else 2e-3
    embed(monkeypatch, folder, folder / "new" / "f.parquet", *more)
    assert capsys.readouterr().out == f"{folder / 'new' / 'f.parquet'}: 7 images\n"
    table = pq.read_table(folder / "new" / "f.parquet")
    assert table["id"].to_pylist() == list(range(7)) and table["path"].to_pylist() == list(images.names)
    assert table["label"].to_pylist() == images.labels.tolist()
    assert json.loads(table.schema.metadata[b"classes"]) == ["a", "b"]
    assert json.loads(table.schema.metadata[b"patches_shape"]) == [6, 16]
    for name, value in features.items():
        found = torch.tensor(table[name].to_pylist()).view_as(value)
        assert torch.allclose(found, value, atol=close)
    embed(monkeypatch, folder, folder / "f.safetensors", *more)
    with safe_open(folder / "f.safetensors", "pt") as file:
        for name, value in features.items():
            assert torch.allclose(file.get_tensor(name).float(), value, atol=close)
        assert file.get_tensor("label").tolist() == images.labels.tolist()
        assert json.loads(file.metadata()["paths"]) == list(images.names)


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    def batches():
        yield torch.tensor([0]), {"cls": torch.zeros(1, 2)}
        raise ValueError("in the middle")

    for name in ("f.parquet", "f.safetensors"):
        with pytest.raises(ValueError, match="in the middle"):
            write_features(tmp_path / name, batches(), names=["a"], labels=None, classes=(), about={})
    assert not list(tmp_path.iterdir())


def test_bad_questions_are_a_line(there, monkeypatch, capsys):
    _, folder = there
    for out, more, message in [
        ("f.csv", (), "--out: want a file that ends in .parquet or .safetensors"),
        ("f.parquet", ("--block", "3"), "want a block from 1 to 2, got 3"),
        ("f.parquet", ("--most", "0"), "--most of at least 1, got 0"),
    ]:
        with pytest.raises(SystemExit) as stop:
            embed(monkeypatch, folder, folder / out, *more)
        assert stop.value.code == 2 and message in capsys.readouterr().err
        assert not (folder / out).exists()
