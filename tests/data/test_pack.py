"""Packed shards: what is in them, the same bytes whatever the threads and however often it was killed."""

import json
import os
import signal
import tarfile
import threading
import time
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmim.data import find_images
from fastmim.data.decode.pixels import decode
from fastmim.data.decode.resize import resized
from fastmim.data.sources import pack as packing
from fastmim.data.sources.pack import PackConfig, pack_images

from .conftest import encode
from .shards import CLASSES, LABELS, PICTURES, with_labels, write_folder, write_parquet, write_tar

GOOD = encode(6)
SMALL = PackConfig(short_side=50, shard_mb=1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


def noise(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG that is large for its size."""
    file = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=100)
    return file.getvalue()


@pytest.fixture(scope="module")
def set_of_bytes() -> dict[str, bytes]:
    """Some 3 MB: 24 good images in three classes, small and large, and two that are bad."""
    files = {f"{CLASSES[i % 3]}/{i:02d}.jpg": noise(i, (60 + 45 * (i % 7), 310 - 2 * i)) for i in range(24)}
    return files | {"cat/broken.jpg": files["cat/00.jpg"][:3000], "eel/empty.png": b""}


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")
    }


def test_a_pack_reads_as_its_source(tmp_path):
    source = find_images(write_folder(tmp_path / "src"))
    manifest = pack_images(source, tmp_path / "dst", PackConfig(), threads=3)
    images = find_images(tmp_path / "dst")
    assert images.names == source.names and images.classes == CLASSES
    assert images.labels.tolist() == LABELS == source.labels.tolist()
    assert [images.read(i) for i in range(len(images))] == list(PICTURES.values())
    assert manifest["complete"] and len(manifest["shards"]) == 1
    assert manifest["source"] == {
        "images": 9, "fingerprint": source.fingerprint, "classes": list(CLASSES)
    }  # fmt: skip
    assert not (tmp_path / "dst" / "bad_samples.jsonl").exists()


def test_a_shard_is_a_whole_tar_in_webdatasets_layout(tmp_path):
    pack_images(find_images(write_folder(tmp_path / "src")), tmp_path / "dst", PackConfig(), threads=2)
    with tarfile.open(tmp_path / "dst" / "shard-000000.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
        assert all((m.mtime, m.uid, m.uname, m.mode) == (0, 0, "", 0o644) for m in tar.getmembers())
    assert members == with_labels(LABELS)
    # the index beside it says what the shard says
    (tmp_path / "dst" / "shard-000000.tar.index").rename(tmp_path / "elsewhere")
    alone = find_images(tmp_path / "dst", refresh=True)
    assert alone.names == list(PICTURES) and alone.labels.tolist() == LABELS
    assert [alone.read(i) for i in range(len(alone))] == list(PICTURES.values())


def test_long_names_and_names_of_any_bytes(tmp_path):
    files = {f"{'d' * 120}/{'f' * 120}.jpg": GOOD, "e/\udcff\N{SNOWMAN}.x.jpg": GOOD[::-1]}
    (tmp_path / "l").mkdir()
    write_folder(tmp_path / "src", files | {"e/z.jpg": encode(2)})
    source = find_images(tmp_path / "src")
    pack_images(source, tmp_path / "dst", PackConfig(), threads=1)
    for _ in range(2):
        packed = find_images(tmp_path / "dst", refresh=True)
        assert packed.names == [name for name in source.names if "\N{SNOWMAN}" not in name]
        assert packed.read(0) == GOOD and packed.labels.tolist() == [0, 1]
        assert packed.classes == source.classes
        (tmp_path / "dst" / "shard-000000.tar.index").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["list", "tar", "parquet"])
def test_any_source_is_packed(kind, tmp_path):
    write_folder(tmp_path / "set")
    files = dict(PICTURES)
    if kind == "list":
        # a file that is named twice, one beside the list's folder, and two of one key
        names = [f"../set/{name}" for name in PICTURES] + ["../set/cat/0.jpg", "a.jpg", "a.png"]
        write_folder(tmp_path / "l", {"a.jpg": (one := encode(1)), "a.png": (two := encode(2, fmt="PNG"))})
        (tmp_path / "l" / "l.txt").write_text("".join(f"{name}\t1\n" for name in names))
        source, expected = tmp_path / "l" / "l.txt", [f"set/{name}" for name in PICTURES]
        expected += ["set/cat/00000009-0.jpg", "a.jpg", "00000011-a.png"]
        data = [*files.values(), files["cat/0.jpg"], one, two]
    elif kind == "tar":
        source, expected, data = write_tar(tmp_path / "x.tar", files.items()), list(files), [*files.values()]
    else:
        pytest.importorskip("pyarrow")
        source = write_parquet(tmp_path / "x.parquet", {"": encode(3, fmt="WEBP"), "b": encode(4)}, [2, 0])
        expected, data = ["00000000-.webp", "b.jpg"], [encode(3, fmt="WEBP"), encode(4)]
    images = find_images(source)
    pack_images(images, tmp_path / "dst", PackConfig(), threads=2)
    packed = find_images(tmp_path / "dst")
    assert packed.names == expected
    assert [packed.read(i) for i in range(len(packed))] == data
    assert packed.labels.tolist() == images.labels.tolist() and packed.classes == images.classes


def test_shards_are_full_but_not_over(tmp_path, set_of_bytes):
    source = find_images(write_folder(tmp_path / "src", set_of_bytes))
    manifest = pack_images(source, tmp_path / "dst", PackConfig(shard_mb=1), threads=2)
    sizes = [entry["bytes"] for entry in manifest["shards"]]
    assert len(sizes) >= 3 and all(size == (tmp_path / "dst" / e["name"]).stat().st_size
                                   for size, e in zip(sizes, manifest["shards"], strict=True))  # fmt: skip
    assert all(700_000 < size <= 1_000_000 + tarfile.RECORDSIZE for size in sizes[:-1])
    assert sum(entry["images"] for entry in manifest["shards"]) == 24
    assert [e["next"] for e in manifest["shards"]] == [*(e["first"] for e in manifest["shards"][1:]), 26]


def test_bad_images_are_named_and_left_out(tmp_path, set_of_bytes):
    source = find_images(write_folder(tmp_path / "src", set_of_bytes))
    pack_images(source, tmp_path / "dst", SMALL, threads=2)
    rows = [json.loads(line) for line in (tmp_path / "dst" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(row["path"], row["sample_id"]) for row in rows] == [("cat/broken.jpg", 8), ("eel/empty.png", 25)]
    assert "truncated" in rows[0]["reason"] and rows[1]["reason"] == "empty file"
    assert find_images(tmp_path / "dst").names == [
        name for name in source.names if "/0" in name or "/1" in name or "/2" in name
    ]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_same_bytes_from_any_number_of_threads(threads, tmp_path, set_of_bytes, monkeypatch):
    source = find_images(write_folder(tmp_path / "src", set_of_bytes))
    pack_images(source, tmp_path / "one", SMALL, threads=1)
    real = type(source).read

    def late(self, sample_id: int) -> bytes:
        time.sleep(0.003 * (sample_id * 7 % 5))
        return real(self, sample_id)

    monkeypatch.setattr(type(source), "read", late)
    heard = []
    pack_images(source, tmp_path / "many", SMALL, threads, heard.append)
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert sum(heard) == len(source)


# --- killed and taken up again -----------------------------------------------------------------------

LARGE = PackConfig(short_side=250, quality=100, shard_mb=1)  # several shards, some images resized


def pack_in_a_child(source: Path, folder: Path, die_at: int | None = None) -> int:
    """Exit status of a process that packs, and kills itself at the n-th write, fsync, chmod or rename."""

    def child() -> None:
        count = [0]

        def counted(real):
            def call(*args, **kwargs):
                count[0] += 1
                if count[0] == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "chmod"):
            setattr(os, name, counted(getattr(os, name)))
        packing._header = counted(packing._header)  # once for every image and label that is written
        pack_images(find_images(source), folder, LARGE, threads=2)
        (folder / ".steps").write_text(str(count[0]))

    process = get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    return process.exitcode


def test_killed_at_every_step_it_ends_as_if_never_killed(tmp_path, set_of_bytes):
    source = write_folder(tmp_path / "src", set_of_bytes)
    assert pack_in_a_child(source, tmp_path / "whole") == 0
    expected, steps = content(tmp_path / "whole"), int((tmp_path / "whole" / ".steps").read_text())
    assert len(expected) >= 2 * 3 + 2 and steps > 70
    for die_at in range(1, steps + 1, 3 if steps > 90 else 2):
        folder = tmp_path / f"killed-{die_at}"
        assert pack_in_a_child(source, folder, die_at) == -signal.SIGKILL
        read = content(folder)
        assert set(read) <= set(expected)
        if "manifest.json" in read and not json.loads(read["manifest.json"])["complete"]:
            with pytest.raises(ValueError, match="is not packed to its end|no image"):
                find_images(folder)
        assert pack_in_a_child(source, folder) == 0
        assert content(folder) == expected, die_at
        assert [p.name for p in folder.glob(".*") if p.name != ".steps"] == []


def test_killed_again_and_again(tmp_path, set_of_bytes):
    source = write_folder(tmp_path / "src", set_of_bytes)
    assert pack_in_a_child(source, tmp_path / "whole") == 0
    die_at, kills = 20, 0
    while (status := pack_in_a_child(source, tmp_path / "dst", die_at)) != 0:
        assert status == -signal.SIGKILL and kills < 30
        kills += 1
        die_at += 7
    assert kills >= 3 and content(tmp_path / "dst") == content(tmp_path / "whole")


def stop_at_a_kept_shard(done: int) -> None:
    if done > 1:
        raise KeyboardInterrupt


def test_finished_shards_are_kept_and_damaged_ones_made_again(tmp_path, set_of_bytes, monkeypatch):
    source = find_images(write_folder(tmp_path / "src", set_of_bytes))
    pack_images(source, tmp_path / "dst", LARGE, threads=2)
    expected = content(tmp_path / "dst")
    numbers = {name: (tmp_path / "dst" / name).stat().st_ino for name in expected}
    written = []
    real = packing._write_shard
    monkeypatch.setattr(
        packing, "_write_shard", lambda f, n, *rest: (written.append(n), real(f, n, *rest))[1]
    )
    heard = []
    pack_images(source, tmp_path / "dst", LARGE, 2, heard.append)
    assert written == [] and sum(heard) == len(source) and content(tmp_path / "dst") == expected
    for name, spoil in (
        ("shard-000001.tar", lambda p: p.write_bytes(p.read_bytes()[:-700] + b"\1" * 700)),
        ("shard-000000.tar.index", lambda p: p.write_bytes(b"")),
        ("shard-000001.tar", lambda p: p.unlink()),
    ):
        written.clear()
        spoil(tmp_path / "dst" / name)
        pack_images(source, tmp_path / "dst", LARGE, threads=2)
        assert written == [int(name[6:12])] and content(tmp_path / "dst") == expected
    # stopped after the first was made again, those behind it are still known
    (tmp_path / "dst" / "shard-000000.tar").unlink()
    with pytest.raises(KeyboardInterrupt):
        pack_images(source, tmp_path / "dst", LARGE, 2, stop_at_a_kept_shard)
    assert (tmp_path / "dst" / "shard-000000.tar").exists()
    written.clear()
    pack_images(source, tmp_path / "dst", LARGE, threads=2)
    assert written == [] and content(tmp_path / "dst") == expected
    untouched = "shard-000002.tar"
    assert (tmp_path / "dst" / untouched).stat().st_ino == numbers[untouched]


def test_another_source_or_other_options_are_refused_with_the_difference(tmp_path, set_of_bytes):
    source = find_images(write_folder(tmp_path / "src", set_of_bytes))
    pack_images(source, tmp_path / "dst", SMALL, threads=2)
    before = content(tmp_path / "dst")
    with pytest.raises(ValueError, match="options.short_side was 50, is 60; options.quality was 90, is 80"):
        pack_images(source, tmp_path / "dst", PackConfig(short_side=60, quality=80, shard_mb=1), threads=2)
    (tmp_path / "src" / "cat" / "00.jpg").unlink()
    other = find_images(tmp_path / "src")
    with pytest.raises(ValueError, match="source.images was 26, is 25; source.fingerprint was '.*', is '"):
        pack_images(other, tmp_path / "dst", SMALL, threads=2)
    assert content(tmp_path / "dst") == before


def test_folders_that_cannot_be_packed_into(tmp_path):
    source = find_images(write_folder(tmp_path / "src"))
    with pytest.raises(
        ValueError, match="want a folder that is empty or was begun by pack, got .*src with cat"
    ):
        pack_images(source, tmp_path / "src", SMALL, threads=1)
    with (
        packing._alone(write_folder(tmp_path / "dst", {".x": b""})),
        pytest.raises(ValueError, match="another process"),
    ):
        pack_images(source, tmp_path / "dst", SMALL, threads=1)
    bad = find_images(write_folder(tmp_path / "bad", {"a.jpg": b"x", "b.jpg": b""}))
    with pytest.raises(ValueError, match="none of the 2 images can be decoded: no header"):
        pack_images(bad, tmp_path / "none", SMALL, threads=1)


def test_no_thread_is_left(tmp_path, set_of_bytes):
    source = find_images(write_folder(tmp_path / "src", set_of_bytes))

    def interrupted(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_images(source, tmp_path / "dst", SMALL, 4, interrupted)
    for _ in range(100):
        if not any(thread.name.startswith("scan") for thread in threading.enumerate()):
            break
        time.sleep(0.02)
    else:
        pytest.fail("threads of an interrupted pack go on")


# --- one image ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "mode"),
    [
        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "LA"),
        ("PNG", "P"), ("PNG", "1"), ("PNG", "I;16"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("BMP", "RGB"),
        ("TIFF", "RGB"), ("TIFF", "I;16"), ("TIFF", "CMYK"), ("PPM", "RGB"), ("PPM", "L"),
        ("JPEG2000", "RGB"),
    ],
)  # fmt: skip
def test_every_format_stays_what_it_is(fmt, mode):
    picture = Image.open(BytesIO(encode(5, size=(900, 600)))).convert("RGB")
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    file = BytesIO()
    picture.convert(mode).save(file, fmt)
    image = decode(data := file.getvalue(), deep=True)
    out = resized(data, image, 240, 95)
    small = decode(out, deep=True)
    assert small.size == (360, 240) and small.format == fmt
    grown = {"P": "RGB", "1": "L"}
    assert small.mode == grown.get(image.mode, image.mode)
    wanted = image.convert(small.mode) if image.mode in grown else image
    expected = np.asarray(wanted.resize((360, 240), Image.Resampling.BICUBIC), dtype=np.float64)
    scale = 257 if mode == "I;16" else 1
    error = np.abs(np.asarray(small, dtype=np.float64) - expected).mean() / scale
    assert error < (1.5 if fmt in ("JPEG", "WEBP") else 1e-9)


@pytest.mark.parametrize(
    ("size", "wanted"), [((500, 375), (341, 256)), ((375, 500), (256, 341)), ((257, 2570), (256, 2560))]
)
def test_the_short_side_is_what_was_asked(size, wanted):
    data = encode(1, size=size)
    assert decode(resized(data, decode(data), 256, 90)).size == wanted


@pytest.mark.parametrize(("size", "short_side"), [((256, 300), 256), ((200, 900), 256), ((900, 900), None)])
def test_smaller_images_are_stored_byte_for_byte(size, short_side):
    data = encode(1, size=size, comment=b"kept")
    assert resized(data, decode(data), short_side, 90) is data


def test_the_orientation_is_kept_and_nothing_else():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    data = encode(1, size=(90, 60), exif=exif, comment=b"a comment", icc_profile=b"p" * 500)
    out = resized(data, decode(data), 24, 90)
    small = Image.open(BytesIO(out))
    assert small.size == (36, 24)  # as stored: nothing was turned
    assert dict(small.getexif()) == {0x0112: 6}
    assert b"a comment" not in out and b"a maker" not in out and b"ppp" not in out


def test_quality_is_heard():
    data = encode(1, size=(300, 300))
    sizes = [len(resized(data, decode(data), 100, quality)) for quality in (30, 60, 90)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("options", [{"short_side": 0}, {"quality": 0}, {"quality": 101}, {"shard_mb": 0}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="want "):
        PackConfig(**options)


def test_imagenet_packed_looks_as_before(imagenet, tmp_path):
    source = find_images(imagenet)
    pack_images(source, tmp_path / "dst", PackConfig(short_side=256), threads=2)
    images = find_images(tmp_path / "dst")
    assert images.names == source.names
    for i in range(len(images)):
        before, after = decode(source.read(i)), decode(images.read(i))
        assert min(after.size) == min(256, min(before.size))
        small = before.resize(after.size, Image.Resampling.BICUBIC).convert("RGB")
        error = np.asarray(small, np.float64) - np.asarray(after.convert("RGB"), np.float64)
        assert 20 * np.log10(255 / np.sqrt((error**2).mean() + 1e-12)) > 26, images.names[i]
