"""The kept index: in place of a walk, but never when something changed or it is not to be trusted."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastmim.data import find_images
from fastmim.data.sources import folder, index, source, tar
from fastmim.data.sources.images import labels_by_folder
from fastmim.data.sources.index import Index, Names, Stamps, index_file, load, pack, save, unpack

from .shards import LABELS, PICTURES, with_labels, write_folder, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """An empty cache; sets are kept however small and however fresh."""
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(folder, "WORTH_KEEPING", 1)
    monkeypatch.setattr(index, "SETTLED_NS", 0)
    return Path(os.environ["FASTMIM_CACHE"]) / "index"


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """What was indexed anew."""
    calls: list[str] = []
    for module, name in ((source, "walk"), (folder, "_parse"), (tar, "index_shard")):
        real = getattr(module, name)

        def noted(path, *more, real=real):
            calls.append(Path(path).name)
            return real(path, *more)

        monkeypatch.setattr(module, name, noted)
    return calls


def tick() -> None:
    time.sleep(0.02)  # ctimes are of the last tick of the kernel, 1 to 10 ms


def build(kind: str, root: Path) -> Path:
    if kind == "folder":
        return write_folder(root / "set")
    if kind == "list":
        write_folder(root / "set")
        lines = [f"{name}\t{label}\n" for name, label in zip(PICTURES, LABELS, strict=True)]
        (root / "set" / "all.txt").write_text("".join(lines))
        return root / "set" / "all.txt"
    items = list(PICTURES.items())
    write_tar(root / "set" / "0.tar", with_labels(LABELS[:4], dict(items[:4])))
    write_tar(root / "set" / "1.tar", with_labels(LABELS[4:], dict(items[4:])))
    return root / "set"


@pytest.mark.parametrize("kind", ["folder", "list", "tar"])
def test_the_second_time_nothing_is_walked(kind, tmp_path, made, cache):
    path = build(kind, tmp_path)
    tick()
    first = find_images(path)
    assert made and len(list(cache.iterdir())) == 1
    made.clear()
    second = find_images(path)
    assert made == []
    assert second.names == first.names == list(first.names) and len(second) == len(PICTURES)
    assert second.labels.tolist() == first.labels.tolist() == LABELS and second.classes == first.classes
    assert second.fingerprint == first.fingerprint
    assert [second.read(i) for i in range(len(second))] == list(PICTURES.values())
    assert find_images(path, refresh=True).names == first.names and made
    assert second.labels.flags.writeable  # torch.from_numpy wants it


CHANGES = {
    "a file more": lambda root: (root / "cat" / "9.jpg").write_bytes(b"x"),
    "a file less": lambda root: (root / "dog" / "0.jpg").unlink(),
    "a file renamed": lambda root: (root / "eel" / "0.jpg").rename(root / "eel" / "00.jpg"),
    "a file moved": lambda root: (root / "eel" / "0.jpg").rename(root / "cat" / "0.5.jpg"),
    "a folder more": lambda root: write_folder(root, {"fox/deep/0.jpg": b"x"}),
    "a folder renamed": lambda root: (root / "cat").rename(root / "bat"),
    "a file more in an old folder": lambda root: old(write_folder(root, {"cat/9.jpg": b"x"}) / "cat"),
}


def old(path: Path) -> None:
    os.utime(path, ns=(10**18, 10**18))  # as tar and rsync set it back


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_noticed(change, tmp_path, made):
    root = build("folder", tmp_path)
    old(root / "cat")
    tick()
    before = find_images(root)
    made.clear()
    tick()
    CHANGES[change](root)
    after = find_images(root)
    assert made == ["set"]
    assert after.names == sorted(p.relative_to(root).as_posix() for p in root.rglob("*.jpg")) != before.names


def test_what_changes_no_name_needs_no_walk_but_shows_in_the_fingerprint(tmp_path, made):
    root = build("folder", tmp_path)
    tick()
    first = find_images(root).fingerprint
    made.clear()
    (root / "cat" / "0.jpg").write_bytes(b"another size")
    assert find_images(root).fingerprint != first and made == []


def test_a_changed_shard_and_a_new_one_are_noticed(tmp_path, made):
    root = build("tar", tmp_path)
    tick()
    find_images(root / "{0..1}.tar"), find_images(root)
    made.clear()
    tick()
    write_tar(root / "1.tar", with_labels(LABELS[4:][::-1], dict(list(PICTURES.items())[:3:-1])))
    assert find_images(root).names == [*list(PICTURES)[:4], *list(PICTURES)[:3:-1]]
    assert made == ["0.tar", "1.tar"]
    tick()
    write_tar(root / "2.tar", [("new.jpg", b"x"), ("new.cls", b"1")])
    assert len(find_images(root)) == len(PICTURES) + 1
    (root / "0.tar").unlink()
    assert len(find_images(root)) == len(PICTURES) - 3


def test_a_changed_list_is_noticed(tmp_path, made):
    path = build("list", tmp_path)
    tick()
    find_images(path)
    tick()
    path.write_text(path.read_text().replace("\t0", "\t2"))  # as long as before
    old(path)
    assert find_images(path).labels.tolist() == [2, 2, *LABELS[2:]] and made == ["all.txt"] * 2


def test_what_changed_just_now_may_change_again_and_is_not_kept(tmp_path, made, cache, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_NS", 3600 * 10**9)
    root = build("folder", tmp_path)
    for _ in range(2):
        find_images(root)
    assert made == ["set"] * 2 and not cache.exists()


def test_a_small_folder_is_walked(tmp_path, made, cache, monkeypatch):
    monkeypatch.setattr(folder, "WORTH_KEEPING", len(PICTURES) + 1)
    root = build("folder", tmp_path)
    tick()
    find_images(root), find_images(root)
    assert made == ["set"] * 2 and not cache.exists()


def test_what_killed_writers_left_is_removed(tmp_path, cache):
    root = build("folder", tmp_path)
    write_folder(cache, {".x.index.old": b"half", ".x.index.new": b"half"})
    os.utime(cache / ".x.index.old", (0, 0))
    tick()
    find_images(root)
    assert sorted(p.name for p in cache.iterdir()) == [".x.index.new", index_file(root).name]


# --- files that are not to be trusted ----------------------------------------------------------------

SPOILS = {
    "empty": lambda data: b"",
    "another program's": lambda data: b"PK\3\4" + data,
    "of another version": lambda data: data.replace(b"fastmim index 1", b"fastmim index 2", 1),
    "half": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "one more": lambda data: data + b"\0",
    "a bit of a name": lambda data: flip(data, data.index(b"cat/0.jpg")),
    "a bit of the header": lambda data: flip(data, 100),
    "a bit of the checksum": lambda data: flip(data, 20),
    "a bit of the last array": lambda data: flip(data, len(data) - 8),
    "of another path": lambda data: resealed(data, path="/elsewhere"),
    "of another kind": lambda data: resealed(data, kind="tar"),
    "of other rules": lambda data: resealed(data, rules=[0, ".jpg"]),
}


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def resealed(data: bytes, **changed: object) -> bytes:
    header, arrays = unpack(data)
    return pack(header | changed, arrays)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_broken_or_foreign_index_is_made_anew(spoil, tmp_path, made, cache):
    root = build("folder", tmp_path)
    tick()
    find_images(root)
    [file] = cache.iterdir()
    good = file.read_bytes()
    assert SPOILS[spoil](good) != good
    file.write_bytes(SPOILS[spoil](good))
    made.clear()
    assert find_images(root).names == list(PICTURES)
    assert made == ["set"] and file.read_bytes() == good


def test_where_nothing_can_be_kept_it_is_said_once_and_works(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path / "file"))
    root = build("folder", tmp_path)
    tick()
    with pytest.warns(UserWarning, match="cannot keep the index of .*: Not a directory; .*FASTMIM_CACHE"):
        assert len(find_images(root)) == len(PICTURES)


def test_ranks_that_write_at_once(tmp_path, cache):
    root = build("folder", tmp_path)
    tick()

    def write_and_read(rank: int) -> bool:
        images = find_images(root, refresh=bool(rank % 2))
        return images.names == list(PICTURES) and images.labels.tolist() == LABELS

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(200)))
    assert len(list(cache.iterdir())) == 1  # nothing half written is left


def test_the_index_beside_a_shard_is_used_only_if_it_is_of_that_shard(tmp_path, made):
    path = write_tar(tmp_path / "x.tar", PICTURES.items())
    names, labels, arrays, _ = tar.index_shard(path)
    made.clear()
    beside = path.with_name("x.tar.index")
    beside.write_bytes(tar.write_shard_index(names, labels, arrays, path.stat().st_size))
    images = find_images(path)
    assert made == [] and [images.read(i) for i in range(len(images))] == list(PICTURES.values())
    for content in (
        flip(beside.read_bytes(), 300),
        tar.write_shard_index(names[:3], labels, arrays, 512),
        b"",
    ):
        beside.write_bytes(content)
        assert find_images(path, refresh=True).names == list(PICTURES) and made.pop() == "x.tar"


# --- names and size ----------------------------------------------------------------------------------


def test_names_are_a_sequence_of_strings():
    names = Names.of(given := ["b", "", "é\N{SNOWMAN}", "\udcff.jpg", "a" * 1000])
    assert names == given and list(names) == given and len(names) == 5 and given == names
    assert (
        [names[i] for i in range(-5, 5)] == given * 2
        and names[1:4] == given[1:4]
        and names[::-2] == given[::-2]
    )
    assert (
        "é\N{SNOWMAN}" in names
        and names.index("\udcff.jpg") == 3
        and names != given[:4]
        and names != Names.of("ab")
    )
    for i in (5, -6):
        with pytest.raises(IndexError):
            names[i]
    assert Names.of([]) == []


def test_imagenets_1281167_names_load_in_a_second(tmp_path):
    """Without the files: an index of so many names, and the 1,001 folders that are asked."""
    root = tmp_path / "train"
    classes = [f"n{10_000_000 + 7 * c}" for c in range(1000)]
    for name in classes:
        (root / name).mkdir(parents=True)
    tick()
    names = [f"{classes[i // 1282]}/{classes[i // 1282]}_{i % 1282:05d}.JPEG" for i in range(1_281_167)]
    parts = Names.of(["", *(f"{name}/" for name in classes)])
    found, labels = labels_by_folder(names)
    whole = Index("folder", Names.of(names), found, labels, Stamps.of(root, parts))
    assert save(root, whole, time.time_ns())
    start = time.perf_counter()
    images = find_images(root)
    seconds = time.perf_counter() - start
    print(f"1,281,167 names: {seconds:.3f} s, index of {index_file(root).stat().st_size / 1e6:.0f} MB")
    assert len(images) == 1_281_167 and images.names[1_000_000] == names[1_000_000]
    assert images.labels[-1] == 999 and len(images.classes) == 1000
    assert seconds < 3
    held = len(images.names.blob) + images.names.ends.nbytes + images.labels.nbytes
    assert held < 50 * len(images)
    tick()
    (root / classes[500] / "new.JPEG").write_bytes(b"x")
    assert find_images(root).names == [f"{classes[500]}/new.JPEG"]


def test_arrays_of_an_index_keep_their_bits():
    arrays = {
        "odd": np.arange(3, dtype=np.uint8), "wide": np.array([[1, -(2**62)]]), "none": np.zeros((0, 2)),
    }  # fmt: skip
    header, back = unpack(pack({"a": "é"}, arrays))
    assert header == {"a": "é"} and all(np.array_equal(back[k], arrays[k]) for k in arrays)
    assert load(Path("nowhere"), "folder") is None
