"""PBM, PGM, PPM and PAM, in text or in bytes: header, and samples as whole numbers 0..maxval.

Source  The formats' pages of Netpbm. A bitmap's 1 is black, but in PAM. The first picture of a file counts.
"""

import re
from dataclasses import dataclass

import numpy as np

from fastmim.data.decode.bad_image import BadImage

FIELD = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*(\d{1,9})(?=[\s#])")
COMMENT = re.compile(rb"#[^\r\n]*")
BANDS = {b"1": 1, b"2": 1, b"3": 3, b"4": 1, b"5": 1, b"6": 3}
TUPLES = {b"BLACKANDWHITE": 1, b"GRAYSCALE": 1, b"RGB": 3}
TUPLES |= {name + b"_ALPHA": bands + 1 for name, bands in TUPLES.items()}


@dataclass(frozen=True)
class Netpbm:
    """What the header says; samples begin at byte `start`."""

    height: int
    width: int
    bands: int
    maxval: int
    start: int
    text: bool
    bitmap: bool


def read_netpbm(data: bytes) -> Netpbm:
    """BadImage if it is not whole, or of a kind that is not decoded."""
    magic = data[1:2]
    if magic == b"7":
        return _read_pam(data)
    bitmap, fields, at = magic in b"14", [], 2
    for _ in range(2 if bitmap else 3):
        found = FIELD.match(data, at)
        if not found:
            raise BadImage("damaged: the header of a PPM, PGM or PBM lacks width, height or maxval")
        fields.append(int(found[1]))
        at = found.end()
    width, height, maxval = (*fields, 1)[:3]
    return _checked(Netpbm(height, width, BANDS[magic], maxval, at + 1, magic in b"123", bitmap), data)


def _read_pam(data: bytes) -> Netpbm:
    header, end, _ = data.partition(b"ENDHDR\n")
    lines = [line.split(None, 1) for line in header.splitlines()[1:] if line and not line.startswith(b"#")]
    fields = {line[0]: line[1].strip() for line in lines if len(line) == 2}
    try:
        width, height, bands, maxval = (
            int(fields[key]) for key in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL")
        )
    except (KeyError, ValueError):
        raise BadImage("damaged: the header of a PAM lacks WIDTH, HEIGHT, DEPTH or MAXVAL") from None
    tuples = fields.get(
        b"TUPLTYPE", {1: b"GRAYSCALE", 2: b"GRAYSCALE_ALPHA", 3: b"RGB"}.get(bands, b"RGB_ALPHA")
    )
    if TUPLES.get(tuples) != bands:
        raise BadImage(f"PAM of {bands} bands of {tuples[:30]!r} is not decoded; gray, RGB, and alpha are")
    return _checked(Netpbm(height, width, bands, maxval, len(header) + len(end), False, False), data)


def _checked(header: Netpbm, data: bytes) -> Netpbm:
    if not 1 <= header.maxval <= 65535:
        raise BadImage(f"maxval of a PPM, PGM or PAM is 1 to 65535, got {header.maxval}")
    wanted, got = _num_bytes(header), len(data) - header.start
    if min(header.height, header.width) > 0 and not header.text and got < wanted:
        raise BadImage(f"truncated: {wanted} bytes of pixels, got {max(got, 0)}")
    return header


def _num_bytes(header: Netpbm) -> int:
    if header.bitmap:
        return header.height * (-(-header.width // 8))
    return header.height * header.width * header.bands * (2 if header.maxval > 255 else 1)


def samples(data: bytes, header: Netpbm) -> np.ndarray:
    """uint8 or uint16 `[H, W, bands]`, at most `maxval`; 0 is black. BadImage for others."""
    shape = header.height, header.width, header.bands
    count = header.height * header.width * header.bands
    numbers: np.ndarray
    if header.text:
        text = COMMENT.sub(b" ", data[header.start :])
        if header.bitmap:  # digits need no space between them
            numbers = np.array([c - 48 for c in b"".join(text.split())[:count]], np.int64)
        else:
            try:
                numbers = np.array(text.split(None, count)[:count], dtype=bytes).astype(np.int64)
            except (ValueError, OverflowError):
                raise BadImage("damaged: what stands between the numbers of a PPM or PGM is none") from None
    elif header.bitmap:
        packed = np.frombuffer(data, np.uint8, _num_bytes(header), header.start)
        numbers = np.unpackbits(packed.reshape(header.height, -1), axis=1)[:, : header.width]
    else:
        numbers = np.frombuffer(data, ">u2" if header.maxval > 255 else np.uint8, count, header.start)
    if numbers.size < count:
        raise BadImage(f"truncated: {count} samples, got {numbers.size}")
    if numbers.max() > header.maxval or numbers.min() < 0:
        raise BadImage(f"damaged: a sample of {numbers.max()} where maxval is {header.maxval}")
    numbers = numbers.astype(np.uint16 if header.maxval > 255 else np.uint8).reshape(shape)
    return 1 - numbers if header.bitmap else numbers
