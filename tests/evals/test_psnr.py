"""PSNR against its formula, and `fastmim psnr` and `reconstruct` on weights of runs and of others."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastmim import cli
from fastmim.engine.config import as_dict, from_dict
from fastmim.evals.psnr import patches_of, psnr
from fastmim.interop.mae import to_file
from fastmim.methods import METHODS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig
from fastmim.recipes import RECIPES, varied
from tests.data.conftest import encode

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
MODEL = ViTConfig(width=32, depth=2, heads=2, patch=4, image_size=16)


def example(B=3):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (B, 16, 16, 3), dtype=torch.uint8)
    seen = torch.stack([torch.randperm(16)[:4].sort().values for _ in range(B)])
    return image, seen


def normalized(image, norm_pix):
    """What a network without error predicts."""
    x = (patches_of(image, 4).double() / 255 - torch.tensor(MEAN * 16)) / torch.tensor(STD * 16)
    if norm_pix:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
    return x


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_is_a_hundred_and_noise_lowers_it(norm_pix):
    image, seen = example()
    right = normalized(image, norm_pix)
    found = psnr(image, seen, right, MEAN, STD, norm_pix=norm_pix)
    assert all(bool((value > 99).all() and value.isfinite().all()) for value in found.values())
    last = dict.fromkeys(found, 200.0)
    for noise in (0.01, 0.1, 1.0):
        torch.manual_seed(1)
        found = psnr(image, seen, right + noise * torch.randn_like(right), MEAN, STD, norm_pix=norm_pix)
        assert all(float(found[name].mean()) < last[name] - 5 for name in last)
        last = {name: float(value.mean()) for name, value in found.items()}


def test_each_region_is_its_formula():
    image, seen = example(2)
    pred = normalized(image, False)
    pred = pred + torch.randn_like(pred)
    found = psnr(image, seen, pred, MEAN, STD, norm_pix=False)
    true = patches_of(image, 4).double() / 255
    guess = (pred.float() * torch.tensor(STD * 16) + torch.tensor(MEAN * 16)).clamp(0, 1).double()
    for b in range(2):
        hidden = [i for i in range(16) if i not in seen[b].tolist()]
        pasted = guess[b].clone()
        pasted[seen[b]] = true[b, seen[b]]
        for name, mse in {
            "raw": ((guess[b] - true[b]) ** 2).mean(),
            "composite": ((pasted - true[b]) ** 2).mean(),
            "masked": ((guess[b, hidden] - true[b, hidden]) ** 2).mean(),
        }.items():
            assert float(found[name][b]) == pytest.approx(float(-10 * torch.log10(mse)), abs=1e-4)
    with pytest.raises(ValueError, match="want hidden patches, got 16 of 16"):
        psnr(image, torch.arange(16).expand(2, -1), pred, MEAN, STD, norm_pix=False)
    with pytest.raises(ValueError, match="predictions of all"):
        psnr(image, seen, pred[:1], MEAN, STD, norm_pix=False)


@pytest.mark.parametrize("name", RECIPES)
def test_configurations_come_back_from_json(name):
    run = RECIPES[name]()
    for variant in (None, *run.method.variants.values()):
        one = run if variant is None else varied(run, variant)
        for part in (one.method, one.model, one.optim, one.data):
            assert from_dict(type(part), json.loads(json.dumps(as_dict(part)))) == part
    with pytest.raises(ValueError, match="has no other: another version"):
        from_dict(ViTConfig, as_dict(MODEL) | {"other": 1})


# --- the commands ---------------------------------------------------------------------------------------


def run_of(folder, name):
    """A run directory as training leaves it, with first weights."""
    folder.mkdir()
    model = ViTConfig(**{f: getattr(MODEL, f) for f in ("width", "depth", "heads", "patch", "image_size")},
                      **METHODS[name].encoder)  # fmt: skip
    config = METHODS[name]().fit(model, DecoderConfig(width=16, depth=1, heads=2))
    torch.manual_seed(0)
    save_file(to_file(config.build(model).state_dict()), folder / "model.safetensors")
    run = {"method": as_dict(config), "model": as_dict(model)}
    (folder / "config.json").write_text(json.dumps({"run": run}))
    return folder


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        (tmp_path / "photos" / f"{i}.png").write_bytes(encode(i, size=(24, 16), fmt="PNG"))
    return tmp_path / "photos"


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastmim", *map(str, arguments)])
    cli.main()


@pytest.mark.parametrize("name", ["mae", "rmae", "cmae_huang", "simmim"])
def test_runs_that_predict_pixels_have_a_psnr_and_a_picture(name, photos, tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path / "run", name)
    command(monkeypatch, "psnr", run, "--data", photos, "--batch", "2", "--workers", "1", "--ratio", "0.5")
    words = capsys.readouterr().out.split()
    assert words[0] == str(run) and words[1::3] == ["composite", "masked", "raw"]
    composite, masked, _ = (float(word) for word in words[2::3])
    assert composite > masked > 0  # what is pasted has no error
    command(monkeypatch, "psnr", run / "model.safetensors", "--data", photos, "--ratio", "0.5")
    assert capsys.readouterr().out.split()[1:] == words[1:]
    out = tmp_path / "new" / "x.png"
    command(monkeypatch, "reconstruct", run, photos, "--rows", "2", "--out", out)
    assert Image.open(out).size == (4 * 144 + 4 - 16, 2 * 144 + 20 - 16)


@pytest.mark.parametrize("name", ["beit", "cae"])
def test_codes_of_random_projections_cannot_be_drawn(name, photos, tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path / "run", name)
    with pytest.raises(SystemExit):
        command(monkeypatch, "reconstruct", run, photos, "--out", tmp_path / "x.png")
    assert f"predicts something to look at, got {name}" in capsys.readouterr().err


def test_an_animation_goes_over_the_ratios(photos, tmp_path, monkeypatch):
    run = run_of(tmp_path / "run", "mae")
    command(monkeypatch, "reconstruct", run, photos / "3.png", "--animate", "--out", tmp_path / "x.gif")
    moving = Image.open(tmp_path / "x.gif")
    assert moving.n_frames >= 17  # 0.1 to 0.9, and back but for what shows the same
    gray = []
    for frame in (0, 16):
        moving.seek(frame)
        masked = np.asarray(moving.convert("RGB")).astype(int)[20:140, 150:270]
        gray.append(float((abs(masked - 128).max(-1) <= 4).mean()))
    assert gray[0] < 0.2 and gray[1] > 0.8


@pytest.mark.usefixtures("torchvision_loads")
def test_a_folder_of_transformers_predicts_what_the_library_does(photos, tmp_path, monkeypatch, capsys):
    import argparse

    import transformers

    from fastmim.commands.predicting import predictor

    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16,
        patch_size=4, decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=3,
        decoder_intermediate_size=96, norm_pix_loss=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "hf")
    none = {"heads": None, "image_size": None, "mean": None, "std": None}
    args = argparse.Namespace(**none, decoder_heads=None, norm_pix=None)
    ours = predictor(args, tmp_path / "hf", torch.device("cpu"), 0.5)
    image, _ = example(2)
    found = ours.of((image,), torch.tensor([7, 8]), seed=3)
    assert found.norm_pix and found.seen_BK.shape == (2, 8)
    noise = torch.ones(2, 16).scatter_(1, found.seen_BK, found.seen_BK.float() / 100)
    x = (image.float() / 255 - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor((0.229, 0.224, 0.225))
    model.config.mask_ratio = 0.5
    with torch.no_grad():
        logits = model(x.permute(0, 3, 1, 2), noise=noise).logits
    assert torch.allclose(found.pred_BNP, logits, atol=2e-4)
    command(monkeypatch, "psnr", tmp_path / "hf", "--data", photos)
    assert "composite" in capsys.readouterr().out


def test_bad_questions_are_a_line(photos, tmp_path, monkeypatch, capsys):
    mae, dino = run_of(tmp_path / "mae", "mae"), run_of(tmp_path / "dino", "dino")
    (tmp_path / "none").mkdir()
    encoder = tmp_path / "encoder.safetensors"
    big = ViTConfig(width=64, depth=1, heads=1, patch=4, image_size=16)
    state = METHODS["mae"]().fit(big, DecoderConfig(width=16, depth=1, heads=2)).build(big).state_dict()
    save_file({n.removeprefix("encoder."): t for n, t in state.items() if n.startswith("encoder.")}, encoder)
    whole = tmp_path / "whole.safetensors"
    save_file(to_file(state), whole)
    for arguments, message in [
        (("psnr", dino, "--data", photos), "predicts something to look at, got dino"),
        (("psnr", dino, "--data", photos, "--ratio", "0.5"), "--ratio: want a method that hides patches"),
        (("psnr", mae, "--data", photos, "--ratio", "1.5"), "mask-ratio"),
        (("psnr", mae, "--data", tmp_path / "none"), "no image"),
        (("psnr", mae, "--data", photos, "--batch", "0"), "--batch of at least 1, got 0"),
        (("psnr", encoder, "--data", photos), "want weights with MAE's decoder"),
        (("psnr", whole, "--data", photos), "want --decoder-heads that divide the decoder's width, 16"),
        (("reconstruct", mae, photos, "--out", "x.bmp"), "ends in .png, .jpg, .jpeg, .webp, got x.bmp"),
        (("reconstruct", mae, photos, "--animate", "--ratio", "0.5"), "got both"),
        (("reconstruct", tmp_path / "nothing", photos), "got nothing at"),
    ]:
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, *arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err, message
