"""fastmim data verify, stats, index and pack: what they find, print and exit with."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim import cli
from fastmim.data import find_images, why_no_dali
from fastmim.data.feed import verify as verifying
from fastmim.data.feed.verify import verify
from fastmim.data.sources import stats

from .conftest import encode
from .shards import CLASSES, LABELS, PICTURES, with_labels, write_folder, write_tar
from .test_source_kinds import nobody

GOOD, PNG = encode(99, size=(64, 64)), encode(98, fmt="PNG")
FRAME = GOOD.index(b"\xff\xc0")  # marker, length, precision, height, width


def tiff(compression: int) -> bytes:
    """A TIFF that says it is compressed in some way."""
    file = BytesIO()
    Image.new("L", (8, 8)).save(file, "TIFF")
    data = file.getvalue()
    entry = data.index(b"\x03\x01\x03\x00\x01\x00\x00\x00")
    return data[: entry + 8] + compression.to_bytes(4, "little") + data[entry + 12 :]


def sized(height: int, width: int) -> bytes:
    return GOOD[: FRAME + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + GOOD[FRAME + 9 :]


BAD = {
    "empty": (b"", "empty file"),
    "truncated": (GOOD[:-200], "truncated: JPEG without its end marker"),
    "truncated_png": (PNG[:-200], "truncated|OSError|SyntaxError"),
    "text": (b"no image\n" * 40, "no header of JPEG, .*; starts with b'no image'"),
    "wrong_magic": (b"\x00\x00" + GOOD[2:], "no header of JPEG"),
    "zero_size": (sized(0, 64), "header says 0 x 64 pixels"),
    "huge": (sized(65000, 65000), "65000 x 65000 pixels, more than"),
    "unsupported_jpeg": (GOOD.replace(b"\xff\xc0", b"\xff\xc3", 1), "lossless"),
    "unsupported_tiff": (tiff(34712), "TIFF of compression 34712 is not decoded"),
    "unreadable": (GOOD, "PermissionError: Permission denied"),
    "vanished": (GOOD, "FileNotFoundError: No such file or directory"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


def command(*arguments: object) -> int:
    """Exit status of `fastmim data ...`."""
    with pytest.raises(SystemExit) as stopped:
        cli.data([str(argument) for argument in arguments])
    return stopped.value.code or 0


def test_every_kind_of_bad_file_is_reported_with_its_reason(decoder):
    with tempfile.TemporaryDirectory() as root:  # pytest's own are closed to others than their user
        os.chmod(root, 0o755)
        files = {f"{'png' if 'png' in kind else 'x'}/{kind}.jpg": data for kind, (data, _) in BAD.items()}
        write_folder(Path(root), files | PICTURES)
        images = find_images(Path(root))
        (Path(root) / "x" / "unreadable.jpg").chmod(0)
        (Path(root) / "x" / "vanished.jpg").unlink()
        with nobody():
            found = {images.names[i]: reason for i, reason in verify(images, 3, decoder, torch.device("cpu"))}
    assert list(found) == list(images.names)
    assert [name for name, reason in found.items() if reason is None] == list(PICTURES)
    for name, reason in found.items():
        if reason is not None:
            assert re.search(BAD[Path(name).stem][1], reason), (name, reason)


def test_verify_names_the_bad_and_exits_with_1(tmp_path, capsys):
    write_folder(tmp_path / "set", PICTURES | {"cat/bad\n1.jpg": b"", "dog/bad2.jpg": GOOD[:-300]})
    assert command("verify", tmp_path / "set", "--workers", "2") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cat/bad\\n1.jpg: empty file"
    assert lines[1].startswith("dog/bad2.jpg: truncated")
    assert lines[2:] == ["9 of 11 images are good, 2 bad"]
    assert command("verify", write_folder(tmp_path / "good")) == 0
    assert capsys.readouterr().out == "9 of 9 images are good, 0 bad\n"


def test_verify_asks_the_decoder_which_trains(tmp_path, capsys, monkeypatch):
    write_folder(tmp_path / "set")
    asked = []
    real = verifying.make_decoder
    monkeypatch.setattr(
        verifying, "make_decoder", lambda name, *a, **k: asked.append(name) or real(name, *a, **k)
    )
    assert command("verify", tmp_path / "set", "--decoder", "pillow") == 0
    assert why_no_dali() or command("verify", tmp_path / "set") == 0
    assert asked == ["pillow"] + ["dali"] * (why_no_dali() is None)
    monkeypatch.delitem(sys.modules, "fastmim.data.decode.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    capsys.readouterr()
    assert command("verify", tmp_path / "set") == 2
    assert re.search("want dali, but .*--decoder pillow", capsys.readouterr().err)


def test_verify_sees_a_flipped_bit_that_still_decodes(tmp_path, capsys):
    write_folder(tmp_path / "src")
    assert command("pack", tmp_path / "src", tmp_path / "dst") == 0
    assert command("verify", tmp_path / "dst") == 0
    shard = tmp_path / "dst" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"JFIF") + 6] ^= 1  # a version number in the header of the first image
    shard.write_bytes(data)
    capsys.readouterr()
    assert command("verify", tmp_path / "dst") == 1
    assert capsys.readouterr().out.splitlines() == [
        "shard-000000.tar: not as packed: its SHA-256, or that of its index, is not the one in manifest.json",
        "9 of 9 images are good, 0 bad, 1 shards changed",
    ]


def test_verify_names_what_is_wrong_in_shards(tmp_path, capsys):
    files = PICTURES | {"dog/1.jpg": GOOD[:700]}
    write_tar(tmp_path / "x.tar", with_labels(LABELS, files))
    assert command("verify", tmp_path / "x.tar") == 1
    assert "dog/1.jpg: truncated" in capsys.readouterr().out


# --- stats -------------------------------------------------------------------------------------------


def test_stats_are_numpys(tmp_path, capsys):
    write_folder(tmp_path / "set", PICTURES | {"eel/9.png": encode(8, fmt="PNG", mode="L")})
    names = find_images(tmp_path / "set").names
    pictures = [Image.open(tmp_path / "set" / name) for name in names]
    pixels = np.concatenate([np.asarray(p.convert("RGB"), np.float64).reshape(-1, 3) / 255 for p in pictures])
    assert command("stats", tmp_path / "set", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert np.allclose(report["mean"], pixels.mean(0), atol=1e-12)
    assert np.allclose(report["std"], pixels.std(0), atol=1e-12)
    sizes = [(tmp_path / "set" / name).stat().st_size for name in names]
    assert report["bytes"] == {"min": min(sizes), "median": float(np.median(sizes)), "max": max(sizes)}
    for side, of in (
        ("width", lambda p: p.width),
        ("height", lambda p: p.height),
        ("short_side", lambda p: min(p.size)),
    ):
        values = [of(p) for p in pictures]
        assert report[side] == {"min": min(values), "median": float(np.median(values)), "max": max(values)}
    assert report["images_per_class"] == {"cat": 2, "dog": 3, "eel": 5} and report["classes"] == 3
    assert report["formats"] == {"JPEG": 9, "PNG": 1} and report["images"] == report["sample"] == 10
    assert report["bad_in_sample"] == 0 and report["kind"] == "folder"


def test_a_sample_is_said_to_be_one_and_is_the_same_each_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stats, "SAMPLE", 5)
    write_folder(tmp_path / "set", PICTURES | {"cat/0.jpg": b""})
    images = find_images(tmp_path / "set")
    one = stats.stats(images, threads=1)
    assert one == stats.stats(images, threads=3) and one["sample"] == 5 and one["images"] == 9
    assert one["bad_in_sample"] == 1 and one["formats"] == {"JPEG": 4}
    assert command("stats", tmp_path / "set") == 0
    said = capsys.readouterr().out
    assert "9 images (folder), 3 classes" in said and "of 5 evenly spaced images:" in said
    assert "1 of 5 cannot be decoded: see fastmim data verify" in said
    assert "images per class: min 2  median 3  max 4" in said


def test_many_classes_are_cut_and_it_is_said(tmp_path, capsys):
    write_folder(tmp_path / "set", {f"c{c:02d}/{i}.jpg": GOOD for c in range(25) for i in range(1 + c)})
    assert command("stats", tmp_path / "set") == 0
    said = capsys.readouterr().out
    assert "c24" in said and "c00" in said and "c12" not in said
    assert "the 10 largest and 10 smallest of 25; --json has all" in said


def test_a_set_without_a_good_image(tmp_path, capsys):
    write_folder(tmp_path / "set", {"a.jpg": b"", "b.jpg": b"x"})
    assert command("stats", tmp_path / "set") == 0
    assert "2 of 2 cannot be decoded" in capsys.readouterr().out


# --- index, pack, the command line -------------------------------------------------------------------


def test_index_says_what_it_found(tmp_path, capsys, monkeypatch):
    assert command("index", write_folder(tmp_path / "set")) == 0
    said = capsys.readouterr().out
    assert said.startswith("9 images, 3 classes, indexed in ")
    assert "\n  cat/0.jpg\n" in said and "not kept: it is small, or changed just now" in said
    monkeypatch.setattr("fastmim.data.sources.index.SETTLED_NS", 0)
    write_tar(tmp_path / "x.tar", PICTURES.items())
    time.sleep(0.02)
    assert command("index", tmp_path / "x.tar") == 0
    kept = capsys.readouterr().out.splitlines()[-1].removeprefix("kept in ")
    before = Path(kept).stat().st_mtime_ns
    time.sleep(0.02)
    assert command("index", tmp_path / "x.tar") == 0 and Path(kept).stat().st_mtime_ns > before


def test_pack_says_what_it_did_and_what_it_left_out(tmp_path, capsys):
    write_folder(tmp_path / "src", PICTURES | {"cat/bad.jpg": b"", "cat/big.jpg": encode(1, size=(500, 375))})
    flags = ["--short-side", "256", "--quality", "90", "--workers", "2"]
    assert command("pack", tmp_path / "src", tmp_path / "dst", *flags) == 0
    said = capsys.readouterr().out
    assert said.startswith("10 images in 1 shards, ") and "1 bad images left out, each named in" in said
    images = find_images(tmp_path / "dst")
    assert Image.open(BytesIO(images.read(list(images.names).index("cat/big.jpg")))).size == (341, 256)
    assert images.classes == CLASSES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "fastmim: error: want a folder of images"),
        (["pack", "nowhere", "dst"], "it does not exist"),
        (["pack", "nowhere", "dst", "--quality", "0"], "want quality from 1 to 100, got 0"),
        (["stats", "nowhere", "--workers", "0"], "want --workers >= 1, got 0"),
        (["polish", "nowhere"], "invalid choice: 'polish'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_refused_in_plain_words(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom fastmim.cli import data\n"
        "try: data(['pack', '--help'])\nexcept SystemExit: pass\n"
        "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    help_text, _, loaded = run.stdout.partition("LOADED")
    assert "--short-side" in help_text and not {"torch", "numpy", "PIL"} & set(loaded.split())


def test_pyarrow_is_asked_for_only_by_parquet(tmp_path):
    write_folder(tmp_path / "set")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None\nfrom pathlib import Path\nfrom fastmim import cli\n"
        "from fastmim.data import find_images\nassert len(find_images(Path('set'))) == 9\n"
        "sys.argv = ['fastmim', 'data', 'index', 'x.parquet']\ncli.main()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert "data needs the package pyarrow: pip install -e '.[engine]'" in run.stderr


def test_a_pack_killed_as_a_command_goes_on(tmp_path, imagenet):
    pack = [sys.executable, "-m", "fastmim.cli", "data", "pack", str(imagenet)]
    flags = ["--short-side", "200", "--shard-mb", "1", "--workers", "2"]
    killed = subprocess.Popen([*pack, str(tmp_path / "dst"), *flags], stdout=subprocess.DEVNULL)
    for _ in range(2000):
        if list(tmp_path.glob("dst/shard-000000.tar")):
            break
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL  # not done yet
    assert not json.loads((tmp_path / "dst" / "manifest.json").read_text())["complete"]
    for name in ("dst", "whole"):
        subprocess.run([*pack, str(tmp_path / name), *flags], check=True, stdout=subprocess.DEVNULL)
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "dst").iterdir())
    assert all((tmp_path / "dst" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)
