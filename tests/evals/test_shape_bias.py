"""Shape bias of oracles, of hand-made probabilities, and by the command of classifiers with known answers."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastmim import cli
from fastmim.evals.shape_bias import CATEGORIES, cues_of, decisions, shape_bias
from fastmim.interop.metadata import encoder_metadata
from fastmim.models.vit import Encoder, ViTConfig

NAMES = sorted(CATEGORIES)


def cues(count=400):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 16, (2, count), generator=generator)


def test_the_categories_are_the_published_ones():
    assert list(CATEGORIES) == NAMES and len(NAMES) == 16
    counts = {name: len(ids) for name, ids in CATEGORIES.items()}
    assert counts == {
        "airplane": 1, "bear": 4, "bicycle": 2, "bird": 49, "boat": 5, "bottle": 7, "car": 3, "cat": 6,
        "chair": 4, "clock": 3, "dog": 109, "elephant": 2, "keyboard": 2, "knife": 1, "oven": 1, "truck": 8,
    }  # fmt: skip
    every = [i for ids in CATEGORIES.values() for i in ids]
    assert len(set(every)) == len(every) and max(every) < 1000


def test_oracles_have_the_biases_they_must():
    shape, texture = cues()
    conflicts = int((shape != texture).sum())
    assert 0 < conflicts < 400
    for decided, bias in ((shape, 1.0), (texture, 0.0)):
        found = shape_bias(decided, shape, texture, NAMES)
        assert found["shape_bias"] == bias and found["images"] == conflicts
        assert all(found[f"{name}/shape_bias"] == bias for name in NAMES)
        assert found["shape_fraction"] + found["texture_fraction"] == 1
    half = torch.where(torch.arange(400) % 2 == 0, shape, texture)
    assert shape_bias(half, shape, texture, NAMES)["shape_bias"] == pytest.approx(0.5, abs=0.03)
    neither = (shape + 1 + ((shape + 1) % 16 == texture).long()) % 16
    found = shape_bias(neither, shape, texture, NAMES)
    assert np.isnan(found["shape_bias"]) and found["shape_fraction"] == found["texture_fraction"] == 0


def test_images_of_one_cue_do_not_count():
    shape, texture = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    wrong = torch.tensor([5, 0, 0])
    found = shape_bias(wrong, shape, texture, NAMES)
    assert found["images"] == 2 and found["shape_bias"] == 0.5
    with pytest.raises(ValueError, match="disagree, got none"):
        shape_bias(shape, shape, shape, NAMES)


def test_a_category_has_the_mean_of_its_classes_not_their_sum():
    """Eight trucks at 0.05 are less than one knife at 0.1."""
    p = torch.full((1, 1000), 1e-9)
    p[0, list(CATEGORIES["truck"])] = 0.05
    p[0, CATEGORIES["knife"][0]] = 0.1
    assert NAMES[int(decisions(p.log(), CATEGORIES))] == "knife"
    p[0, list(CATEGORIES["truck"])] = 0.11
    assert NAMES[int(decisions(p.log(), CATEGORIES))] == "truck"
    with pytest.raises(ValueError, match="classes from 0 to 99 in each category"):
        decisions(torch.zeros(1, 100), CATEGORIES)


def test_names_say_the_cues():
    shape, texture = cues_of(["cat/cat7-elephant1.png", "truck3-oven10.jpg"], NAMES)
    assert [NAMES[i] for i in shape] == ["cat", "truck"] and [NAMES[i] for i in texture] == [
        "elephant",
        "oven",
    ]
    for name in ("cat/photo.png", "cat7-tiger1.png", "dog/cat7-elephant1.png"):
        with pytest.raises(ValueError, match=name):
            cues_of([name], NAMES)


# --- the command: shape is the left half of an image, texture the right ------------------------------------

LEVELS = {"low": 40, "high": 215}
MODEL = ViTConfig(
    width=4, depth=1, heads=1, patch=8, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, final_norm=False
)


@pytest.fixture
def conflicts(tmp_path):
    for shape, left in LEVELS.items():
        for texture, right in LEVELS.items():
            pixels = np.full((16, 16, 3), right, np.uint8)
            pixels[:, :8] = left
            folder = tmp_path / "set" / shape
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(3):
                Image.fromarray(pixels).save(folder / f"{shape}{i}-{texture}{i}.png")
    (tmp_path / "classes.json").write_text(json.dumps({"low": [0, 2], "high": [1, 3]}))
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastmim", "shape-bias", *map(str, arguments)])
    cli.main()


def test_the_command_counts_what_the_classifier_says(conflicts, monkeypatch, capsys):
    """What the classifier says of each file, counted by hand."""
    from fastmim.commands.weights import load_pretrained
    from fastmim.data import find_images
    from fastmim.data.feed.center import center_crops
    from fastmim.interop.classifier import Classifier

    torch.manual_seed(0)
    weights = conflicts / "w.safetensors"
    state = Encoder(MODEL).state_dict()
    state |= {"head.weight": torch.randn(4, 4), "head.bias": torch.zeros(4)}
    state |= {"fc_norm.weight": torch.ones(4), "fc_norm.bias": torch.zeros(4)}
    save_file(state, weights, encoder_metadata(MODEL))
    args = [weights, "--data", conflicts / "set", "--classes", conflicts / "classes.json", "--crop", "1"]
    run(monkeypatch, *args, "--out", conflicts / "o", "--workers", "1", "--names", "mine")
    assert "6 images" in capsys.readouterr().out and (conflicts / "o.png").stat().st_size > 5000
    [row] = csv.DictReader((conflicts / "o.csv").open())
    images = find_images(conflicts / "set")
    [(pixels, _)] = center_crops(images, (16, 16), fraction=1.0)
    p = Classifier(load_pretrained(weights)).eval()(pixels).softmax(1)
    decided = (p[:, [1, 3]].mean(1) > p[:, [0, 2]].mean(1)).long().tolist()
    counted = {"shape": 0, "texture": 0}
    for name, choice in zip(images.names, decided, strict=True):
        shape, texture = name.split("/")[1].removesuffix(".png").split("-")
        chosen = ("low", "high")[choice]
        if shape[:-1] != texture[:-1]:
            counted["shape"] += chosen == shape[:-1]
            counted["texture"] += chosen == texture[:-1]
    assert float(row["shape_bias"]) == pytest.approx(counted["shape"] / 6)
    assert row["checkpoint"] == "mine" and float(row["images"]) == 6 == sum(counted.values())


def test_bad_questions_are_a_line(conflicts, monkeypatch, capsys):
    state = Encoder(MODEL).state_dict()
    bare, whole = conflicts / "bare.safetensors", conflicts / "whole.safetensors"
    save_file(state, bare, encoder_metadata(MODEL))
    save_file(state | {"head.weight": torch.zeros(10, 4)}, whole, encoder_metadata(MODEL))
    (conflicts / "empty").mkdir()
    (conflicts / "bad.json").write_text("[1]")
    classes = ("--classes", conflicts / "classes.json")
    for arguments, message in [
        ((bare, "--data", conflicts / "set"), "want the weights of a classifier"),
        (
            (whole, "--data", conflicts / "set"),
            "not available: want a classifier of ImageNet's 1000 classes, got 10",
        ),
        ((whole, "--data", conflicts / "empty", *classes), "no image"),
        ((whole, "--data", conflicts / "set", "--classes", conflicts / "bad.json"), "--classes: want JSON"),
    ]:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *arguments, "--out", conflicts / "o")
        assert stop.value.code == 2 and message in capsys.readouterr().err, message


@pytest.mark.usefixtures("torchvision_loads")
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_classifiers_of_timm_say_what_they_say_there(pool, tmp_path):
    import timm

    from fastmim.interop.classifier import Classifier
    from fastmim.interop.encoders import load_pretrained

    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=1, num_classes=7, global_pool=pool
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    ours = Classifier(load_pretrained(tmp_path / "x.safetensors")).eval()
    image = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    c = ours.encoder.config
    x = (image.float() / 255 - torch.tensor(c.pixel_mean)) / torch.tensor(c.pixel_std)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), model(x.permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-4)
