"""The views of the methods: which draws they share, windows of a master, colours, the strong augmentation."""

import numpy as np
import pytest
import torch
from fastmim_kernels.philox import sample_keys

from fastmim.data import find_images
from fastmim.data.color import apply_colors, draw_colors
from fastmim.data.draws import check_views, draw_views
from fastmim.views import C_MAE, DINO_SMALL, SIMSIAM, View, augmented

from .conftest import take

PLAIN = View(size=(24, 24))


def test_two_colours_of_one_crop(folder, open_loader, decoder):
    """C-MAE: positions of both views correspond, and each has its own draw of the recipe."""
    first, second = View(size=(24, 24), color=C_MAE, draw=0), View(size=(24, 24), color=C_MAE, draw=1)
    different = 0
    for batch in take(open_loader(find_images(folder), decoder, views=[PLAIN, first, second]), 3):
        clean, one, two = batch.views
        assert torch.equal(one, apply_colors(clean, draw_colors(batch.keys_B, C_MAE, 0)))
        assert torch.equal(two, apply_colors(clean, draw_colors(batch.keys_B, C_MAE, 1)))
        different += int((one != two).flatten(1).any(1).sum())
    assert different >= 20  # of 24: both are left as they are one time in 24


def test_a_shifted_pair(folder, open_loader, decoder):
    """CMAE: two windows of one master; the first is its corner, the second coloured."""
    master = View(size=(40, 36))
    pair = [
        View(size=(24, 24), master=(40, 36)),
        View(size=(24, 24), master=(40, 36), shift=12, color=SIMSIAM),
        View(size=(24, 24), master=(40, 36), shift=12, draw=1),
    ]
    corners = []
    for batch in take(open_loader(find_images(folder), decoder, views=[master, *pair]), 3):
        whole, still, coloured, shifted = batch.views
        assert torch.equal(still, whole[:, :24, :24])
        draws = draw_views(batch.keys_B, np.array([[64, 64]] * 8), pair)
        for b, (top, left) in enumerate(draws.windows[1].tolist()):
            assert torch.equal(shifted[b], whole[b, top : top + 24, left : left + 24])
        moved = torch.stack(
            [whole[b, t : t + 24, x : x + 24] for b, (t, x) in enumerate(draws.windows[0].tolist())]
        )
        assert torch.equal(coloured, apply_colors(moved, draw_colors(batch.keys_B, SIMSIAM, 0)))
        corners += draws.windows[1].tolist()
    assert len(set(map(tuple, corners))) > 12


def test_windows_reach_every_shift_alike():
    view = View(size=(224, 224), master=(256, 256), shift=31)
    corners = draw_views(sample_keys(0, 0, torch.arange(32_000)), np.full((32_000, 2), 300), [view]).windows[
        0
    ]
    counts = torch.stack([torch.bincount(corners[:, axis], minlength=32) for axis in (0, 1)])
    assert counts.shape == (2, 32)
    chi_squared = ((counts - 1000.0) ** 2 / 1000).sum(1)
    assert (chi_squared < 70).all()  # 31 degrees of freedom: exceeded once in 10,000
    both = torch.corrcoef(corners.T.double())[0, 1]
    assert abs(both) < 0.03


def test_two_sizes_of_one_box_with_one_colour(folder, open_loader, decoder):
    """BEiT: the tokenizer's image is the small one of the same box, with the same colours."""
    views = [
        View(size=(32, 32), color=DINO_SMALL),
        View(size=(16, 16), interpolation="lanczos", color=DINO_SMALL),
    ]
    plain = [View(size=(32, 32)), View(size=(16, 16), interpolation="lanczos")]
    [batch] = take(open_loader(find_images(folder), decoder, views=[*views, *plain]), 1)
    for coloured, clean in zip(batch.views[:2], batch.views[2:], strict=True):
        assert torch.equal(coloured, apply_colors(clean, draw_colors(batch.keys_B, DINO_SMALL, 0)))


def test_what_is_shared_costs_once(folder, open_loader, monkeypatch):
    import fastmim.data.decoder

    calls = []
    once = fastmim.data.decoder.resized_crop
    monkeypatch.setattr(
        fastmim.data.decoder, "resized_crop", lambda *a, **k: calls.append(a[2]) or once(*a, **k)
    )
    views = [PLAIN, View(size=(24, 24), color=C_MAE, draw=1), View(size=(24, 24), crop=1)]
    take(open_loader(find_images(folder), "pillow", views=views), 2)
    assert len(calls) == 4  # two crops a batch


def test_strong_augmentation():
    small = View(size=(8, 8), scale=(0.05, 0.3), crop=1, color=DINO_SMALL)
    assert augmented([PLAIN, small], "recipe") == (PLAIN, small)
    assert augmented([PLAIN, small], "strong") == (
        View(size=(24, 24), scale=(0.08, 1.0), color=SIMSIAM),
        small,
    )


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"size": (8, 0)}, "size >= 1"),
        ({"size": (8, 8), "scale": (0.0, 1.0)}, "scale"),
        ({"size": (8, 8), "flip": 1.5}, "flip"),
        ({"size": (8, 8), "crop": 100}, "crop and draw from 0 to 99"),
        ({"size": (8, 8), "shift": 1}, "a master as large as size"),
        ({"size": (8, 8), "master": (16, 7)}, "a master as large as size"),
        ({"size": (8, 8), "master": (16, 16), "shift": 9}, "a master as large as size"),
    ],
)
def test_views_that_cannot_be(view, message):
    with pytest.raises(ValueError, match=message):
        View(**view)


def test_views_that_do_not_agree():
    wide, wider = (View(size=(8, 8), master=(16, 16), shift=shift) for shift in (4, 8))
    with pytest.raises(ValueError, match="one shift for the windows of draw 0"):
        check_views([wide, wider])
