"""One set of JPEGs through every kind of source: the same ids, names, labels and bytes; and what is none."""

import gzip
import hashlib
import itertools
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastmim.data import find_images
from fastmim.data.sources import parquet, tar
from fastmim.data.sources.memory import MemoryImages
from fastmim.data.sources.source import _braces

from .conftest import assert_same, encode, take
from .shards import CLASSES, LABELS, PICTURES, with_labels, write_folder, write_parquet, write_tar

NAMES, ITEMS = list(PICTURES), list(PICTURES.items())
HALVES = dict(ITEMS[:4]), dict(ITEMS[4:])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


def build(kind: str, root: Path) -> Path:
    """PICTURES as a set of some kind: where it is."""
    if kind in ("parquet", "parquets", "plain parquet"):
        pytest.importorskip("pyarrow")
    if kind == "folder":
        return write_folder(root / "set")
    if kind == "list":
        write_folder(root / "far" / "away")
        lines = [f"away/{name}\t{label}\n" for name, label in zip(NAMES, LABELS, strict=True)]
        (root / "far" / "all.txt").write_text("".join(lines))
        return root / "far" / "all.txt"
    if kind == "tar":
        return write_tar(root / "set.tar", ITEMS)
    if kind == "webdataset":
        write_tar(root / "s" / "s-00.tar", with_labels(LABELS[:4], HALVES[0]))
        write_tar(root / "s" / "s-01.tar", with_labels(LABELS[4:], HALVES[1]))
        return root / "s"
    if kind == "braces":
        return build("webdataset", root) / "s-{00..01}.tar"
    if kind == "glob":
        return build("webdataset", root) / "s-*.tar"
    if kind == "parquet":
        return write_parquet(root / "set.parquet", PICTURES, LABELS, row_group_size=3)
    for i, half in enumerate(HALVES):
        labels = LABELS[4 * i : 4 * i + len(half)]
        write_parquet(root / "hub" / f"train-0000{i}-of-00002.parquet", half, labels, row_group_size=2)
    return root / "hub"


@pytest.mark.parametrize(
    "kind", ["folder", "list", "tar", "webdataset", "braces", "glob", "parquet", "parquets"]
)
def test_the_same_set_through_every_source(kind, tmp_path):
    images = find_images(build(kind, tmp_path))
    assert len(images) == len(NAMES)
    assert [name.removeprefix("away/") for name in images.names] == NAMES
    assert [images.read(i) for i in range(len(images))] == list(PICTURES.values())
    assert images.labels.tolist() == LABELS and images.labels.dtype == np.int32
    numbered = kind in ("list", "webdataset", "braces", "glob")  # only numbers are written there
    assert images.classes == (("0", "1", "2") if numbered else CLASSES)
    assert images.fingerprint == find_images(tmp_path / build(kind, tmp_path)).fingerprint


@pytest.mark.parametrize("kind", ["tar", "parquets"])
def test_the_loader_shows_the_same_pictures(kind, tmp_path, open_loader):
    expected = take(open_loader(find_images(build("folder", tmp_path)), "pillow", batch=3), 6)
    got = take(open_loader(find_images(build(kind, tmp_path / "other")), "pillow", batch=3), 6)
    assert_same(got, expected)


def test_fingerprints_differ_with_names_sizes_and_labels(tmp_path):
    def of(path, labels, files=PICTURES):
        return find_images(write_tar(tmp_path / path, with_labels(labels, files))).fingerprint

    longer = PICTURES | {"dog/1.jpg": PICTURES["dog/1.jpg"] + b"\0"}
    renamed = {name.replace("eel/0", "eel/00"): data for name, data in ITEMS}
    first = of("a.tar", LABELS)
    assert first == of("b.tar", LABELS)
    assert (
        len({first, of("c.tar", LABELS[::-1]), of("d.tar", LABELS, longer), of("e.tar", LABELS, renamed)})
        == 4
    )


def test_fingerprints_of_files(tmp_path):
    root = write_folder(tmp_path / "set")
    # of names and sizes alone: what checkpoints hold
    lines = "".join(f"{name}\0{len(data)}\n" for name, data in ITEMS)
    assert find_images(root).fingerprint == hashlib.sha256(lines.encode()).hexdigest()
    prints = set()
    for labels in (["", ""], ["\t0", "\t1"], ["\t1", "\t0"], ["\ta", "\tb"]):
        (root / "l.txt").write_text(f"cat/0.jpg{labels[0]}\ncat/1.jpg{labels[1]}\n")
        prints.add(find_images(root / "l.txt").fingerprint)
    assert len(prints) == 4


# --- lists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "labels", "classes"),
    [
        (["a.jpg", "b.jpg"], None, ()),
        (["a.jpg\t2", "b.jpg\t0"], [2, 0], ("0", "1", "2")),
        (["a.jpg\twolf", "", "b.jpg\tfox", "a.jpg\twolf"], [1, 0, 1], ("fox", "wolf")),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists(lines, labels, classes, end, tmp_path):
    write_folder(tmp_path, {"a.jpg": b"A", "b.jpg": b"B"})
    (tmp_path / "l.tsv").write_bytes(end.join(lines).encode())
    images = find_images(tmp_path / "l.tsv")
    assert images.classes == classes
    assert (images.labels if labels is None else images.labels.tolist()) == labels
    assert [images.read(i) for i in range(2)] == [b"A", b"B"]


def test_a_list_of_absolute_paths_and_of_vanished_ones(tmp_path):
    write_folder(tmp_path, {"a.jpg": b"A"})
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "x.txt").write_text(f"{tmp_path / 'a.jpg'}\n../a.jpg\nnowhere.jpg\n")
    images = find_images(tmp_path / "l" / "x.txt")
    assert images.read(0) == images.read(1) == b"A"
    with pytest.raises(FileNotFoundError):
        images.read(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no image in .*l.txt: want a path per line"),
        ("a.jpg\t1\nb.jpg\n", "line 2: want a path, a tab and a label as in line 1, got .'b.jpg'"),
        ("a.jpg\n\na.jpg\t1\n", "line 3: want a path alone as in line 1"),
        ("a.jpg\t1\t2\n", "line 1: want a path, a tab and a label"),
        ("a.jpg\t-1\n", "want labels from 0 to 1048575, got -1"),
        ("a.jpg\t99999999999999999999\n", "want labels from 0"),
        (
            "b.jpg\na.jpg\n",
            "the first image of .*l.txt is not there: .*b.jpg; paths are relative to the list",
        ),
    ],
)
def test_bad_lists_are_one_clear_line(text, message, tmp_path):
    write_folder(tmp_path, {"a.jpg": b"A"})
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        find_images(tmp_path / "l.txt")
    assert "\n" not in str(error.value)


# --- tar ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "names", "labels", "classes"),
    [
        (["a.jpg", "b.jpg"], ["a.jpg", "b.jpg"], None, ()),
        (["./y/a.jpg", "./x/b.jpg"], ["y/a.jpg", "x/b.jpg"], [1, 0], ("x", "y")),
        # sorted by tar, the label comes first
        (["a.cls=3", "a.jpg", "b.cls=0", "b.png"], ["a.jpg", "b.png"], [3, 0], ("0", "1", "2", "3")),
        (["a.jpg", "a.json", "a.cls=fox", "b.jpg", "b.cls=bat"], ["a.jpg", "b.jpg"], [1, 0], ("bat", "fox")),
        # the label belongs to the key, whatever the folder says
        (["x/a.jpg", "x/a.cls=1", "y/a.jpg", "y/a.cls=0"], ["x/a.jpg", "y/a.jpg"], [1, 0], ("0", "1")),
        # one label for two images of a key; two for two
        (["a.jpg", "a.seg.png", "a.cls=1"], ["a.jpg", "a.seg.png"], [1, 1], ("0", "1")),
        (["a.1.jpg", "a.1.cls=0", "a.2.jpg", "a.2.cls=1"], ["a.1.jpg", "a.2.jpg"], [0, 1], ("0", "1")),
        # an image without a label: folders decide
        (["x/a.jpg", "x/a.cls=1", "y/b.jpg"], ["x/a.jpg", "y/b.jpg"], [0, 1], ("x", "y")),
        (["._a.jpg", ".x/b.jpg", "notes.txt", "a.jpg"], ["a.jpg"], None, ()),
    ],
)
def test_members_of_tars(members, names, labels, classes, tmp_path):
    parts = [member.partition("=") for member in members]
    path = write_tar(tmp_path / "x.tar", [(name, (text or name).encode()) for name, _, text in parts])
    images = find_images(path)
    assert images.names == names and images.classes == classes
    assert (images.labels if labels is None else images.labels.tolist()) == labels
    assert images.read(len(names) - 1).decode().endswith(names[-1])


@pytest.mark.parametrize("form", [0, 1, 2], ids=["ustar", "gnu", "pax"])
def test_long_and_strange_names_in_every_format(form, tmp_path):
    names = ["é" * 40 + ".jpg", f"{'d' * 90}/{'f' * 90}.jpg"]
    names += [] if form == 0 else ["x" * 300 + ".jpg", "snow \N{SNOWMAN} \udcff.jpg"]
    images = find_images(
        write_tar(tmp_path / "x.tar", [(n, n[-7:].encode(errors="replace")) for n in names], format=form)
    )
    assert images.names == names
    assert [images.read(i) for i in range(len(names))] == [n[-7:].encode(errors="replace") for n in names]


def test_names_that_shards_share_get_the_shards_name(tmp_path):
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", [("x/0.jpg", shard.encode()), ("x/0.cls", b"0")])
    images = find_images(tmp_path)
    assert images.names == ["a.tar/x/0.jpg", "b.tar/x/0.jpg"]
    assert images.read(1) == b"b" and images.labels.tolist() == [0, 0]


def test_a_shard_that_changed_gives_no_wrong_bytes(tmp_path):
    path = write_tar(tmp_path / "x.tar", ITEMS)
    images = find_images(path)
    write_tar(path, [*ITEMS[1:], ITEMS[0]])
    for i in range(len(images)):
        with pytest.raises(OSError, match="x.tar changed since it was indexed"):
            images.read(i)
    path.write_bytes(b"")
    with pytest.raises(OSError, match="changed"):
        images.read(0)


def test_many_threads_share_few_open_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "OPEN_SHARDS", 2)
    for i in range(6):
        write_tar(tmp_path / f"{i}.tar", [(f"{i}.jpg", bytes([i]) * 100)])
    images = find_images(tmp_path)
    start = threading.Barrier(8)
    open_before = len(os.listdir("/proc/self/fd"))

    def read(thread: int) -> bool:
        start.wait()
        return all(images.read((k + thread) % 6) == bytes([(k + thread) % 6]) * 100 for k in range(600))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert len(os.listdir("/proc/self/fd")) <= open_before + 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "cannot index .*x.tar as a tar: .*empty"),
        (lambda data: b"no tar at all" * 1000, "cannot index .*x.tar as a tar"),
        (lambda data: data[: len(data) // 2], "cannot index .*x.tar as a tar: .*(truncated|unexpected end)"),
        (lambda data: data[:512], "cannot index .*x.tar as a tar"),
        (gzip.compress, "cannot index .*x.tar as a tar: .*; want an uncompressed tar"),
        # whole members, then garbage or nothing where the archive ought to end
        (lambda data: data[: -(-len(data.rstrip(b"\0")) // 512) * 512], "no end of archive at byte"),
        (lambda data: data[: data.index(b"dog/0.jpg")] + b"\x55" * 5000, "no end of archive at byte"),
    ],
)
def test_a_shard_that_cannot_be_indexed(spoil, message, tmp_path):
    path = write_tar(tmp_path / "x.tar", ITEMS)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        find_images(path)
    assert "\n" not in str(error.value)


# --- Parquet -----------------------------------------------------------------------------------------


def table(path: Path, columns: dict, metadata: dict | None = None, **options) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)
    return path


@pytest.mark.parametrize(
    ("columns", "labels", "classes"),
    [
        ({"whatever": [b"A", b"B"]}, None, ()),
        ({"img": [b"A", b"B"], "thumb": [b"a", b"b"], "label": [1, 0]}, [1, 0], ("0", "1")),
        ({"image": [{"bytes": b"A"}, {"bytes": b"B"}], "cls": ["wolf", "fox"]}, [1, 0], ("fox", "wolf")),
        ({"image": [b"A", b"B"], "label": [0, None]}, None, ()),
        ({"image": [b"A", b"B"], "label": [-1, -1]}, None, ()),
    ],
)
def test_other_layouts_of_parquet(columns, labels, classes, tmp_path):
    images = find_images(table(tmp_path / "t.parquet", columns))
    assert images.names == ["t.parquet/000000", "t.parquet/000001"]
    assert [images.read(0), images.read(1)] == [b"A", b"B"]
    assert images.classes == classes
    assert (images.labels if labels is None else images.labels.tolist()) == labels


def test_a_row_without_bytes_is_a_bad_sample(tmp_path):
    pytest.importorskip("pyarrow")
    images = find_images(write_parquet(tmp_path / "t.parquet", {"a.jpg": b"A", "b.jpg": None}))
    with pytest.raises(OSError, match="row 1 has no bytes"):
        images.read(1)


def test_row_groups_are_read_once_and_few_are_kept(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    files = {f"{i}.jpg": os.urandom(1000) for i in range(40)}
    images = find_images(write_parquet(tmp_path / "t.parquet", files, row_group_size=5))
    reads = []
    real = parquet.ParquetImages._read_group
    monkeypatch.setattr(
        parquet.ParquetImages, "_read_group", lambda self, group: reads.append(group) or real(self, group)
    )
    order = np.random.default_rng(0).permutation(40).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(images.read, order)) == [files[f"{i}.jpg"] for i in order]
    assert sorted(reads) == list(range(8))
    monkeypatch.setattr(parquet, "CACHED_BYTES", 12_000)  # two groups
    images = find_images(tmp_path / "t.parquet")
    for i in itertools.chain(range(0, 40, 5), range(0, 40, 5)):
        assert images.read(i) == files[f"{i}.jpg"]
    assert len(images._groups) == 2 and len(reads) == 8 + 16


def test_a_parquet_that_changed_or_broke_is_an_oserror(tmp_path):
    pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "t.parquet", PICTURES, row_group_size=4)
    images = find_images(path)
    write_parquet(path, HALVES[0], row_group_size=3)
    with pytest.raises(OSError, match="changed since it was indexed"):
        images.read(0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match="row group 1"):
        images.read(5)
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        images.read(5)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": ["a"], "label": [1]},
            "want one image column .*: there is none among text: string, label: int64",
        ),
        ({"a": [b"x"], "b": [b"y"]}, r"several may be \(a, b\) among a: binary, b: binary"),
        ({"image": [[1, 2, 3]]}, "there is none among image: list"),
    ],
)
def test_a_parquet_without_one_image_column(columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        find_images(table(tmp_path / "t.parquet", columns))


def test_splits_of_a_hub_are_not_mixed(tmp_path):
    pytest.importorskip("pyarrow")
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", {f"{split}.jpg": b"A"})
    with pytest.raises(
        ValueError, match=r"holds the splits test, train: name one, as .*train-\*.parquet, or several"
    ):
        find_images(tmp_path)
    assert find_images(tmp_path / "train-*.parquet").names == ["train.jpg"]


# --- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7, 9, 3), (5, 7, 9, 1), (5, 7, 9)])
def test_an_array_reaches_the_loader_pixel_by_pixel(shape, open_loader, decoder):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = MemoryImages(pixels, labels=[0, 1, 1, 0, 2])
    assert images.labels.tolist() == [0, 1, 1, 0, 2] and images.classes == ("0", "1", "2")
    from fastmim.views import Crop

    channels = 3 if shape[-1] == 3 else 1
    crops = [Crop(size=(7, 9), scale=(1.0, 1.0), ratio=(9 / 7, 9 / 7), flip=0.0)]
    for batch in take(open_loader(images, decoder, batch=5, crops=crops, channels=channels), 1):
        got = batch.crops[0].reshape(5, 7, 9, -1).numpy()
        assert np.array_equal(got, pixels.reshape(5, 7, 9, -1)[batch.ids_B.numpy()])


def test_a_list_of_bytes_in_memory():
    images = MemoryImages(list(PICTURES.values()), LABELS, CLASSES)
    assert [images.read(i) for i in range(len(images))] == list(PICTURES.values())
    assert images.classes == CLASSES and len(images.names) == len(NAMES)
    other = MemoryImages([*list(PICTURES.values())[:-1], encode(77)], LABELS, CLASSES)
    assert images.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([], None, "at least one image"),
        (["a.jpg"], None, "as bytes"),
        (np.zeros((2, 3, 4, 3)), None, r"got float64 \[2, 3, 4, 3\]"),
        (np.zeros((2, 3, 4, 2), np.uint8), None, r"want uint8 \[N, H, W, 3\]"),
        ([b"x"], [0, 1], "want 1 labels"),
        ([b"x"], [-1], "want 1 labels"),
        ([b"x"], [3], "numbers of 3 classes"),
    ],
)
def test_what_memory_refuses(images, labels, message):
    with pytest.raises(ValueError, match=message):
        MemoryImages(images, labels, CLASSES)


# --- what a path is ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "plain"),
    [
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("s-{008..010}.tar", ["s-008.tar", "s-009.tar", "s-010.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("plain{x}.tar", ["plain{x}.tar"]),
    ],
)
def test_braces_are_a_shells(pattern, plain):
    assert _braces(pattern) == plain


@pytest.mark.parametrize(
    ("files", "ask", "message"),
    [
        ({"a.zip": b"PK\3\4"}, "a.zip", r"want a folder of images, .*, got .*a.zip: .*starts with b'PK"),
        ({"a.tar.gz": b"x"}, "a.tar.gz", "want an uncompressed tar"),
        ({"a.tar": b"", "b.parquet": b""}, ".", "want shards of one kind, got .parquet and .tar files"),
        ({"a.tar": b"", "b.jpg": b""}, ".", r"holds 1 shards, and beside them b.jpg: name .* \*?.*\*.tar"),
        ({"a.tar": b"", "n01/b.jpg": b""}, ".", "holds 1 shards, and beside them n01"),
        ({"a.txt": b"x", "sub/b.md": b"y"}, ".", "no image in "),
        ({"s-0.tar": b"", "s-2.tar": b""}, "s-{0..2}.tar", "want every shard of .*, got none at .*s-1.tar"),
        ({"a.jpg": b"x"}, "*.tar", "it does not exist"),
        ({"a.jpg": b"x"}, "*.jpg", "it is a file of another format"),
    ],
)
def test_what_is_no_source_is_one_clear_line(files, ask, message, tmp_path):
    write_folder(tmp_path, files)
    with pytest.raises(ValueError, match=message) as error:
        find_images(tmp_path / ask)
    assert "\n" not in str(error.value)


def test_shards_without_images_and_with_one_twice(tmp_path):
    with pytest.raises(ValueError, match=r"no image in the tar shards of .* \(1\): looked for .jpg"):
        find_images(write_tar(tmp_path / "a.tar", [("a.txt", b"x")]))
    with pytest.raises(ValueError, match="b.tar: it holds x.jpg twice"):
        find_images(write_tar(tmp_path / "b.tar", [("x.jpg", b"x"), ("y.jpg", b"y"), ("x.jpg", b"z")]))


@pytest.mark.parametrize("what", ["folder", "x.tar", "x.parquet", "x.txt"])
def test_what_may_not_be_read_is_one_clear_line(what):
    if what == "x.parquet":
        pytest.importorskip("pyarrow.parquet")
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        path = Path(root) / what
        path.mkdir() if what == "folder" else path.write_bytes(b"x")
        path.chmod(0)
        with nobody(), pytest.raises(ValueError, match=f"cannot read .*{what}: Permission denied"):
            find_images(path)


class nobody:
    """Root may read everything: be somebody else meanwhile."""

    def __enter__(self) -> None:
        self.user = os.geteuid()
        if self.user == 0:
            os.seteuid(65534)

    def __exit__(self, *exc: object) -> None:
        os.seteuid(self.user)
