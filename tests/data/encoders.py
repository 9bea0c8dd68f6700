"""Small encoders of formats and depths, written from the formats' texts, not with the library under test.

Samples are numpy arrays of whole numbers `[H, W, bands]`, as they are to stand in the file.
"""

import struct
import zlib

import numpy as np


def netpbm(samples: np.ndarray, maxval: int, *, text: bool = False) -> bytes:
    """PGM or PPM."""
    height, width, bands = samples.shape
    magic = {(1, False): 5, (3, False): 6, (1, True): 2, (3, True): 3}[bands, text]
    head = b"P%d\n# a comment 1 2\n%d %d\n%d\n" % (magic, width, height, maxval)
    if text:
        return head + b" ".join(b"%d" % v for v in samples.ravel()) + b"\n"
    return head + samples.astype(">u2" if maxval > 255 else "u1").tobytes()


def pbm(ink: np.ndarray, *, text: bool = False) -> bytes:
    """A bitmap; 1 is black."""
    height, width = ink.shape
    head = b"P%d %d %d\n" % (1 if text else 4, width, height)
    if text:
        return head + b"\n".join(b"".join(b"%d" % v for v in row) for row in ink)
    return head + np.packbits(ink.astype(bool), axis=1).tobytes()


def pam(samples: np.ndarray, maxval: int, kind: str) -> bytes:
    height, width, bands = samples.shape
    head = f"P7\nWIDTH {width}\nHEIGHT {height}\nDEPTH {bands}\nMAXVAL {maxval}\nTUPLTYPE {kind}\nENDHDR\n"
    return head.encode() + samples.astype(">u2" if maxval > 255 else "u1").tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _packed_rows(samples: np.ndarray, bits: int) -> np.ndarray:
    """Rows of bytes, most significant first."""
    height = samples.shape[0]
    flat = samples.reshape(height, -1).astype(np.int64)
    powers = np.arange(bits - 1, -1, -1)
    return np.packbits(((flat[:, :, None] >> powers) & 1).astype(np.uint8).reshape(height, -1), axis=1)


def png(samples: np.ndarray, bits: int, color: int, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """`before` and `after` the pixels: other chunks. Rows are filtered by Sub and Up in turn."""
    height, width, _ = samples.shape
    rows, step = _packed_rows(samples, bits).astype(np.int64), max(1, samples.shape[2] * bits // 8)
    lines = []
    for y, row in enumerate(rows):
        left = np.concatenate([np.zeros(step, np.int64), row[:-step]])
        above = rows[y - 1] if y else np.zeros_like(row)
        lines.append(
            bytes([1 + y % 2]) + ((row - (above if y % 2 else left)) % 256).astype(np.uint8).tobytes()
        )
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(lines)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + pixels + after + chunk(b"IEND", b"")


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    compressed: bool = False,
    signed: bool | None = False,
    extra: tuple[int, ...] = (),
    tags: dict[int, tuple[int, ...]] | None = None,
    pages: int = 1,
) -> bytes:
    """Baseline TIFF, the first of `pages` of these samples, the others black; `signed` None: floats."""
    height, width, bands = samples.shape
    out = bytearray(struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 0))
    link = 4
    for page in range(pages):
        here = samples if page == 0 else np.zeros_like(samples)
        if signed is None:
            data = here.astype(f"{order}f4").tobytes()
        elif bits in (8, 16):
            data = here.astype(f"{order}{'i' if signed else 'u'}{bits // 8}").tobytes()
        else:
            data = _packed_rows(here, bits).tobytes()
        data = zlib.compress(data) if compressed else data
        strip = len(out)
        out += data + b"\0" * (-len(data) % 2)
        entries = {
            256: (width,), 257: (height,), 258: (bits,) * bands, 259: (8 if compressed else 1,),
            262: (photometric,), 273: (strip,), 277: (bands,), 278: (height,), 279: (len(data),),
        }  # fmt: skip
        entries |= {338: extra} if extra else {}
        entries |= {339: ((3 if signed is None else 2),) * bands} if signed is not False else {}
        entries |= tags or {}
        body = b""
        for tag, values in sorted(entries.items()):
            kind, code = (4, "I") if tag in (273, 279) else (3, "H")
            packed = struct.pack(f"{order}{len(values)}{code}", *values)
            if len(packed) > 4:
                at = len(out)
                out += packed + b"\0" * (-len(packed) % 2)
                packed = struct.pack(f"{order}I", at)
            body += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
        struct.pack_into(f"{order}I", out, link, len(out))
        out += struct.pack(f"{order}H", len(entries)) + body
        link = len(out)
        out += b"\0\0\0\0"
    return bytes(out)


def bmp(
    samples: np.ndarray, bits: int, masks: tuple[int, int, int] | None = None, *, downwards: bool = False
) -> bytes:
    """24 bits, or 16 or 32 with channels where the masks say."""
    height, width, _ = samples.shape
    if bits == 24:
        pixels = samples[:, :, ::-1].astype(np.uint8).reshape(height, -1)
    else:
        lows = [mask & -mask for mask in masks]
        words = sum(samples[:, :, i].astype(np.int64) * low for i, low in enumerate(lows))
        pixels = words.astype(f"<u{bits // 8}").view(np.uint8).reshape(height, -1)
    pixels = np.pad(pixels, ((0, 0), (0, -pixels.shape[1] % 4)))
    data = (pixels if downwards else pixels[::-1]).tobytes()
    extra = b"" if bits == 24 else struct.pack("<III", *masks)
    start = 54 + len(extra)
    head = struct.pack("<2sIHHI", b"BM", start + len(data), 0, 0, start)
    info = struct.pack(
        "<IiiHHIIiiII", 40, width, -height if downwards else height, 1, bits, 3 if extra else 0, len(data),
        2835, 2835, 0, 0,
    )  # fmt: skip
    return head + info + extra + data
