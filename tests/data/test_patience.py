"""Errors of a disk pass or end the run; they are never bad images. What is planted beside data is refused."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmim.data import DataConfig, find_images
from fastmim.data.feed.bad import try_read
from fastmim.data.feed.loader import open_loader
from fastmim.data.sources import index as module
from fastmim.data.sources import patience, tar
from fastmim.data.sources.folder import Files
from fastmim.data.sources.index import Index, Names, Stamps, check_index, check_names, is_own, pack, unpack
from fastmim.data.sources.patience import DiskError, patiently
from fastmim.data.sources.sample import sample_set
from fastmim.views import Crop

CROPS = (Crop(size=(16, 16)),)


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "images" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("WAIT_S", 0.4), ("FIRST_S", 0.01), ("LONGEST_S", 0.05)):
        monkeypatch.setattr(patience, name, value)


def failing(monkeypatch, number: int, times: int) -> None:
    """The next `times` reads of files fail with this error."""
    read, left = Files.read, iter(range(times))

    def stutter(self, sample_id):
        if next(left, None) is not None:
            raise OSError(number, os.strerror(number))
        return read(self, sample_id)

    monkeypatch.setattr(Files, "read", stutter)


def batches(folder: Path, tmp_path: Path, **changes) -> list:
    config = replace(DataConfig(decoder="pillow", threads=2), **changes)
    with open_loader(
        find_images(folder), CROPS, 8, config=config, bad_samples=tmp_path / "bad.jsonl"
    ) as loader:
        return [next(loader).crops[0].clone() for _ in range(5)]


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_disk_that_stutters_changes_nothing_and_is_said_once(
    folder, tmp_path, quick, monkeypatch, capsys, cache
):
    whole = batches(folder, tmp_path)
    failing(monkeypatch, errno.EIO, 6)
    again = batches(folder, tmp_path, cache=cache)
    assert all((a == b).all() for a, b in zip(whole, again, strict=True))
    assert not (tmp_path / "bad.jsonl").exists()
    said = capsys.readouterr().err
    assert said.count("Input/output error: reading is tried again") == 1
    assert said.count("reading works again, after") == 1


def test_a_disk_that_is_gone_ends_the_run_and_names_the_file(folder, tmp_path, quick, monkeypatch):
    failing(monkeypatch, errno.EIO, 10**9)
    with pytest.raises(DiskError, match=r"Input/output error, for 0 s: the disk is gone: .*\.png") as error:
        batches(folder, tmp_path)
    assert error.value.errno == errno.EIO and not (tmp_path / "bad.jsonl").exists()


def test_a_file_that_is_not_there_is_bad_at_once(folder, tmp_path, quick):
    images = find_images(folder)
    (folder / "03.png").unlink()
    assert try_read(images, 3) == "FileNotFoundError: No such file or directory"
    with pytest.raises(FileNotFoundError):
        patiently((folder / "03.png").read_bytes, folder)


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
@pytest.mark.parametrize("cache", ["none", "ram"])
def test_an_image_of_too_many_pixels_is_bad_before_it_is_decoded(folder, tmp_path, decoder, cache):
    Image.new("RGB", (700, 600)).save(folder / "05.png")  # 2 kB
    large = {"max_pixels": 700 * 600 - 1, "max_bad_fraction": 0.5}
    batches(folder, tmp_path, decoder=decoder, cache=cache, **large)
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(row["path"], row["reason"]) for row in rows] == [
        ("05.png", "600 x 700 pixels, more than the 419999 of data.max-pixels")
    ]
    (tmp_path / "bad.jsonl").unlink()
    batches(folder, tmp_path, decoder=decoder, cache=cache, max_pixels=700 * 600)
    assert not (tmp_path / "bad.jsonl").exists()


# --- indexes that somebody made -----------------------------------------------------------------------


def index(**changes) -> Index:
    names, parts = Names.of(["a/1.png", "b/2.png"]), Names.of(["", "a", "b"])
    stamps = Stamps(parts, np.ones((3, 2), np.int64))
    whole = Index("folder", names, ("a", "b"), np.array([0, 1], np.int32), stamps)
    return replace(whole, **changes)


CRAFTED = {
    "a name above": {"names": Names.of(["../../etc/1.png", "b/2.png"])},
    "a name within that goes up": {"names": Names.of(["a/../../1.png", "b/2.png"])},
    "an absolute name": {"names": Names.of(["a/1.png", "/etc/passwd"])},
    "ends beyond the bytes": {"names": Names(b"abc", np.array([1, 100], np.int64))},
    "ends that descend": {"names": Names(b"abcd", np.array([4, 2], np.int64))},
    "ends of another type": {"names": Names(b"ab", np.array([1.0, 2.0]))},
    "labels of no class": {"labels": np.array([0, 7], np.int32)},
    "negative labels": {"labels": np.array([-1, 0], np.int32)},
    "a label too few": {"labels": np.array([0], np.int32)},
    "labels of another type": {"labels": np.array([0, 1], np.int64)},
    "classes that are numbers": {"classes": (1, 2)},
    "a part above": {"stamps": Stamps(Names.of(["..", "a", "b"]), np.ones((3, 2), np.int64))},
    "a stamp too few": {"stamps": Stamps(Names.of(["", "a", "b"]), np.ones((2, 2), np.int64))},
}


@pytest.mark.parametrize("changes", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_index_does_not_hold_together(changes):
    check_index(index())
    with pytest.raises(ValueError, match="."):
        check_index(index(**changes))


def test_names_with_two_dots_in_them_are_names():
    check_names(Names.of(["a..b/..c.png", "...png"]), inside=True)
    check_names(Names.of(["../elsewhere.png"]), inside=False)  # a list may name what it likes


HEADERS = [{}, {"arrays": 3}, [], {"arrays": [["x", "O", [1]]]}, {"arrays": [["x", "<f8", [10**12]]]}]


@pytest.mark.parametrize("header", [*HEADERS, {"arrays": [["x", "<f8", [-1]]]}, {"arrays": [["x", "", [1]]]}])
def test_any_error_in_an_index_means_none(folder, header, monkeypatch):
    """With a checksum that is right; the folder is walked, and found as it is."""
    monkeypatch.setattr("fastmim.data.sources.folder.WORTH_KEEPING", 1)
    monkeypatch.setattr(module, "SETTLED_NS", -(10**18))
    whole = list(find_images(folder, refresh=True).names)
    file = module.index_file(folder)
    assert file.exists()
    file.write_bytes(sealed(header))
    assert list(find_images(folder).names) == whole


def sealed(header) -> bytes:
    """As `pack` does it, of any header."""
    import hashlib
    import struct

    text = json.dumps(header).encode()
    body = struct.pack("<Q", len(text)) + text + bytes(-len(text) % 8)
    return module.MAGIC + hashlib.sha256(body).digest() + body


def test_an_index_of_another_user_or_that_anybody_may_write_is_not_read(tmp_path, monkeypatch):
    file = tmp_path / "x.index"
    file.write_bytes(b"x")
    file.chmod(0o664)
    assert is_own(file)
    file.chmod(0o666)
    assert not is_own(file)
    file.chmod(0o600)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert is_own(file) == (file.stat().st_uid == 0)
    (tmp_path / "link").symlink_to(file)
    assert not is_own(tmp_path / "link")


def test_a_sample_set_that_anybody_may_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmim.data.sources.sample._whole", lambda made: True)
    made = tmp_path / "sample-v1"
    made.mkdir(mode=0o755)
    assert sample_set(tmp_path) == made
    made.chmod(0o777)
    with pytest.raises(OSError, match="another user's, or others may write to it"):
        sample_set(tmp_path)


def shard(tmp_path: Path) -> Path:
    import tarfile

    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a/1.png", "b/2.png"):
            file = tmp_path / "image.png"
            Image.new("RGB", (8, 8)).save(file)
            archive.add(file, name)
    return path


PLACES = [
    {"offset": [512, 10**9]}, {"offset": [-512, 512]}, {"size": [-1, 5]}, {"size": [10**12, 5]},
    {"crc": [0.5, 1.5]}, {"offset": [512]}, {"names": ["../1.png", "b/2.png"]}, {"labels": ["x"]},
]  # fmt: skip


@pytest.mark.parametrize("spoil", PLACES, ids=str)
def test_a_crafted_index_beside_a_shard_is_passed_over(tmp_path, spoil):
    path = shard(tmp_path)
    names, labels, places, _ = tar.index_shard(path)
    given = {"names": names, "labels": labels} | {k: v.copy() for k, v in places.items()}
    [(name, value)] = spoil.items()
    given[name] = value if name in ("names", "labels") else np.array(value)
    arrays = {k: given[k] for k in places}
    content = tar.write_shard_index(given["names"], given["labels"], arrays, path.stat().st_size)
    path.with_name("0.tar.index").write_bytes(content)
    found = find_images(path)
    assert list(found.names) == names and [len(found.read(i)) > 50 for i in range(2)] == [True, True]


def test_an_index_that_is_right_is_used(tmp_path):
    path = shard(tmp_path)
    names, labels, places, _ = tar.index_shard(path)
    content = tar.write_shard_index(["x/1.png", "y/2.png"], labels, places, path.stat().st_size)
    path.with_name("0.tar.index").write_bytes(content)
    assert list(find_images(path).names) == ["x/1.png", "y/2.png"] != names
    header, arrays = unpack(content)
    assert pack(header, arrays) == content
