"""Attention against what the encoder does with it, rollout and components by plain loops; the pictures."""

import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastmim import cli
from fastmim.evals.maps import as_colors, attention_of, components, rollout
from fastmim.interop.metadata import encoder_metadata
from fastmim.models.vit import Encoder, ViTConfig
from tests.data.conftest import encode

MODEL = ViTConfig(width=32, depth=3, heads=2, patch=4, image_size=16)
KINDS = {
    "plain": {},
    "beit": {"positions": "relative", "qkv_bias": "qv", "layer_scale": 0.1},
    "per_block": {"positions": "relative_per_block", "qkv_bias": "qv"},
    "no_bias": {"qkv_bias": "none"},
}


def shaken(model):
    torch.manual_seed(0)
    encoder = Encoder(model).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return encoder


def images(B=2):
    torch.manual_seed(1)
    return torch.randint(0, 256, (B, 16, 16, 3), dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_that_weigh_the_values(kind):
    """They times the values, through the projection, are what the attention gave."""
    encoder = shaken(replace(MODEL, **KINDS[kind]))
    seen = {}

    def keep(module, args, out):
        seen["x"], seen["out"] = args[0], out

    hook = encoder.blocks[1].attn.register_forward_hook(keep)
    found = attention_of(encoder, images(), [1])
    hook.remove()
    assert list(found) == [1] and found[1].shape == (2, 2, 17, 17)
    torch.testing.assert_close(found[1].sum(-1), torch.ones(2, 2, 17))
    attn = encoder.blocks[1].attn
    value = attn.qkv(seen["x"])[..., 64:]
    if attn.v_bias is not None:
        value = value + attn.v_bias
    mixed = (found[1] @ value.view(2, 17, 2, 16).transpose(1, 2)).transpose(1, 2).reshape(2, 17, 32)
    torch.testing.assert_close(attn.proj(mixed), seen["out"], rtol=1e-4, atol=1e-5)
    assert not encoder.blocks[1].attn._forward_hooks


def test_a_block_that_there_is_not_is_said():
    with pytest.raises(ValueError, match="want outputs of blocks 0 to 2"):
        attention_of(shaken(MODEL), images(), [3])


def test_rollout_is_the_product_of_the_blocks():
    found = attention_of(shaken(MODEL), images(), range(3))
    total = torch.eye(17).expand(2, -1, -1)
    for i in range(3):
        total = (0.5 * found[i].mean(1) + 0.5 * torch.eye(17)) @ total
    got = rollout([found[i] for i in range(3)])
    torch.testing.assert_close(got, total[:, 0, 1:])
    assert (got.sum(1) < 1).all()
    with pytest.raises(ValueError, match="at least one block"):
        rollout([])


def test_components_are_those_of_a_singular_value_decomposition():
    torch.manual_seed(0)
    x = torch.randn(3, 20, 8, dtype=torch.float64) * torch.linspace(1, 3, 8)
    got, share = components(x)
    flat = (x - x.mean((0, 1))).double().flatten(0, 1)
    u, s, _ = torch.linalg.svd(flat, full_matrices=False)
    wanted = u[:, :3] * s[:3]
    torch.testing.assert_close(got.flatten(0, 1).abs(), wanted.abs())
    torch.testing.assert_close(share, (s**2 / (s**2).sum())[:3])
    torch.testing.assert_close(components(x)[0], got)
    colors = as_colors(got)
    assert colors.min() == 0 and colors.max() == 1 and 0.3 < float(colors.mean()) < 0.7
    with pytest.raises(ValueError, match="at most 4 components of 5 patches"):
        components(torch.randn(1, 5, 8), 5)


@pytest.fixture
def there(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.png").write_bytes(encode(i, size=(24, 16), fmt="PNG"))
    save_file(shaken(MODEL).state_dict(), tmp_path / "x.safetensors", encoder_metadata(MODEL))
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastmim", *map(str, arguments)])
    cli.main()


@pytest.mark.parametrize("kind", ["attention", "pca"])
def test_the_commands_draw(kind, there, monkeypatch):
    out = there / "new" / "x.png"
    run(
        monkeypatch,
        kind,
        there / "x.safetensors",
        there / "photos",
        "--out",
        out,
        "--rows",
        "2",
        "--block",
        "2",
    )
    whole = Image.open(out)
    assert whole.width > whole.height if kind == "attention" else whole.width > 200
    run(
        monkeypatch,
        kind,
        there / "x.safetensors",
        there / "photos" / "1.png",
        "--size",
        "32",
        "24",
        "--out",
        out,
    )
    assert Image.open(out).height < whole.height


def test_bad_questions_are_a_line(there, monkeypatch, capsys):
    for extra, message in [
        (("--block", "4"), "want a block from 1 to 3, got 4"),
        (("--size", "18", "16"), "--size: want multiples of the patch, 4, got 18 x 16"),
        (("--out", "x.csv"), "ends in .png"),
        (("--rows", "0"), "--rows of at least 1, got 0"),
    ]:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, "attention", there / "x.safetensors", there / "photos", *extra)
        assert stop.value.code == 2 and message in capsys.readouterr().err
