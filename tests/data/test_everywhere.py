"""The same ids, boxes, colors and masks on 1, 2 and 4 ranks and from any start, for crops of every kind."""

from pathlib import Path

import pytest
import torch
from fastmim_kernels import split_patches

from fastmim.data import find_images
from fastmim.views import C_MAE, DINO_SMALL, SIMSIAM, Crop
from tests.engine.forked import scenarios

from .conftest import assert_same, take

CROPS = {
    "one": [Crop(size=(16, 16))],
    "colors of one crop": [Crop(size=(16, 16), color=C_MAE), Crop(size=(16, 16), color=SIMSIAM, draw=1)],
    "windows of a master": [
        Crop(size=(16, 16), master=(24, 24)),
        Crop(size=(16, 16), master=(24, 24), shift=8, color=C_MAE, draw=1),
    ],
    "two sizes of one box": [Crop(size=(16, 16)), Crop(size=(8, 8), interpolation="bilinear")],
    "several crops of two sizes": [
        Crop(size=(16, 16), scale=(0.4, 1.0), color=SIMSIAM),
        Crop(size=(16, 16), scale=(0.4, 1.0), box=1, color=SIMSIAM, draw=1),
        *(Crop(size=(8, 8), scale=(0.05, 0.4), box=c, color=DINO_SMALL, draw=c) for c in (2, 3)),
    ],
}
STEPS = 7  # of 8 images from 24: an epoch is three


@pytest.fixture(params=CROPS, ids=[name.replace(" ", "_") for name in CROPS])
def crops(request) -> list[Crop]:
    return CROPS[request.param]


def parts_of(batch) -> list[torch.Tensor]:
    """All that depends on the sample: ids, keys, masks drawn from them, and every crop."""
    return [batch.ids_B, batch.seeds_B, *split_patches(batch.seeds_B, 16, 4), *batch.crops]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (4, 1), (2, 2), (1, 4)])
def test_ranks_cut_the_same_batches(folder, open_loader, decoder, crops, world, accumulate):
    images = find_images(folder)
    whole = take(open_loader(images, decoder, crops=crops), STEPS)
    split = {"world": world, "accumulate": accumulate, "crops": crops}
    ranks = [take(open_loader(images, decoder, rank=r, **split), STEPS * accumulate) for r in range(world)]
    for step, expected in enumerate(whole):
        pieces = [ranks[r][step * accumulate + a] for a in range(accumulate) for r in range(world)]
        assert {piece.epoch for piece in pieces} == {expected.epoch}
        columns = zip(*(parts_of(piece) for piece in pieces), strict=True)
        for column, part in zip(columns, parts_of(expected), strict=True):
            assert torch.equal(torch.cat(column), part)


def test_a_start_at_any_step_continues_the_run(folder, open_loader, decoder, crops):
    images = find_images(folder)
    run = take(open_loader(images, decoder, crops=crops), STEPS)
    assert [batch.epoch for batch in run] == [0] * 3 + [1] * 3 + [2]
    for start in range(1, STEPS):
        assert_same(take(open_loader(images, decoder, crops=crops, start_step=start), 1), run[start:][:1])


def test_a_run_of_four_ranks_goes_on_with_two_and_with_one(folder, open_loader, decoder):
    """What the data owe a changed number of ranks; checkpoints hold shards, so the engine refuses it."""
    images, crops = find_images(folder), CROPS["several crops of two sizes"]
    whole = take(open_loader(images, decoder, crops=crops), 6)
    start, seen = 0, []
    for world, steps in ((4, 2), (2, 1), (1, 2), (4, 1)):
        ranks = [
            take(open_loader(images, decoder, crops=crops, world=world, rank=r, start_step=start), steps)
            for r in range(world)
        ]
        for step in range(steps):
            columns = zip(*(parts_of(rank[step]) for rank in ranks), strict=True)
            seen.append([torch.cat(column) for column in columns])
        start += steps
    for got, expected in zip(seen, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, parts_of(expected), strict=True))


def test_an_epoch_shows_no_image_twice_and_leaves_out_what_fills_no_batch(folder, open_loader, decoder):
    images = find_images(folder)
    run = take(open_loader(images, decoder, batch=7), 6)  # 24 = 3 * 7 + 3
    for epoch in range(2):
        ids = torch.cat([batch.ids_B for batch in run[3 * epoch :][:3]])
        assert len(ids.unique()) == 21


@pytest.mark.slow
def test_four_processes_see_what_one_does():
    answers = scenarios(Path(__file__).with_name("everywhere_scenarios.py"))["digests"]
    assert answers.keys() == {"pillow", "dali"} or answers.keys() == {"pillow"}
    for decoder, digests in answers.items():
        one = digests["one"]
        assert len(one) == STEPS * 8 and len(set(one.values())) > 24, decoder  # another crop in each epoch
        assert digests["four"] == one, decoder
        assert digests["four from 4"] == {place: d for place, d in one.items() if place[0] >= 4}, decoder
