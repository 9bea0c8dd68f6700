"""The sample set: whole after a kill, a race and a loss; its classes told by shape and not by color."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmim.data.sources import sample, scenes
from fastmim.data.sources.index import cache_folder
from fastmim.data.sources.sample import sample_set
from fastmim.data.sources.scenes import CLASSES, COUNTS, SEED, VERSION, render

SMALL = {"train": 240, "test": 60}
# no `if __name__ == "__main__"`: a user's script need not have one
SCRIPT = "from small_sample import sample_set\nprint(sample_set())\n"


def start(folder: Path, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py")],
        env={**os.environ, "FASTMIM_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(true, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def quiet(folder: Path) -> bool:
    before = sum(1 for _ in folder.rglob("*"))
    time.sleep(0.3)
    return before == sum(1 for _ in folder.rglob("*"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tenth of the set, made the hard way: one maker is killed, a broken set lies there, three ask."""
    folder = tmp_path_factory.mktemp("sample")
    source, counts = Path(scenes.__file__).read_text(), f"COUNTS = {json.dumps(COUNTS)}"
    assert source.count(counts) == 1
    (folder / "scenes.py").write_text(source.replace(counts, f"COUNTS = {json.dumps(SMALL)}"))
    source = Path(sample.__file__).read_text().replace("from fastmim.data.sources import", "import")
    (folder / "small_sample.py").write_text(source.replace("from fastmim.data.sources.scenes", "from scenes"))
    (folder / "script.py").write_text(SCRIPT)

    cache = folder / "cache"
    killed = start(folder, cache)
    until(lambda: any(cache.glob(f".{VERSION}-*/new/train/*/*.jpg")))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (cache / VERSION).exists()
    (orphan,) = cache.glob(f".{VERSION}-*")
    until(lambda: quiet(orphan))  # its children have stopped too
    assert len([*orphan.glob("new/*/*/*.jpg")]) < sum(SMALL.values())
    os.utime(orphan, (0, 0))  # long ago: the next maker may clear it away

    broken = cache / VERSION
    for split in SMALL:
        for name in CLASSES:
            (broken / split / name).mkdir(parents=True)
    (broken / "train" / "arrow" / "00000.jpg").write_bytes(b"half")
    (broken / "manifest.json").write_text(json.dumps({**sample._manifest(), "counts": SMALL}))

    asking = [start(folder, cache) for _ in range(3)]
    answers = [process.communicate(timeout=1200) for process in asking]
    assert [process.returncode for process in asking] == [0, 0, 0], answers
    assert [out.strip() for out, _ in answers] == [str(broken)] * 3
    assert sorted(err.count("making the embedded sample set (240 images)") for _, err in answers) == [0, 0, 1]
    assert {p.name for p in cache.iterdir()} == {VERSION, f".{VERSION}.lock"}  # nothing is left over
    return broken


@pytest.fixture
def small(monkeypatch) -> None:
    """This process, too, knows the small set."""
    monkeypatch.setattr(sample, "COUNTS", SMALL)


def test_it_is_whole_and_of_real_jpeg_files(made):
    sizes, prints = set(), set()
    for split, count in SMALL.items():
        assert sorted(p.name for p in (made / split).iterdir()) == list(CLASSES)
        files = sorted((made / split).glob("*/*.jpg"))
        assert len(files) == count
        prints |= {hashlib.sha256(p.read_bytes()).digest() for p in files}
        for path in files[::6]:
            with Image.open(path) as image:
                image.load()
                assert image.format == "JPEG"
                assert image.mode == "RGB"
                sizes.add(image.size)
    assert len(prints) == sum(SMALL.values())  # no image twice, and no training image in the test
    assert len(sizes) > 20
    assert min(min(s) for s in sizes) >= 96
    assert max(max(s) for s in sizes) <= 160


def test_equal_bytes_from_an_equal_seed(made):
    for split, index in [("train", 0), ("train", 123), ("test", 0), ("test", 59)]:
        path = made / split / CLASSES[index % 12] / f"{index:05d}.jpg"
        quality = int(np.random.default_rng((index, SEED)).integers(80, 96))
        again = io.BytesIO()
        render(split, index).save(again, "JPEG", quality=quality)
        assert again.getvalue() == path.read_bytes()


def test_a_whole_set_costs_milliseconds(made, small):
    start = time.perf_counter()
    assert sample_set(made.parent) == made
    assert time.perf_counter() - start < 0.1  # a hundred times less than making it


@pytest.mark.parametrize(
    "harm", ["a file gone", "a file too many", "another seed", "not json", "no manifest"]
)
def test_a_set_that_was_tampered_with_is_made_again(harm, made, small, tmp_path, monkeypatch):
    copy = tmp_path / VERSION
    shutil.copytree(made, copy, copy_function=os.link)
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    monkeypatch.setattr(sample, "_make", lambda root, made: made.joinpath("made again").touch())
    sample_set(tmp_path)
    assert not (copy / "made again").exists()

    if harm == "a file gone":
        next(copy.glob("test/tree/*.jpg")).unlink()
    elif harm == "a file too many":
        (copy / "train" / "mug" / "x.jpg").touch()
    else:
        manifest.unlink()
        if harm != "no manifest":
            manifest.write_text(text.replace(str(SEED), "1") if harm == "another seed" else text[:-9])
    sample_set(tmp_path)
    assert (copy / "made again").exists()


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("FASTMIM_CACHE")
    assert cache_folder() == tmp_path / "b" / "fastmim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "c" / ".cache" / "fastmim"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"file/cache.*FASTMIM_CACHE"):
        sample_set()


def test_a_child_that_fails_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "__file__", str(tmp_path / "absent.py"))
    with pytest.raises(OSError, match=r"absent\.py"):
        sample_set(tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f".{VERSION}.lock"]


# --- the whole set, and what tells a class -------------------------------------------------------


def load(made: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """`[M, 96, 96, 3]` fp32 0..1 and `[M]` classes."""
    files = sorted((made / split).glob("*/*.jpg"))
    images = [
        np.asarray(Image.open(p).convert("RGB").resize((96, 96)), dtype=np.float32) / 255 for p in files
    ]
    return np.stack(images), np.array([CLASSES.index(p.parent.name) for p in files])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    made = sample_set(tmp_path_factory.mktemp("whole"))
    images = {split: load(made, split) for split in COUNTS}
    assert {split: len(y) for split, (_, y) in images.items()} == {"train": 2400, "test": 600}
    return images


def ridge_accuracy(
    x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, ridge: float
) -> float:
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (np.concatenate([(a - mean) / std, np.ones((len(a), 1))], 1) for a in (x, x_test))
    weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ np.eye(len(CLASSES))[y])
    return float(((x_test @ weights).argmax(1) == y_test).mean())


def nearest_mean_accuracy(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    means = np.stack([x[y == k].mean(0) for k in range(len(CLASSES))])
    return float((((x_test[:, None] - means) ** 2).sum(-1).argmin(1) == y_test).mean())


def gradient_histograms(x: np.ndarray) -> np.ndarray:
    """HOG: 8 x 8 cells, 9 unsigned directions, each image's cells normalized. `[M, H, W, 3] -> [M, 576]`."""
    gray = x.mean(-1)
    dy, dx = np.gradient(gray, axis=(1, 2))
    bins = (np.arctan2(dy, dx) % np.pi * (9 / np.pi)).astype(int) % 9
    length = np.sqrt(np.hypot(dx, dy))
    votes = np.stack([np.where(bins == k, length, 0) for k in range(9)], -1)
    cells = votes.reshape(len(x), 8, 12, 8, 12, 9).sum((2, 4))
    return (cells / (np.linalg.norm(cells, axis=-1, keepdims=True) + 0.5)).reshape(len(x), -1)


@pytest.mark.long  # the whole set is drawn for it
def test_mean_color_does_not_tell_the_class(images):
    x, y, x_test, y_test = (f for s in COUNTS for f in (images[s][0].mean((1, 2)), images[s][1]))
    assert nearest_mean_accuracy(x, y, x_test, y_test) < 0.125  # chance is 0.083
    assert (
        ridge_accuracy(x, y, x_test, y_test, ridge=1.0) < 0.125
    )  # measured: 0.11; a tint of 5 % by class: 0.135


@pytest.mark.long
def test_shape_tells_the_class(images):
    x, y, x_test, y_test = (f for s in COUNTS for f in (gradient_histograms(images[s][0]), images[s][1]))
    assert ridge_accuracy(x, y, x_test, y_test, ridge=3000.0) > 0.25  # three times chance; measured: 0.32
