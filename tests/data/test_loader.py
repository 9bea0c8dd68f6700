"""The stream of batches: the same for any number of ranks and from any start, and what a batch holds."""

import threading
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from fastmim_kernels.philox import sample_seeds
from PIL import Image

from fastmim.data import DataConfig, Loader, MemoryImages, SampleOrder, find_images
from fastmim.data.augment.crop import draw_boxes
from fastmim.views import Crop

from .conftest import assert_same, encode, take


def test_a_batch_is_what_its_ids_say(folder, open_loader, decoder):
    images, crop = find_images(folder), Crop(size=(20, 12), box=1)
    for batch in take(open_loader(images, decoder, crops=[crop]), 5):  # 3 steps are an epoch
        [pixels] = batch.crops
        assert pixels.shape == (8, 20, 12, 3) and pixels.dtype == torch.uint8
        assert torch.equal(batch.seeds_B, sample_seeds(3, batch.epoch, batch.ids_B))
        for slot, sample_id in enumerate(batch.ids_B.tolist()):
            image = Image.open(BytesIO(images.read(sample_id)))
            boxes, flips = draw_boxes(batch.seeds_B[slot : slot + 1], np.array([image.size[::-1]]), crop)
            top, left, height, width = boxes[0].tolist()
            cut = image.crop((left, top, left + width, top + height)).resize((12, 20), Image.BICUBIC)
            expected = torch.from_numpy(np.array(cut))
            expected = expected.flip(1) if flips[0] else expected
            assert (pixels[slot].float() - expected.float()).abs().mean() < 0.5


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_and_accumulation_see_the_same_images(folder, open_loader, decoder, world, accumulate):
    images, steps = find_images(folder), 4
    whole = take(open_loader(images, decoder), steps)
    split = {"world": world, "accumulate": accumulate}
    parts = [
        take(open_loader(images, decoder, rank=rank, **split), steps * accumulate) for rank in range(world)
    ]
    for step in range(steps):
        pieces = [parts[r][step * accumulate + a] for a in range(accumulate) for r in range(world)]
        assert torch.equal(torch.cat([piece.ids_B for piece in pieces]), whole[step].ids_B)
        assert torch.equal(torch.cat([piece.seeds_B for piece in pieces]), whole[step].seeds_B)
        assert torch.equal(torch.cat([piece.crops[0] for piece in pieces]), whole[step].crops[0])
        assert {piece.epoch for piece in pieces} == {whole[step].epoch}


def test_a_start_in_the_middle_continues_the_run(folder, open_loader, decoder):
    images = find_images(folder)
    run = take(open_loader(images, decoder, accumulate=2), 16)  # 8 steps, 3 an epoch
    assert [batch.epoch for batch in run] == [0] * 6 + [1] * 6 + [2] * 4
    for start in (1, 3, 5):
        assert_same(
            take(open_loader(images, decoder, accumulate=2, start_step=start), 6), run[2 * start :][:6]
        )


def test_all_views_of_a_method(folder, open_loader, decoder):
    crops = [
        Crop(size=(24, 24)),
        Crop(size=(12, 12), interpolation="bilinear"),
        Crop(size=(8, 30), scale=(0.05, 0.3), box=1),
        Crop(size=(8, 8), flip=0.0, box=7),
    ]
    images = find_images(folder)
    for channels in (3, 1):
        [batch] = take(open_loader(images, decoder, crops=crops, channels=channels), 1)
        shapes = [tuple(crop.shape) for crop in batch.crops]
        assert shapes == [(8, *crop.size, channels) for crop in crops]
    # the half-size crop shows the same box: its picture is the first one's, blurred
    halved = torch.nn.functional.avg_pool2d(batch.crops[0].permute(0, 3, 1, 2).float(), 2)
    assert (halved - batch.crops[1].permute(0, 3, 1, 2).float()).abs().mean() < 4


def test_another_seed_is_another_run(folder, tmp_path):
    images = find_images(folder)
    batches = []
    for seed in (0, 1):
        with Loader(
            images, [Crop(size=(16, 16))], SampleOrder(24, 24, seed=0), config=DataConfig(decoder="pillow"),
            channels=3, seed=seed, device=torch.device("cpu"), bad_samples=tmp_path / "bad.jsonl",
        ) as loader:  # fmt: skip
            batches.append(next(loader))
    assert torch.equal(batches[0].ids_B, batches[1].ids_B)  # the order has a seed of its own
    assert not torch.equal(batches[0].seeds_B, batches[1].seeds_B)
    assert not torch.equal(batches[0].crops[0], batches[1].crops[0])


def test_closing_ends_the_threads(folder, open_loader, decoder):
    before = set(threading.enumerate())
    loader = open_loader(find_images(folder), decoder)
    next(loader)
    loader.close()
    loader.close()  # twice is harmless
    deadline = time.monotonic() + 10
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def test_the_order_must_be_of_these_images(folder, tmp_path):
    with pytest.raises(ValueError, match="an order of 24 samples, got one of 23"):
        Loader(
            find_images(folder), [Crop(size=(8, 8))], SampleOrder(23, 1), config=DataConfig(), channels=3,
            seed=0, device=torch.device("cpu"), bad_samples=tmp_path / "bad.jsonl",
        )  # fmt: skip


def test_config_refuses_and_shares_the_cores(monkeypatch):
    for wrong in ({"threads": 0}, {"prefetch": 0}, {"hw_decoder_load": 1.1}, {"max_bad_fraction": 1.5}):
        with pytest.raises(ValueError, match=f"data.{next(iter(wrong)).replace('_', '-')}"):
            DataConfig(**wrong)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        monkeypatch.setenv(name, "4")
        assert DataConfig().num_threads() == 3
    assert DataConfig(threads=5).num_threads() == 5
    assert [DataConfig().bad_limit(n) for n in (1, 8, 24, 500, 5000)] == [0, 4, 10, 10, 50]


def test_images_smaller_than_every_view_are_enlarged(open_loader, decoder):
    """A crop is a share of the image: no size of crop is too large for a set, not even of single pixels."""
    sizes = [(1, 1), (3, 90), (90, 3), (8, 8)]
    images = MemoryImages([encode(i, size=size) for i, size in enumerate(sizes)])
    [batch] = take(open_loader(images, decoder, batch=4, crops=[Crop(size=(64, 48))]), 1)
    assert batch.crops[0].shape == (4, 64, 48, 3)
    single = batch.crops[0][batch.ids_B.tolist().index(0)]
    assert (single == single[0, 0]).all()
