"""RandAugment: every operation against timm's, the law of the draws, and crops that go through a loader."""

import math
import random

import numpy as np
import pytest
import torch
from fastmim_kernels.philox import sample_seeds
from PIL import Image

from fastmim.data import DataConfig, find_images, open_loader
from fastmim.data.augment.rand_augment import NAMES, Operation, augmented, draw_operations
from fastmim.views import Crop, RandAugment
from tests.engine.conftest import write_images

TIMM = {
    "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing", "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY",
    "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
}  # fmt: skip


def picture(channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6, 5, channels), dtype=np.uint8).repeat(7, 0).repeat(7, 1)
    return np.clip(blocks.astype(int) + rng.integers(-9, 10, blocks.shape), 0, 255).astype(np.uint8)


def test_the_operations_are_all_of_timm_s(torchvision_loads):

    from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS

    assert [TIMM[name] for name in NAMES] == _RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("name", NAMES)
def test_each_does_what_timm_s_does(torchvision_loads, monkeypatch, name):
    """At levels whose rounding differs, and with both signs, to the last bit."""

    from timm.data.auto_augment import AugmentOp

    mean = tuple(min(255, round(255 * x)) for x in (0.485, 0.456, 0.406))
    pixels, changed = picture(), 0
    for level in (0.0, 2.6, 5.0, 8.7, 9.4, 9.99):
        for sign in (1, -1):
            monkeypatch.setattr(random, "random", lambda sign=sign: 0.2 if sign > 0 else 0.8)
            theirs = AugmentOp(
                TIMM[name],
                prob=1.0,
                magnitude=level,
                hparams={"img_mean": mean, "interpolation": Image.BICUBIC},
            )(Image.fromarray(pixels))
            ours = augmented(pixels, [Operation(name, level, sign)])
            np.testing.assert_array_equal(ours, np.asarray(theirs), err_msg=f"{name} {level} {sign}")
            changed += not np.array_equal(ours, pixels)
    assert changed


def test_the_law_of_the_draws():
    how = RandAugment(layers=2, magnitude=9.0, deviation=0.5, probability=0.5)
    drawn = draw_operations(sample_seeds(0, 0, torch.arange(20_000)), how)
    flat = [operation for operations in drawn for operation in operations]
    assert abs(len(flat) / 40_000 - 0.5) < 0.01
    counts = np.array([sum(operation.name == name for operation in flat) for name in NAMES])
    expected = len(flat) / len(NAMES)
    assert (abs(counts - expected) < 4 * math.sqrt(expected)).all()
    levels = torch.tensor([operation.level for operation in flat])
    below = levels[levels < 9]
    assert levels.max() == 10 and 0.018 < (levels == 10).float().mean() < 0.028  # 2 deviations and more
    assert abs((levels < 9).float().mean() - 0.5) < 0.015
    assert abs((below - 9).square().mean().sqrt() - 0.5) < 0.01
    assert abs(sum(operation.sign for operation in flat)) < 4 * math.sqrt(len(flat))


def test_nothing_is_left_of_no_bits():
    assert not augmented(picture(), [Operation("posterize", 10.0, 1)]).any()


def test_none_and_gray():
    seeds = sample_seeds(0, 0, torch.arange(50))
    assert not any(draw_operations(seeds, RandAugment(probability=0)))
    assert all(len(row) == 3 for row in draw_operations(seeds, RandAugment(layers=3, probability=1)))
    gray = picture(1)
    for name in NAMES:
        assert augmented(gray, [Operation(name, 9.0, 1)]).shape == gray.shape
    with pytest.raises(ValueError, match="magnitude from 0 to 10"):
        RandAugment(magnitude=11)


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_loader_gives_augmented_crops_with_their_labels(tmp_path, decoder, cache):
    images = find_images(write_images(tmp_path, 24))
    plain, strong = (Crop(size=(16, 16), rand_augment=how) for how in (None, RandAugment(probability=1.0)))
    config = DataConfig(decoder=decoder, threads=2, cache=cache)
    with open_loader(images, (plain, strong), 8, config=config, labeled=True) as loader:
        batches = [next(loader) for _ in range(3)]
    for batch in batches:
        operations = draw_operations(batch.seeds_B, RandAugment(probability=1.0))
        for before, after, done in zip(*(x.numpy() for x in batch.crops), operations, strict=True):
            np.testing.assert_array_equal(augmented(before, done), after)
        assert batch.labels_B.tolist() == images.labels[batch.ids_B].tolist()
    assert {label for batch in batches for label in batch.labels_B.tolist()} == {0, 1, 2}


def test_a_bad_file_shows_another_image_with_its_label(tmp_path):
    """Pixels and label are of one image, whatever the sample's own label is."""
    write_images(tmp_path, 24)
    bad = tmp_path / "class0" / "021.jpg"  # the last of its class: the next image is of the next class
    bad.write_bytes(bad.read_bytes()[:40])
    images = find_images(tmp_path)
    place = images.names.index("class0/021.jpg")
    assert images.labels[place] == 0 and images.labels[place + 1] == 1
    for cache in ("none", "ram"):
        config = DataConfig(decoder="pillow", threads=1, cache=cache)
        with open_loader(images, (Crop(size=(8, 8)),), 24, config=config, labeled=True) as loader:
            batch = next(loader)
        assert batch.labels_B[batch.ids_B.tolist().index(place)] == 1, cache


def test_images_without_labels_are_refused(tmp_path):
    write_images(tmp_path, 24)
    for i, path in enumerate(sorted(tmp_path.rglob("*.jpg"))):
        path.rename(tmp_path / f"{i}.jpg")
    with pytest.raises(ValueError, match="want labeled images"):
        open_loader(find_images(tmp_path), (Crop(size=(8, 8)),), 8, labeled=True)
