"""The crops of the methods: which draws they share, windows of a master, colors, the strong augmentation."""

import numpy as np
import pytest
import torch
from fastmim_kernels.philox import sample_seeds

from fastmim.data import find_images
from fastmim.data.augment.color import apply_colors, draw_colors
from fastmim.data.augment.draws import check_crops, draw_crops
from fastmim.views import C_MAE, DINO_SMALL, SIMSIAM, Crop, augmented

from .conftest import take

PLAIN = Crop(size=(24, 24))


def test_two_colors_of_one_crop(folder, open_loader, decoder):
    """C-MAE: positions of both crops correspond, and each has its own draw of the recipe."""
    first, second = Crop(size=(24, 24), color=C_MAE, draw=0), Crop(size=(24, 24), color=C_MAE, draw=1)
    different = 0
    for batch in take(open_loader(find_images(folder), decoder, crops=[PLAIN, first, second]), 3):
        clean, one, two = batch.crops
        assert torch.equal(one, apply_colors(clean, draw_colors(batch.seeds_B, C_MAE, 0)))
        assert torch.equal(two, apply_colors(clean, draw_colors(batch.seeds_B, C_MAE, 1)))
        different += int((one != two).flatten(1).any(1).sum())
    assert different >= 20  # of 24: both are left as they are one time in 24


def test_a_shifted_pair(folder, open_loader, decoder):
    """CMAE: two windows of one master; the first is its corner, the second colored."""
    master = Crop(size=(40, 36))
    pair = [
        Crop(size=(24, 24), master=(40, 36)),
        Crop(size=(24, 24), master=(40, 36), shift=12, color=SIMSIAM),
        Crop(size=(24, 24), master=(40, 36), shift=12, draw=1),
    ]
    corners = []
    for batch in take(open_loader(find_images(folder), decoder, crops=[master, *pair]), 3):
        whole, still, colored, shifted = batch.crops
        assert torch.equal(still, whole[:, :24, :24])
        draws = draw_crops(batch.seeds_B, np.array([[64, 64]] * 8), pair)
        for b, (top, left) in enumerate(draws.windows[1].tolist()):
            assert torch.equal(shifted[b], whole[b, top : top + 24, left : left + 24])
        moved = torch.stack(
            [whole[b, t : t + 24, x : x + 24] for b, (t, x) in enumerate(draws.windows[0].tolist())]
        )
        assert torch.equal(colored, apply_colors(moved, draw_colors(batch.seeds_B, SIMSIAM, 0)))
        corners += draws.windows[1].tolist()
    assert len(set(map(tuple, corners))) > 12


def test_windows_reach_every_shift_alike():
    crop = Crop(size=(224, 224), master=(256, 256), shift=31)
    corners = draw_crops(sample_seeds(0, 0, torch.arange(32_000)), np.full((32_000, 2), 300), [crop]).windows[
        0
    ]
    counts = torch.stack([torch.bincount(corners[:, axis], minlength=32) for axis in (0, 1)])
    assert counts.shape == (2, 32)
    chi_squared = ((counts - 1000.0) ** 2 / 1000).sum(1)
    assert (chi_squared < 70).all()  # 31 degrees of freedom: exceeded once in 10,000
    both = torch.corrcoef(corners.T.double())[0, 1]
    assert abs(both) < 0.03


def test_two_sizes_of_one_box_with_one_color(folder, open_loader, decoder):
    """BEiT: the tokenizer's image is the small one of the same box, with the same colors."""
    crops = [
        Crop(size=(32, 32), color=DINO_SMALL),
        Crop(size=(16, 16), interpolation="lanczos", color=DINO_SMALL),
    ]
    plain = [Crop(size=(32, 32)), Crop(size=(16, 16), interpolation="lanczos")]
    [batch] = take(open_loader(find_images(folder), decoder, crops=[*crops, *plain]), 1)
    for colored, clean in zip(batch.crops[:2], batch.crops[2:], strict=True):
        assert torch.equal(colored, apply_colors(clean, draw_colors(batch.seeds_B, DINO_SMALL, 0)))


def test_what_is_shared_costs_once(folder, open_loader, monkeypatch):
    import fastmim.data.decode.cut

    calls = []
    once = fastmim.data.decode.cut.resized_crop
    monkeypatch.setattr(
        fastmim.data.decode.cut, "resized_crop", lambda *a, **k: calls.append(a[2]) or once(*a, **k)
    )
    crops = [PLAIN, Crop(size=(24, 24), color=C_MAE, draw=1), Crop(size=(24, 24), box=1)]
    take(open_loader(find_images(folder), "pillow", crops=crops), 2)
    assert len(calls) == 4  # two crops a batch


def test_strong_augmentation():
    small = Crop(size=(8, 8), scale=(0.05, 0.3), box=1, color=DINO_SMALL)
    assert augmented([PLAIN, small], "recipe") == (PLAIN, small)
    assert augmented([PLAIN, small], "strong") == (
        Crop(size=(24, 24), scale=(0.08, 1.0), color=SIMSIAM),
        small,
    )


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        ({"size": (8, 0)}, "size >= 1"),
        ({"size": (8, 8), "scale": (0.0, 1.0)}, "scale"),
        ({"size": (8, 8), "flip": 1.5}, "flip"),
        ({"size": (8, 8), "box": 100}, "box and draw from 0 to 99"),
        ({"size": (8, 8), "shift": 1}, "a master as large as size"),
        ({"size": (8, 8), "master": (16, 7)}, "a master as large as size"),
        ({"size": (8, 8), "master": (16, 16), "shift": 9}, "a master as large as size"),
    ],
)
def test_views_that_cannot_be(crop, message):
    with pytest.raises(ValueError, match=message):
        Crop(**crop)


def test_views_that_do_not_agree():
    wide, wider = (Crop(size=(8, 8), master=(16, 16), shift=shift) for shift in (4, 8))
    with pytest.raises(ValueError, match="one shift for the windows of draw 0"):
        check_crops([wide, wider])
