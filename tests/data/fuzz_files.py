"""Broken images of many formats through both decoders: the same pixels, or refused by both with a reason.

    python -m tests.data.fuzz_files --count 2000 --seed 0 --kept FOLDER

Image i of a seed is always the same: `--first` goes on where a run was stopped. Work is done in a process of
its own, eight images at a time; one that ends it, or says nothing for a minute, is found by itself, kept as
a file, named, and a new process goes on behind it. Exit status 1 if there was such a one, or if two decoders
did not agree.
"""

import argparse
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np

BATCH = 8
SILENCE_S, START_S = 60.0, 300.0  # of eight images, and of a start, which imports DALI
MAX_PIXELS = 500_000  # here: sizes are mutated too, and pictures of 500 MB each would take the time
ROOT = Path(__file__).parents[2]
WORKER = ["-m", "tests.data.fuzz_files", "--work"]  # the process that may die


def originals() -> dict[str, bytes]:
    """One good file of each kind, small: so that a mutation hits what matters."""
    from PIL import Image

    from . import encoders

    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise).resize((48, 40), Image.Resampling.BICUBIC)
    rgb = np.asarray(rgba.convert("RGB"))
    deep = rgb.astype(np.int64) * 257

    def saved(form: str, mode: str = "RGB", **options: object) -> bytes:
        file = BytesIO()
        rgba.convert(mode).save(file, form, **options)
        return file.getvalue()

    return {
        "jpeg": saved("JPEG"),
        "jpeg progressive": saved("JPEG", progressive=True),
        "jpeg gray": saved("JPEG", "L"),
        "jpeg cmyk": saved("JPEG", "CMYK"),
        "jpeg restarts": saved("JPEG", subsampling=0, restart_marker_blocks=3),
        "png": saved("PNG"),
        "png palette": saved("PNG", "P"),
        "png 16": encoders.png(deep, 16, 2),
        "webp": saved("WEBP"),
        "webp lossless": saved("WEBP", "RGBA", lossless=True),
        "bmp": saved("BMP"),
        "bmp 565": encoders.bmp(rgb // 8, 16, (0x7C00, 0x3E0, 0x1F)),
        "tiff lzw": saved("TIFF", compression="tiff_lzw"),
        "tiff jpeg": saved("TIFF", compression="jpeg"),
        "tiff 16 big-endian": encoders.tiff(deep, 16, 2, order=">"),
        "tiff fax": saved("TIFF", "1", compression="group4"),
        "ppm": encoders.netpbm(rgb, 255),
        "pgm text": encoders.netpbm(deep[:, :, :1] // 16, 4095, text=True),
        "jpeg 2000": saved("JPEG2000"),
        "jpeg 2000 bare": saved("JPEG2000", "L", no_jp2=True),
        "gif": saved("GIF", "P"),
    }


def mutated(goods: dict[str, bytes], seed: int, i: int) -> tuple[str, bytes]:
    """Broken image i of a seed, and what was done to which kind of file."""
    rng = np.random.default_rng((seed, i))
    kinds = list(goods)
    kind = kinds[i % len(kinds)]
    data = bytearray(goods[kind])
    done = []
    for _ in range(int(rng.integers(1, 4))):
        size = len(data)
        if size < 8:
            break
        # headers are short and matter more than what follows
        at = int(rng.integers(0, min(size, 200) if rng.random() < 0.6 else size))
        length = int(rng.integers(1, 1 + min(64, size - at)))
        other = goods[kinds[int(rng.integers(len(kinds)))]]
        start = int(rng.integers(0, len(other) - 64)) if len(other) > 64 else 0
        match int(rng.integers(9)):
            case 0:
                what = "a flipped bit"
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                what = "another byte"
                data[at] = int(rng.choice([0, 1, 127, 128, 254, 255, int(rng.integers(256))]))
            case 2:
                what = "cut"
                del data[at:]
            case 3:
                what = "zeros"
                data[at : at + length] = bytes(length)
            case 4:
                what = "left out"
                del data[at : at + length]
            case 5:
                what = "noise"
                data[at : at + length] = rng.bytes(length)
            case 6:
                what = "of another file"
                data[at:at] = other[start : start + length]
            case 7:
                what = "twice"
                data[at:at] = data[at : at + length]
            case _:
                what = "another number"
                order, code = rng.choice(["<", ">"]), rng.choice(["H", "I"])
                number = int(rng.choice([0, 1, 255, 256, 32767, 65535, 2**31 - 1, 2**32 - 1]))
                raw = struct.pack(order + "Q", number)
                width = struct.calcsize(code)
                data[at : at + width] = raw[:width] if order == "<" else raw[-width:]
        done.append(f"{what} at {at}")
    if kind.startswith("png") and rng.random() < 0.5:
        done.append("checksums right")
        data = _right_checksums(data)
    return f"{kind}: {', '.join(done)}", bytes(data)


def _right_checksums(data: bytearray) -> bytearray:
    """A PNG that a broken program wrote: decoders that stop at checksums get to see what is within."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return data


# --- the process that may die ---------------------------------------------------------------------------


def work(seed: int, first: int, end: int) -> None:
    """A line before and after every eight images: what became of them, and where decoders differ."""
    import torch

    from fastmim.data import MemoryImages
    from fastmim.data.augment.draws import Draws
    from fastmim.data.decode import header
    from fastmim.data.decode.choose import make_decoder
    from fastmim.data.decode.contract import Request
    from fastmim.data.decode.pixels import for_dali
    from fastmim.data.feed.whole import decode_all
    from fastmim.views import Crop

    header.MAX_PIXELS = MAX_PIXELS
    cpu, goods, crop = torch.device("cpu"), originals(), Crop(size=(16, 16))
    options = {"batch": BATCH, "channels": 3, "threads": 2, "depth": 1, "device": cpu}
    whole = {name: make_decoder(name, (), **options) for name in ("dali", "pillow")}
    cut = {name: make_decoder(name, (crop,), **options) for name in whole}
    print(json.dumps({"ready": True}), flush=True)
    for begin in range(first, end, BATCH):
        print(json.dumps({"begin": begin}), flush=True)
        files = [mutated(goods, seed, i) for i in range(begin, min(begin + BATCH, end))]
        images = MemoryImages([data for _, data in files])
        one, other = (
            [image for _, image in decode_all(decoder, images, chunk=BATCH, threads=2)]
            for decoder in whole.values()
        )
        shown = [i for i, image in enumerate(one) if not isinstance(image, str)]
        if shown:  # again, as training cuts them: a corner of each
            sizes = np.array([one[i].shape[:2] for i in shown], np.int32)
            boxes = np.concatenate([sizes // 2, sizes - sizes // 2], axis=1)
            draws = Draws({0: boxes}, {0: np.zeros(len(shown), bool)}, {}, {})
            for decoder in cut.values():
                decoder.submit(Request([files[i][1] for i in shown], draws))
            corners = [decoder.result()[0] for decoder in cut.values()]
            differ = [not torch.equal(a, b) for a, b in zip(*corners, strict=True)]
        outcomes: Counter[str] = Counter()
        wrong = []
        for i, (said, data) in enumerate(files):
            if isinstance(one[i], str) or isinstance(other[i], str):
                same, outcome = one[i] == other[i], "refused"
            else:
                same, outcome = torch.equal(one[i], other[i]), "shown"
                outcome += " by DALI" if for_dali(data, 3) else ""
            if same and i in shown and differ[shown.index(i)]:
                wrong.append([begin + i, f"{said}: a corner of it differs"])
            outcomes[outcome] += 1
            if not same:
                texts = (x if isinstance(x, str) else f"{list(x.shape)}" for x in (one[i], other[i]))
                apart = "" if outcome == "refused" else f", apart by {_apart(one[i], other[i])}"
                wrong.append([begin + i, f"{said}: {' against '.join(texts)}{apart}"])
        print(json.dumps({"done": begin, "outcomes": outcomes, "wrong": wrong}), flush=True)


def _apart(one: object, other: object) -> str:
    error = (one.float() - other.float()).abs()
    return f"{error.mean():.3f} on average, {error.max():.0f} at most"


# --- the process that watches ---------------------------------------------------------------------------


def watch(seed: int, first: int, end: int) -> Iterator[dict]:
    """Lines of one process; {"died": begin, "why": ...} if it ended before its work."""
    child = subprocess.Popen(
        [sys.executable, *WORKER, str(seed), str(first), str(end)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, cwd=ROOT,  # or a line waits unseen
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    selector = selectors.DefaultSelector()
    selector.register(child.stdout, selectors.EVENT_READ)
    begun, why, patience_s = first, None, START_S
    os.set_blocking(child.stderr.fileno(), False)
    said = b""
    try:
        while True:
            if not selector.select(patience_s):
                why = f"no word for {patience_s:.0f} s"
                break
            line = child.stdout.readline()
            said = (said + (child.stderr.read() or b""))[-2000:]
            if not line:
                break
            row, patience_s = json.loads(line), SILENCE_S
            begun = row.get("begin", begun)
            yield row
        if why is None and (status := child.wait()):
            why = (
                signal.Signals(-status).name
                if status < 0
                else f"exit status {status}: {said.decode()[-500:]}"
            )
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()
    if why:
        yield {"died": begun, "why": why}


def fuzz(seed: int, first: int, count: int, kept: Path) -> list[str]:
    """What is wrong, one line each; files that are to blame lie in `kept` then."""
    end, at, faults, outcomes = first + count, first, [], Counter()
    goods = originals()

    def blame(i: int, text: str) -> None:
        kept.mkdir(parents=True, exist_ok=True)
        path = kept / f"seed{seed}-{i}.bin"
        path.write_bytes(mutated(goods, seed, i)[1])
        faults.append(f"{path}: {text}")
        print(faults[-1], flush=True)

    while at < end:
        died = None
        for row in watch(seed, at, end):
            if "done" in row:
                outcomes.update(row["outcomes"])
                for i, text in row["wrong"]:
                    blame(i, text)
            died = row if "died" in row else None
        if died is None:
            break
        begin = died["died"]
        at = min(begin + BATCH, end)
        alone = [i for i in range(begin, at) if any("died" in row for row in watch(seed, i, i + 1))]
        for i in alone or range(begin, at):
            together = "" if alone else " (one of eight that do so together only)"
            blame(i, f"{mutated(goods, seed, i)[0]}: {died['why']}{together}")
    print(
        f"{count} images from {first} of seed {seed}: {dict(sorted(outcomes.items()))}, {len(faults)} wrong"
    )
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", type=Path, default=Path("runs/fuzz-files"), help="where blamed files go")
    parser.add_argument("--work", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
    else:
        sys.exit(bool(fuzz(args.seed, args.first, args.count, args.kept)))


if __name__ == "__main__":
    main()
