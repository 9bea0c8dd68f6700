"""The draws of the colors: the laws of the published recipes; and what the two ops make of them."""

import math
import random
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from fastmim_kernels.philox import draw_uniform, sample_seeds
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from fastmim.data.augment.color import ORDERS, apply_colors, draw_colors
from fastmim.views import BYOL_FIRST, BYOL_SECOND, C_MAE, DINO_SMALL, SIMSIAM, Color

COUNT = 24_000
WILD = Color(
    brightness=1.4, contrast=0.3, saturation=0.8, hue=0.4, jitter=0.6, gray=0.3, blur=0.7, solarize=0.25
)


def keys(count, seed=0):
    return sample_seeds(seed, 0, torch.arange(count))


def assert_uniform(values, low, high, name):
    """Kolmogorov-Smirnov, p = 0.001, and none outside."""
    assert low <= values.min() and values.max() <= high, name
    n = len(values)
    u = (values.double().sort().values - low) / (high - low)
    assert (u - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n), name


def assert_share(flags, p, name):
    n = len(flags)
    assert abs(flags.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / n), name


@pytest.mark.parametrize("color", [C_MAE, SIMSIAM, BYOL_FIRST, BYOL_SECOND, DINO_SMALL, WILD])
def test_probabilities_and_ranges(color):
    d = draw_colors(keys(COUNT), color)
    assert_share((d.order_B4 >= 0).any(1), color.jitter, "jitter")
    assert_share(d.gray_B, color.gray, "gray")
    assert_share(d.sigmas_B > 0, color.blur, "blur")
    assert_share(d.solarize_B, color.solarize, "solarize")
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        s = getattr(color, name)
        low, high = (-s, s) if name == "hue" else (max(0, 1 - s), 1 + s)
        # fp32 may round an end outwards by half a unit
        assert_uniform(d.factors_B4[:, i], low - 1e-7, high + 1e-7, name)
    if color.blur:
        assert_uniform(d.sigmas_B[d.sigmas_B > 0], 0.1, 2.0000001, "sigma")


def test_the_recipes_are_the_published_ones():
    four = ("brightness", "contrast", "saturation", "hue", "jitter", "gray", "blur", "solarize")
    published = {
        (0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.0, 0.0): C_MAE,
        (0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.5, 0.0): SIMSIAM,
        (0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 1.0, 0.0): BYOL_FIRST,
        (0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.1, 0.2): BYOL_SECOND,
        (0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.5, 0.0): DINO_SMALL,
    }
    for values, color in published.items():
        assert tuple(getattr(color, name) for name in four) == values
        assert color.sigma == (0.1, 2.0)


def test_orders_are_uniform_permutations():
    d = draw_colors(keys(COUNT), replace(WILD, jitter=1.0))
    count = Counter(map(tuple, d.order_B4.tolist()))
    assert set(count) == set(ORDERS)
    expected = COUNT / 24
    assert sum((n - expected) ** 2 / expected for n in count.values()) < 49.7  # chi squared, 23, p = 0.001


def test_a_stage_of_no_strength_is_left_out():
    """Hue has no factor that changes nothing: through HSV and back is not the identity."""
    all_four = draw_colors(keys(64), replace(WILD, jitter=1.0)).order_B4
    for stage, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        order = draw_colors(keys(64), replace(WILD, jitter=1.0, **{name: 0.0})).order_B4
        assert torch.equal(order, torch.where(all_four == stage, -1, all_four))
    assert draw_colors(keys(64), Color(jitter=1.0)).order_B4.unique().tolist() == [-1]
    assert draw_colors(keys(64), replace(WILD, jitter=0.0)).order_B4.unique().tolist() == [-1]


def test_draws_are_independent_of_one_another():
    d = draw_colors(keys(COUNT), replace(WILD, blur=0.5))
    jittered = (d.order_B4 >= 0).any(1)
    u = draw_uniform(keys(COUNT), 10, 300)
    columns = [*d.factors_B4.T, jittered, d.gray_B, d.sigmas_B, d.solarize_B, u[:, 5]]
    crop = draw_uniform(keys(COUNT), 4, 100).T  # of crop.py
    other = draw_colors(keys(COUNT), WILD, draw=1)
    columns += [*crop, *other.factors_B4.T, other.gray_B, other.solarize_B]
    correlation = np.corrcoef(np.stack([c.double().numpy() for c in columns]))
    assert np.abs(correlation[np.triu_indices(len(columns), 1)]).max() < 4.5 / math.sqrt(COUNT)


def test_a_sample_has_its_draw_wherever_it_comes():
    """Any batch, place or rank; and a word means the same in every recipe."""
    whole, part = draw_colors(keys(64), WILD, 2), draw_colors(keys(64)[40:43], WILD, 2)
    for field in fields(whole):
        assert torch.equal(getattr(whole, field.name)[40:43], getattr(part, field.name)), field.name
    assert not torch.equal(draw_colors(keys(64, seed=1), WILD, 2).factors_B4, whole.factors_B4)
    assert torch.equal(draw_colors(keys(64), replace(WILD, gray=0.9, blur=0), 2).factors_B4, whole.factors_B4)
    u = draw_uniform(keys(64), 10, 302)
    assert torch.equal(whole.solarize_B, u[:, 9] < 0.25)
    assert torch.equal(whole.factors_B4[:, 0], (u[:, 1] * 2.4).float())


def one_by_pillow(image, d, b):
    x = Image.fromarray(image.numpy())
    enhance = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for stage in d.order_B4[b].tolist():
        factor = d.factors_B4[b, stage].item()
        if stage == 3:
            h, s, v = x.convert("HSV").split()
            h = Image.fromarray(np.asarray(h) + np.int32(factor * 255).astype(np.uint8))
            x = Image.merge("HSV", (h, s, v)).convert("RGB")
        elif stage >= 0:
            x = enhance[stage](x).enhance(factor)
    x = ImageOps.grayscale(x).convert("RGB") if d.gray_B[b] else x
    x = x.filter(ImageFilter.GaussianBlur(d.sigmas_B[b].item()))
    return torch.from_numpy(np.array(ImageOps.solarize(x) if d.solarize_B[b] else x))


@pytest.mark.parametrize("color", [C_MAE, SIMSIAM, BYOL_FIRST, BYOL_SECOND, WILD, replace(WILD, blur=0.0)])
def test_what_is_applied_is_pillows(color):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (48, 20, 28, 3), dtype=np.uint8))
    d = draw_colors(keys(48), color)
    expected = torch.stack([one_by_pillow(image, d, b) for b, image in enumerate(images)])
    assert torch.equal(apply_colors(images, d), expected)


def test_draws_leave_the_generators_alone():
    torch.manual_seed(0), random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    draw_colors(keys(8), WILD)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_rejects_what_is_no_color():
    for bad in ({"brightness": -0.1}, {"hue": 0.51}):
        with pytest.raises(ValueError, match="want strengths"):
            Color(**bad)
    for bad in ({"jitter": 1.1}, {"gray": -0.1}, {"blur": 2.0}, {"solarize": float("nan")}):
        with pytest.raises(ValueError, match="want probabilities"):
            Color(**bad)
    for bad in ((0.0, 1.0), (2.0, 1.0), (1.0, 101.0)):
        with pytest.raises(ValueError, match="want 0 < sigma"):
            Color(sigma=bad)
    with pytest.raises(ValueError, match="want seeds on the CPU and draw >= 0"):
        draw_colors(keys(2), WILD, -1)
    with pytest.raises(ValueError, match="want seeds on the CPU"):
        draw_colors(keys(2).to("meta"), WILD)
    with pytest.raises(ValueError, match="want seeds int64"):
        draw_colors(keys(2).int(), WILD)
