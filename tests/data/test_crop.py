"""The law of random resized crops: against a scalar formulation on the same words, and its distribution."""

import math

import numpy as np
import pytest
import torch
from fastmim_kernels.philox import draw_uniform, sample_seeds

from fastmim.data.augment.crop import by_box, draw_boxes
from fastmim.views import Crop

CROP = Crop(size=(224, 224))
ODD_SIZES = [(1, 1), (1, 500), (500, 1), (2, 3), (375, 500), (500, 375), (3000, 7), (640, 480), (224, 224)]


def keys(count, seed=0):
    return sample_seeds(seed, 0, torch.arange(count))


def one_box(u, height, width, crop):
    """torchvision's loop, one image, one word after another."""
    for k in range(10):
        target = height * width * (crop.scale[0] + u[2 * k] * (crop.scale[1] - crop.scale[0]))
        low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
        aspect = math.exp(low + u[2 * k + 1] * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(u[20] * (height - h + 1)), math.floor(u[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < crop.ratio[0]:
        h = round(width / crop.ratio[0])
    elif width / height > crop.ratio[1]:
        w = round(height * crop.ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    "crop",
    [
        CROP,
        Crop(size=(8, 8), scale=(0.05, 0.4), ratio=(0.3, 3.0), box=2),
        Crop(size=(8, 8), scale=(1, 1), ratio=(1, 1)),
    ],
)
def test_equals_the_scalar_loop(crop):
    sizes = np.array(ODD_SIZES * 40)
    seeds_B = keys(len(sizes))
    boxes, flips = draw_boxes(seeds_B, sizes, crop)
    u = draw_uniform(seeds_B, 23, 100 + crop.box).tolist()
    assert boxes.tolist() == [list(one_box(u[i], h, w, crop)) for i, (h, w) in enumerate(sizes.tolist())]
    assert flips.tolist() == [words[22] < 0.5 for words in u]


def test_boxes_lie_inside():
    sizes = np.array(ODD_SIZES * 500)
    boxes, _ = draw_boxes(keys(len(sizes)), sizes, Crop(size=(8, 8), scale=(0.01, 1), ratio=(0.1, 10)))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


def test_area_aspect_corner_and_flip_have_their_distributions():
    # a narrow scale on a large square image: the first try always fits, so the law is known in closed form
    n, side = 20_000, 4000
    crop = Crop(size=(8, 8), scale=(0.1, 0.3), flip=0.25)
    boxes, flips = draw_boxes(keys(n), np.full((n, 2), side), crop)
    top, left, h, w = boxes.T.astype(float)
    log_ratio = math.log(4 / 3)
    uniforms = {
        "area": (h * w / side**2 - 0.1) / 0.2,
        "aspect": (np.log(w / h) + log_ratio) / (2 * log_ratio),
        "top": top / (side - h),
        "left": left / (side - w),
    }
    for name, values in uniforms.items():  # Kolmogorov-Smirnov, p = 0.001
        distance = np.abs(np.sort(values) - (np.arange(n) + 0.5) / n).max()
        assert distance < 1.95 / math.sqrt(n), name
    assert abs(flips.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    assert np.abs(np.corrcoef([*uniforms.values(), flips])[np.triu_indices(5, 1)]).max() < 4 / math.sqrt(n)


def test_flip_probabilities_at_the_ends():
    sizes = np.full((64, 2), 50)
    assert not draw_boxes(keys(64), sizes, Crop(size=(8, 8), flip=0.0))[1].any()
    assert draw_boxes(keys(64), sizes, Crop(size=(8, 8), flip=1.0))[1].all()


def test_crops_are_independent_draws_and_each_sample_has_its_own():
    sizes = np.full((64, 2), 500)
    first, _ = draw_boxes(keys(64), sizes, CROP)
    second, _ = draw_boxes(keys(64), sizes, Crop(size=(224, 224), box=1))
    assert (first != second).any(axis=1).all()
    assert np.array_equal(draw_boxes(keys(64)[5:9], sizes[:4], CROP)[0], first[5:9])
    assert len(np.unique(first, axis=0)) == 64


def test_views_of_one_crop_must_agree():
    small = Crop(size=(112, 112), interpolation="bilinear")
    assert by_box([CROP, small, Crop(size=(96, 96), box=4)]).keys() == {0, 4}
    for crops, message in [
        ([CROP, Crop(size=(8, 8), scale=(0.5, 1.0))], "one scale, ratio and flip for box 0"),
        ([], "at least one crop"),
    ]:
        with pytest.raises(ValueError, match=message):
            by_box(crops)
