"""Crops from decoded images: the pixels of the uncached loader, bad files, repeats, and what does not fit."""

import gc
import shutil
import weakref
from io import BytesIO

import numpy as np
import pytest
import torch
from fastmim_kernels.philox import sample_seeds
from PIL import Image

from fastmim.data import DataConfig, MemoryImages, find_images, look_at_sizes
from fastmim.data.augment.crop import draw_boxes
from fastmim.data.feed import sizes
from fastmim.data.sources.source import Images
from fastmim.views import BYOL_FIRST, C_MAE, Crop

from .conftest import assert_same, encode, take
from .test_bad_files import BAD, repaired, rows, spoil

CROPS = {
    "one crop": [Crop(size=(16, 20))],
    "colors and windows": [
        Crop(size=(16, 16), master=(20, 20), shift=4, draw=1, color=C_MAE),
        Crop(size=(16, 16), master=(20, 20), shift=4, draw=2),
    ],
    "several crops and sizes": [
        Crop(size=(24, 24), color=BYOL_FIRST),
        Crop(size=(12, 12), interpolation="bilinear", draw=1),
        Crop(size=(8, 30), scale=(0.05, 0.3), box=1),
        Crop(size=(8, 8), flip=0.0, box=7, color=C_MAE, draw=3),
    ],
}


@pytest.fixture
def kinds(tmp_path):
    """Files that decoders treat differently: odd chroma, scans, gray, alpha, palette, orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "a.jpg": encode(0, size=(47, 39)),
        "b.jpg": encode(1, size=(61, 33), subsampling=2, quality=60),
        "c.jpg": encode(2, size=(33, 47), progressive=True),
        "d.jpg": encode(3, mode="L"),
        "e.jpg": encode(4, exif=exif),
        "f.png": encode(5, size=(31, 40), fmt="PNG", mode="RGBA"),
        "g.png": encode(6, fmt="PNG", mode="P"),
        "h.webp": encode(7, fmt="WEBP"),
        "i.jpg": encode(8, size=(200, 150), subsampling=1),
        "j.png": encode(9, size=(1, 1), fmt="PNG"),
    }
    for name, data in files.items():
        (tmp_path / "kinds").mkdir(exist_ok=True)
        (tmp_path / "kinds" / name).write_bytes(data)
    return tmp_path / "kinds"


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("crops", CROPS)
def test_the_same_batches_with_and_without_a_cache(kinds, open_loader, decoder, device, crops, channels):
    images = find_images(kinds)
    settings = {"crops": CROPS[crops], "channels": channels, "batch": 5, "device": device}
    expected = take(open_loader(images, decoder, **settings), 5)
    for cache in ("ram", "device"):
        found = take(open_loader(images, decoder, cache=cache, **settings), 5)
        assert_same(found, expected)
        assert all(crop.device.type == device for crop in found[0].crops)


def test_the_same_batches_of_imagenet(imagenet, open_loader, decoder):
    """Photographs: of one crop DALI decodes the box alone, without a cache."""
    images = find_images(imagenet)
    settings = {"crops": [Crop(size=(64, 64))], "batch": 50}
    expected = take(open_loader(images, decoder, **settings), 3)
    assert_same(take(open_loader(images, decoder, cache="ram", **settings), 3), expected)


def test_ranks_micro_steps_and_starts_are_served_alike(folder, open_loader):
    images = find_images(folder)
    whole = take(open_loader(images, "pillow", accumulate=2), 10)
    for rank in (0, 1):
        split = {"world": 2, "rank": rank, "cache": "ram"}
        assert_same(take(open_loader(images, "pillow", **split), 5), whole[rank::2])
        assert_same(take(open_loader(images, "pillow", start_step=2, **split), 3), whole[4 + rank :: 2])


def test_a_file_is_read_for_its_header_and_its_pixels_and_never_again(folder, open_loader, monkeypatch):
    images, calls = find_images(folder), []
    read = type(images).read
    monkeypatch.setattr(type(images), "read", lambda self, i: calls.append(i) or read(self, i))
    loader = open_loader(images, "pillow", cache="ram")
    assert sorted(calls) == sorted([*range(24)] * 2)
    shutil.rmtree(folder)
    take(loader, 7)
    assert len(calls) == 48


def test_closing_gives_the_memory_back(folder, open_loader):
    loader = open_loader(find_images(folder), "pillow", cache="ram")
    next(loader)
    buffer = weakref.ref(loader._supply._cache.buffer)
    assert buffer().numel() == 3 * sum(height * width for height, width in zip(*sides(folder), strict=True))
    loader.close()
    loader.close()
    gc.collect()
    assert buffer() is None
    with pytest.raises(StopIteration):
        next(loader)


def sides(folder):
    opened = [Image.open(path) for path in folder.rglob("*.jpg")]
    return [image.height for image in opened], [image.width for image in opened]


# --- repeats ----------------------------------------------------------------------------------------


def test_one_image_is_as_many_samples_as_an_epoch_has(open_loader, decoder):
    """Every sample once an epoch, each cut as its own key says: by Pillow, written out plainly."""
    data, crop = encode(5, size=(40, 50), fmt="PNG"), Crop(size=(20, 12))
    image, seen = Image.open(BytesIO(data)), []
    settings = {"epoch_images": 30, "batch": 10, "cache": "ram", "crops": [crop]}
    for batch in take(open_loader(MemoryImages([data]), decoder, **settings), 6):
        assert torch.equal(batch.seeds_B, sample_seeds(3, batch.epoch, batch.ids_B))
        seen.append(batch.ids_B)
        boxes, flips = draw_boxes(batch.seeds_B, np.tile([[50, 40]], (10, 1)), crop)
        for slot, (top, left, height, width) in enumerate(boxes.tolist()):
            cut = image.crop((left, top, left + width, top + height))
            cut = cut.resize((12, height), Image.BICUBIC).resize((12, 20), Image.BICUBIC)
            expected = torch.from_numpy(np.array(cut))
            assert torch.equal(batch.crops[0][slot], expected.flip(1) if flips[slot] else expected)
        assert len(np.unique(boxes, axis=0)) == 10
    for epoch in (seen[:3], seen[3:]):
        assert torch.cat(epoch).sort().values.tolist() == [*range(30)]


def test_a_set_repeated_is_the_set_copied(folder, tmp_path, open_loader, decoder):
    """Sample id shows image id % 24, cached or not: as a folder that holds the files over again does."""
    images, copies = find_images(folder), tmp_path / "copies"
    copies.mkdir()
    for i in range(53):
        shutil.copy(images.path(i % 24), copies / f"{i:03d}.jpg")
    expected = take(open_loader(find_images(copies), decoder, batch=10), 7)
    for cache in ("none", "ram"):
        found = take(open_loader(images, decoder, batch=10, epoch_images=53, cache=cache), 7)
        assert_same(found, expected)
        later = open_loader(images, decoder, batch=10, epoch_images=53, cache=cache, start_step=4)
        assert_same(take(later, 3), expected[4:])


def test_an_epoch_of_imagenets_length_from_one_image(open_loader):
    loader = open_loader(MemoryImages([encode(0)]), "pillow", epoch_images=1_281_167, batch=64, cache="ram")
    ids = torch.cat([batch.ids_B for batch in take(loader, 3)])
    assert len(ids.unique()) == 192 and ids.max() > 1_000_000


def test_lengths_that_do_not_fit_are_refused(folder, open_loader):
    with pytest.raises(ValueError, match="data.epoch-images: want at least 1, got -1"):
        DataConfig(epoch_images=-1)
    with pytest.raises(ValueError, match="want at least the 24 images there are, got 23"):
        open_loader(find_images(folder), "pillow", epoch_images=23)
    assert [DataConfig(epoch_images=n).samples_per_epoch(24) for n in (None, 24, 100)] == [24, 24, 100]


# --- bad files ---------------------------------------------------------------------------------------


def test_bad_files_are_named_once_and_replaced_as_without_a_cache(folder, tmp_path, open_loader, decoder):
    images = find_images(folder)
    contents = {2: 5, 3: 5, 4: 5, 9: 11, 10: 11, 17: 18, 22: 0, 23: 0}
    expected = take(open_loader(repaired(images, tmp_path, contents), decoder), 7)
    spoilt = dict(zip(contents, [*BAD][1:], strict=False))
    spoilt |= {22: "header and end", 23: "damaged png"}  # found by the decoder alone
    for image_id, kind in spoilt.items():
        spoil(images.path(image_id), kind)
    assert_same(take(open_loader(images, decoder, cache="ram"), 7), expected)
    found = rows(tmp_path)
    assert sorted(row["sample_id"] for row in found) == sorted(contents)
    assert all(row["path"] == images.names[row["sample_id"]] and len(row["reason"]) > 4 for row in found)
    assert {(row["epoch"], row["step"], row["rank"]) for row in found} == {(0, 0, 0)}


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_repeated_bad_file_is_one_bad_file(folder, tmp_path, open_loader, cache):
    images = find_images(folder)
    for image_id in range(10):  # ten are borne, however many samples show them
        spoil(images.path(image_id), "text" if image_id % 2 else "truncated png")
    loader = open_loader(images, "pillow", epoch_images=240, batch=24, cache=cache, start_step=10)
    take(loader, 10)
    found = rows(tmp_path)
    assert sorted(row["sample_id"] for row in found) == [*range(10)]
    assert {row["epoch"] for row in found} == {1}
    assert cache == "none" or {row["step"] for row in found} == {10}


def test_a_bad_file_is_named_by_the_start_it_was_found_at(folder, tmp_path, open_loader):
    images = find_images(folder)
    spoil(images.path(3), "gone")
    open_loader(images, "pillow", cache="ram", start_step=4)
    [row] = rows(tmp_path)
    assert (row["epoch"], row["step"]) == (1, 4) and row["reason"].startswith("FileNotFoundError")


def test_too_many_bad_files_end_it_before_the_first_batch(folder, tmp_path, open_loader, decoder):
    images = find_images(folder)
    for image_id in range(12):
        spoil(images.path(image_id), "damaged png" if image_id > 6 else "text")
    with pytest.raises(ValueError, match="11 of 24 images cannot be decoded, more than the 10 allowed"):
        open_loader(images, decoder, cache="ram")
    assert len(rows(tmp_path)) == 11


def test_a_file_that_changes_while_it_is_cached_is_bad(folder, tmp_path, open_loader, monkeypatch):
    images, times = find_images(folder), []
    read = type(images).read

    def changing(self: Images, i: int) -> bytes:
        times.append(i)
        return encode(0, size=(9, 9)) if i == 6 and times.count(6) > 1 else read(self, i)

    monkeypatch.setattr(type(images), "read", changing)
    open_loader(images, "pillow", cache="ram")
    [row] = rows(tmp_path)  # image 6 is a/12.jpg
    assert row["sample_id"] == 6 and row["reason"] == "its header says (52, 76, 3), but it is (9, 9, 3)"


# --- room --------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_is_decoded(folder, open_loader, monkeypatch):
    images = find_images(folder)
    taken = 3 * sum(height * width for height, width in zip(*sides(folder), strict=True))

    def sized(free, ranks=1):
        monkeypatch.setattr(sizes, "room_for", lambda where: (free, ranks))
        return look_at_sizes(
            images, config=DataConfig(cache="ram", threads=1), channels=3, device=torch.device("cpu")
        )

    assert sized(taken).total == taken
    assert sized(2 * taken, ranks=2).total == taken
    with pytest.raises(ValueError, match="for 24 decoded images, got 271.. kB of memory, which the first 24"):
        sized(taken - 1)
    with pytest.raises(ValueError, match="2 times, once for each rank of this node.*pack --short-side"):
        sized(2 * taken - 1, ranks=2)
    monkeypatch.setattr("fastmim.data.feed.cache.make_decoder", lambda *a, **k: pytest.fail("decoded"))
    monkeypatch.setattr(sizes, "room_for", lambda where: (taken - 1, 1))
    with pytest.raises(ValueError, match="data.cache: want about 271.. kB"):
        open_loader(images, "pillow", cache="ram")


def test_memory_is_counted_by_linux_and_by_the_control_group(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    monkeypatch.setattr(sizes, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(sizes, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(sizes, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(sizes, "SHARE", 1.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    cpu = torch.device("cpu")
    assert sizes.room_for(cpu) == (5000 * 1024, 3)
    for group, limit in {"job": "1000000", "job/step": "max"}.items():  # the outer one holds for the inner
        folder = tmp_path / "groups" / group
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("400000\n")
        (folder / "memory.stat").write_text("anon 100000\ninactive_file 300000\n")
    assert sizes.room_for(cpu) == (900_000, 3)
    monkeypatch.setattr(sizes, "SHARE", 0.5)
    assert sizes.room_for(cpu) == (450_000, 3)


def test_without_a_terminal_one_line_says_what_is_decoded(folder, open_loader, capsys):
    open_loader(find_images(folder), "pillow", cache="device")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["decoding 24 images into 271.3 kB on cpu"]
    open_loader(find_images(folder), "pillow", cache="device", world=2, rank=1)
    assert capsys.readouterr().err == ""
