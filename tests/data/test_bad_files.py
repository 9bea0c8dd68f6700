"""Files that are no images among good ones: named, replaced in their slot, and the run goes on."""

import json
import shutil

import pytest

from fastmim.data import find_images

from .conftest import assert_same, encode, take

GOOD, PNG = encode(99), encode(98, fmt="PNG")
TABLES, HUFFMAN, SCAN = GOOD.index(b"\xff\xdb"), GOOD.index(b"\xff\xc4"), GOOD.index(b"\xff\xda")
BAD = {
    "empty": b"",
    "truncated": GOOD[: (SCAN + len(GOOD)) // 2],
    "text": b"this is no image\n" * 50,
    "zeros": bytes(5000),
    "header only": GOOD[:SCAN],
    "header and end": GOOD[:SCAN] + b"\xff\xd9",  # passes the header, breaks in the decoder
    "wrong magic": b"\x00\x00" + GOOD[2:],
    "bad Huffman table": GOOD[: HUFFMAN + 5] + b"\xff" * 16 + GOOD[HUFFMAN + 21 :],
    "no quantization table": GOOD.replace(b"\xff\xdb", b"\xff\xfe"),
    "truncated png": PNG[: len(PNG) * 2 // 3],
    "damaged png": PNG[: len(PNG) // 2] + b"\x55\xaa\x55\xaa" + PNG[len(PNG) // 2 + 4 :],
    "folder": None,
    "gone": None,
}


def spoil(path, kind):
    """Makes a good file a bad one, after the folder was listed."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(BAD[kind])


def rows(tmp_path):
    file = tmp_path / "bad_samples.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def repaired(images, tmp_path, contents):
    """A copy of the folder where sample `i` holds the bytes of sample `contents[i]`."""
    copy = tmp_path / "repaired"
    for i, name in enumerate(images.names):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images.path(contents.get(i, i)), copy / name)
    return find_images(copy)


@pytest.mark.parametrize("kind", BAD)
def test_each_kind_is_named_and_replaced_by_the_next(kind, folder, tmp_path, open_loader, decoder):
    images = find_images(folder)
    expected = take(open_loader(repaired(images, tmp_path, {6: 7}), decoder), 7)
    spoil(images.path(6), kind)
    assert_same(take(open_loader(images, decoder), 7), expected)
    [row] = rows(tmp_path)  # once, though three epochs began
    assert (row["path"], row["sample_id"], row["epoch"], row["rank"]) == (images.names[6], 6, 0, 0)
    assert 6 in expected[row["step"]].ids_B and len(row["reason"]) > 4


def test_many_at_once_neighbors_and_the_last(folder, tmp_path, open_loader, decoder):
    images = find_images(folder)
    kinds = dict(zip([2, 3, 4, 9, 10, 17, 22, 23], [*BAD][1:], strict=False))
    expected = take(
        open_loader(
            repaired(images, tmp_path, {2: 5, 3: 5, 4: 5, 9: 11, 10: 11, 17: 18, 22: 0, 23: 0}), decoder
        ),
        7,
    )
    for sample_id, kind in kinds.items():
        spoil(images.path(sample_id), kind)
    assert_same(take(open_loader(images, decoder), 7), expected)
    assert sorted(row["sample_id"] for row in rows(tmp_path)) == sorted(kinds)


def test_ranks_and_a_later_start_replace_alike(folder, tmp_path, open_loader, decoder):
    images = find_images(folder)
    for sample_id, kind in {5: "truncated", 6: "bad Huffman table", 20: "truncated png"}.items():
        spoil(images.path(sample_id), kind)
    run = take(open_loader(images, decoder, accumulate=2), 12)
    assert_same(take(open_loader(images, decoder, accumulate=2, start_step=4), 4), run[8:])
    # micro-step a of one rank is rank a of two
    for rank in (0, 1):
        assert_same(take(open_loader(images, decoder, world=2, rank=rank), 6), run[rank::2])


def test_too_many_end_the_run(folder, tmp_path, open_loader, decoder):
    images = find_images(folder)
    for sample_id in range(12):
        spoil(images.path(sample_id), "truncated png" if sample_id % 2 else "text")
    with pytest.raises(
        ValueError, match="11 of 24 images cannot be decoded, more than the 10 allowed"
    ) as error:
        take(open_loader(images, decoder), 3)
    assert "max_bad_fraction = 0.01" in str(error.value) and "bad_samples.jsonl" in str(error.value)
    assert len(rows(tmp_path)) == 11


@pytest.mark.parametrize("kind", ["zeros", "truncated png"])
@pytest.mark.parametrize("max_bad_fraction", [0.01, 1.0])
def test_a_folder_without_a_good_file(kind, max_bad_fraction, tmp_path, open_loader, decoder):
    (tmp_path / "all").mkdir()
    for name in "abc":
        (tmp_path / "all" / f"{name}.jpg").write_bytes(BAD[kind])
    images = find_images(tmp_path / "all")
    with pytest.raises(ValueError, match="of 3 images cannot be decoded"):
        next(open_loader(images, decoder, batch=2, max_bad_fraction=max_bad_fraction))
