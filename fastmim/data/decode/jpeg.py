"""What a JPEG says of itself, found by walking its segments and scans as a decoder does.

    SOI  (FF marker length bytes)*  SOS  coded data with FF 00 and restarts  ...  EOI

It ends at its own end marker: thumbnails lie within segments, and what follows the end (a video, a second
picture, rubbish) is not looked at. Bytes between segments are passed over, as libjpeg does.
"""

import re
from dataclasses import dataclass, replace

from fastmim.data.decode.bad_image import BadImage

MARKER = re.compile(rb"\xff[^\x00\xff]")
AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not stuffing, not a restart
START, SCAN, END, ADOBE = 0xD8, 0xDA, 0xD9, 0xEE
ALONE = {0x01, START, *range(0xD0, 0xD8)}  # without a length
RESERVED = range(0x02, 0xC0)
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that say how a JPEG is coded
TABLES = {0xC4, 0xCC, 0xDB}
HUFFMAN, ARITHMETIC = {0xC0, 0xC1, 0xC2}, {0xC9, 0xCA}  # baseline, extended, progressive
KINDS = {0xC3: "lossless", 0xCB: "lossless", 0xC7: "hierarchical", 0xCF: "hierarchical"}


@dataclass(frozen=True)
class Jpeg:
    """What a JPEG of a kind that is decoded says in front of its first scan, which begins at byte `scan`."""

    height: int
    width: int
    bands: int
    sequential: bool
    plain: bool  # gray or YCbCr, Huffman-coded, no byte between segments: every decoder reads it alike
    scan: int


def read_jpeg(data: bytes) -> Jpeg:
    """BadImage if it is not whole, or of a kind that is not decoded."""
    found = read_front(data)
    # behind the only scan of a sequential picture nothing belongs that another needs
    single = found.sequential and data[found.scan + 2] == found.bands
    wrong = {START, *RESERVED, *FRAMES} | ({SCAN, *TABLES} if single else set())
    at = found.scan + 2
    while after := AFTER_SCAN.search(data, at):
        marker, at = data[after.end() - 1], after.end()
        if marker == END:
            return found
        if marker in wrong:
            raise BadImage(f"damaged: marker 0xff{marker:02x} within or behind the coded data of a JPEG")
        if marker not in ALONE:
            at = _end(data, marker, at)
    raise BadImage("truncated: JPEG without its end marker")


def read_front(data: bytes) -> Jpeg:
    """Up to the first scan. BadImage if there is none, or it is of a kind that is not decoded."""
    frame: Jpeg | None = None
    at, plain, rgb = 2, True, False
    while found := MARKER.search(data, at):
        marker, start = data[found.end() - 1], found.end()
        plain = plain and found.start() == at and marker not in ALONE
        at = start if marker in ALONE else _end(data, marker, start)
        if marker in FRAMES:
            if frame:
                raise BadImage("damaged: a JPEG with two frames")
            frame = _frame(marker, data[start + 2 : at])
            rgb = rgb or data[start + 8 : at : 3] == b"RGB"
        elif marker == ADOBE and data.startswith(b"Adobe", start + 2) and at - start >= 14:
            rgb = rgb or data[start + 13] == 0
        elif marker == SCAN:
            if not frame:
                raise BadImage("damaged: a JPEG with a scan in front of its frame")
            return replace(frame, plain=plain and frame.plain and not (rgb and frame.bands == 3), scan=start)
        elif marker == END:
            raise BadImage("truncated: JPEG that ends in front of its first scan")
    raise BadImage("truncated: JPEG without its end marker")


def _end(data: bytes, marker: int, start: int) -> int:
    """Where the segment ends whose length stands at `start`."""
    length = int.from_bytes(data[start : start + 2])
    if marker != END and (length < 2 or start + length > len(data)):
        raise BadImage(f"damaged: segment 0xff{marker:02x} of a JPEG says it has {length} bytes")
    return start + length


def _frame(marker: int, frame: bytes) -> Jpeg:
    """The header of a frame, from its precision on."""
    if marker not in HUFFMAN | ARITHMETIC:
        kind = KINDS.get(marker, "hierarchical")
        raise BadImage(f"{kind} JPEG (0x{marker:x}) is not decoded; baseline and progressive are")
    if len(frame) < 6 or len(frame) != 6 + 3 * frame[5]:
        raise BadImage("damaged: the frame header of a JPEG has another length than its bands take")
    bits, bands = frame[0], frame[5]
    if bits != 8:
        raise BadImage(f"{bits}-bit JPEG is not decoded; 8-bit is")
    if bands not in (1, 3, 4):
        raise BadImage(f"JPEG of {bands} bands is not decoded; of 1 (gray), 3 (color) and 4 (CMYK) is")
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    sequential = marker in (0xC0, 0xC1, 0xC9)
    return Jpeg(height, width, bands, sequential, marker in HUFFMAN and bands < 4, 0)
