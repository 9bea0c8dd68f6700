"""The parity page: its numbers against ones worked out here, and a planted difference shows."""

import importlib
import json
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from fastmim_kernels import resized_crop, sample_seeds
from PIL import Image

from benchmarks.pipeline import parity, parity_boxes, parity_files, parity_page, parity_reference
from fastmim.data.augment.crop import draw_boxes
from fastmim.views import Crop
from tests.data.conftest import encode

SIZES = {"a": (200, 300), "b": (60, 90), "c": (70, 50)}
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is what is compared with"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i, (name, size) in enumerate(SIZES.items()):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(encode(i, size=size))
    return tmp_path / "images"


@pytest.fixture
def quick(monkeypatch):
    """Pillow's decoder and three chains, one always flipped; speed is not what is asked here."""
    monkeypatch.setattr(parity, "decoders", lambda: ["pillow"])
    chains = {k: parity.CHAINS[k] for k in ("MAE", "BYOL, second")}
    monkeypatch.setattr(parity, "CHAINS", chains | {"flipped": Crop(size=(224, 224), flip=1.0)})
    speed = {"kind": "speed", "op": "color_jitter", "provider": "fastmim", "images_per_s": 1.0}
    speed |= {"images_per_s_p20": 1.0, "images_per_s_p80": 1.0}
    monkeypatch.setattr(parity_page, "speeds", lambda images: [speed])


def run(folder, draws=60):
    status = parity.main([str(folder), "--draws", str(draws), "--results", str(folder.parent)])
    rows = [json.loads(line) for line in (folder.parent / "parity.jsonl").read_text().splitlines()]
    return status, rows, (folder.parent / "parity.md").read_text()


def stage(rows, name, reference):
    [row] = [r for r in rows if r["kind"] == "stage" and (r["stage"], r["reference"]) == (name, reference)]
    return row


def test_the_page_of_a_tiny_folder(folder, quick, capsys):
    status, rows, text = run(folder)
    assert status == 0
    stages = [r for r in rows if r["kind"] == "stage"]
    assert len(stages) == 3 + 6 + 1 + 8 + 6
    assert all(r["images"] == 3 and r["source"] == "images" and r["commit"] != "" for r in stages)
    assert all(r["equal_share"] == 1 and r["mae"] == 0 and r["psnr_db"] is None for r in stages
               if r["expect_equal"])  # fmt: skip
    assert "every color above is that of Pillow" in text and "not here" not in text
    for r in stages:
        assert f"| {r['stage']} | {r['reference']} | {100 * r['equal_share']:.4g} % |" in text
    with Image.open(folder.parent / "parity.png") as picture:
        assert picture.width > 4 * 112 and picture.height > 2 * 112
    assert (folder.parent / "parity.png").stat().st_size < 300_000


def test_numbers_are_those_worked_out_by_hand(folder, quick, capsys):
    """A tall box, which Pillow resizes columns first in one call and rows first in two."""
    _, rows, _ = run(folder)
    errors = {}
    for i, name in enumerate(SIZES):
        with Image.open(folder / f"{name}.jpg") as file:
            image = file.convert("RGB")
        key = sample_seeds(0, 0, torch.tensor([i]))
        box = draw_boxes(key, np.array([[image.height, image.width]]), Crop(size=(224, 224)))[0][0].tolist()
        top, left, height, width = box
        cut = image.crop((left, top, left + width, top + height))
        one_call = np.asarray(cut.resize((112, 112), Image.Resampling.LANCZOS), int)
        rows_first = cut.resize((112, height), Image.Resampling.LANCZOS)
        rows_first = np.asarray(rows_first.resize((112, 112), Image.Resampling.LANCZOS), int)
        errors[name] = np.abs(one_call - rows_first)
    found = stage(rows, "crop and resize, lanczos to 112", "torchvision")
    all_errors = np.stack(list(errors.values()))
    assert all_errors.any()
    assert found["mae"] == pytest.approx(all_errors.mean(), abs=1e-12)
    assert found["equal_share"] == sum(not e.any() for e in errors.values()) / 3


def spoil(image_index, at, by):
    """`resized_crop` that adds to one value of one image's bicubic crops."""
    calls = []

    def planted(images, boxes, size, **options):
        out = resized_crop(images, boxes, size, **options)
        if options.get("filter") == "bicubic":
            if len(calls) == image_index:
                out[(0, *at)] = (out[(0, *at)].int() + by) % 256
            calls.append(size)
        return out

    return planted


def test_a_planted_difference_shows(folder, quick, monkeypatch, capsys):
    monkeypatch.setattr(parity, "resized_crop", spoil(1, (7, 11, 2), 3))
    status, rows, text = run(folder)
    found = stage(rows, "crop and resize, bicubic to 224", "Pillow, rows first")
    assert status == 1 and found["equal_share"] == pytest.approx(2 / 3)
    worst = found["worst"]
    assert worst["image"] == "b" and worst["at"] == [7, 11, 2]
    change = abs(worst["ours"] - worst["theirs"])
    assert change in (3, 253)
    values = 224 * 224 * 3
    assert found["mae"] == pytest.approx(change / (3 * values))
    assert found["worst_mae"] == pytest.approx(change / values)
    assert found["psnr_db"] == pytest.approx(10 * np.log10(255**2 * 3 * values / change**2))
    assert (
        "FAILED: crop and resize, bicubic to 224 is not that of Pillow, rows first" in capsys.readouterr().err
    )
    assert f"{worst['ours']} for {worst['theirs']} at (7, 11, 2)" in text
    assert stage(rows, "crop and resize, lanczos to 112", "Pillow, rows first")["equal_share"] == 1


def test_a_color_that_is_off_is_said(folder, quick, monkeypatch, capsys):
    exact = parity.apply_colors
    monkeypatch.setattr(parity, "apply_colors", lambda x, d: exact(x, d) ^ 1)
    status, rows, text = run(folder)
    assert status == 1 and "**It is not here**" in text
    assert stage(rows, "hue", "torchvision")["mae"] == 1
    assert stage(rows, "hue", "torchvision")["psnr_db"] == pytest.approx(48.1308, abs=1e-4)


def test_a_file_that_cannot_be_read_is_named(folder, quick, capsys):
    (folder / "ab.jpg").write_bytes(encode(5)[:200])
    status, rows, _ = run(folder)
    assert status == 0 and all(r["images"] == 3 for r in rows if r["kind"] == "stage")
    assert "left out: ab.jpg: " in capsys.readouterr().err


def test_a_folder_without_images(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    for arguments in ([str(tmp_path)], [str(tmp_path / "none")], [str(tmp_path), "--images", "0"]):
        with pytest.raises(SystemExit, match="2"):
            parity.main(arguments)
    assert "want at least one image" in capsys.readouterr().err


# --- the law of the boxes -----------------------------------------------------------------------------


def test_distance_and_p_value_are_those_of_the_tables():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30), rng.normal(0.5, size=20)
    at = np.concatenate([a, b])
    by_definition = max(abs((a <= x).mean() - (b <= x).mean()) for x in at)
    assert parity_boxes.ks_test(a, b)[0] == pytest.approx(by_definition)
    # critical values of sqrt(n m / (n + m)) D at 10, 5 and 1 %
    for critical, p in ((1.224, 0.1), (1.358, 0.05), (1.628, 0.01)):
        n = 200_000
        shift = round(critical * np.sqrt(2 / n) * n)
        found = parity_boxes.ks_test(np.arange(n), np.arange(n) + shift)
        assert found == (pytest.approx(shift / n), pytest.approx(p, rel=0.01))
    assert parity_boxes.ks_test(np.arange(9), np.arange(9)) == (0, 1)
    p = [parity_boxes.ks_test(np.arange(1000), np.arange(1000) + k)[1] for k in range(120)]
    assert all(0 <= later <= earlier + 1e-12 <= 1 + 1e-12 for earlier, later in pairwise(p)) and p[-1] < 1e-5


def test_one_law_passes_and_another_is_found(monkeypatch):
    sizes = np.tile(np.array([[375, 500], [500, 333], [480, 640], [300, 300]]), (100, 1))
    rows = list(parity_boxes.compare_boxes(sizes, 1200))
    assert len(rows) == 15 and all(r["draws"] == 1200 and r["p"] > 1e-3 for r in rows)
    assert parity.failures(rows) == []
    wider = {"MAE": Crop(size=(8, 8), scale=(0.35, 1.0))}
    plain = parity_boxes.our_boxes
    monkeypatch.setattr(parity_boxes, "our_boxes", lambda s, e, crop: plain(s, e, wider["MAE"]))
    found = [r for r in parity_boxes.compare_boxes(sizes, 1200) if r["law"] == "MAE"]
    assert any("another area" in said for said in parity.failures(found))


def test_flips_that_are_not_even_are_found(monkeypatch):
    plain = parity_boxes.our_boxes
    often = Crop(size=(8, 8), flip=0.6)
    monkeypatch.setattr(
        parity_boxes, "our_boxes", lambda s, e, crop: (plain(s, e, crop)[0], plain(s, e, often)[1])
    )
    rows = list(parity_boxes.compare_boxes(np.tile([[375, 500]], (500, 1)), 1500))
    assert [r["quantity"] for r in rows if r["p"] < parity.LEAST_P] == ["flipped"] * 3


# --- kinds of file ------------------------------------------------------------------------------------


def test_every_kind_of_file_is_what_it_is_called():
    files = parity_files.kinds_of(Image.open(BytesIO(encode(0, size=(200, 150)))))
    modes = {}
    for kind, data in files.items():
        with Image.open(BytesIO(data)) as image:
            modes[kind] = image.mode
            assert kind.split(",")[0].replace(" ", "").upper() == image.format, kind
    assert list(files) == list(parity_files.CONVENTIONS)
    expected = {"JPEG, CMYK": "CMYK", "JPEG, grayscale": "L", "PNG, alpha": "RGBA", "PNG, palette": "P"}
    expected |= {"PNG, 16-bit gray": "I;16", "PNG, one bit": "1", "PNG, gray and alpha": "LA"}
    assert {kind: modes[kind] for kind in expected} == expected
    with Image.open(BytesIO(files["JPEG, turned by EXIF"])) as image:
        assert image.getexif()[0x0112] == 6
    with Image.open(BytesIO(files["JPEG, progressive"])) as image:
        assert image.info["progressive"]


def test_what_becomes_of_each_kind():
    photograph = Image.open(BytesIO(encode(0, size=(200, 150))))
    rows = {r["file"]: r for r in parity_files.compare_kinds(["pillow"], photograph)}
    assert all(r["largest"] == 0 for r in rows.values())
    assert rows["PNG, 16-bit gray"]["mae_to_conversion"] > 50
    assert all(r["mae_to_conversion"] == 0 for kind, r in rows.items() if "16-bit" not in kind)


def test_a_kind_that_is_refused_is_said(monkeypatch):
    def refuse(decoder, data, box):
        raise parity_files.Rejected({0: "no such colors"})

    monkeypatch.setattr(parity_files, "view_of", refuse)
    rows = list(parity_files.compare_kinds(["pillow"], Image.new("RGB", (8, 8))))
    assert all(r["refused"] == "no such colors" and "mae" not in r for r in rows)
    head, lines = parity_page.kinds_table(rows)
    assert head == ("file", "pillow", "convention")
    assert ("PNG", "no such colors", "as stored") in lines


def test_dali_decodes_whole_images_and_boxes():
    pytest.importorskip("nvidia.dali")
    data = [encode(i, size=(40 + i, 64 - i)) for i in range(parity_files.BATCH + 2)]
    boxes = np.tile(np.array([[3, 5, 20, 30]], np.int32), (len(data), 1))
    wholes = list(parity_files.decode("dali", data))
    cuts = list(parity_files.decode("dali", data, boxes))
    for one, whole, cut in zip(data, wholes, cuts, strict=True):
        expected = np.asarray(parity_reference.decoded(one), int)
        assert np.abs(whole.numpy() - expected).mean() < 0.5
        assert np.abs(cut.numpy() - expected[3:23, 5:35]).mean() < 0.5
