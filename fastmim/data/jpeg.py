"""What a JPEG says of itself, found by walking its segments and scans as a decoder does.

    SOI  (FF marker length bytes)*  SOS  coded data with FF 00 and restarts  ...  EOI

It ends at its own end marker: thumbnails lie within segments, and what follows the end (a video, a second
picture, rubbish) is not looked at. Bytes between segments are passed over, as libjpeg does.
"""

import re
from dataclasses import dataclass, replace

from fastmim.data.bad_image import BadImage

MARKER = re.compile(rb"\xff[^\x00\xff]")
AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not stuffing, not a restart
TABLES, SCAN, END, ADOBE = 0xC4, 0xDA, 0xD9, 0xEE
ALONE = {0x01, 0xD8, *range(0xD0, 0xD8)}  # without a length
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that say how a JPEG is coded
HUFFMAN, ARITHMETIC = {0xC0, 0xC1, 0xC2}, {0xC9, 0xCA}  # baseline, extended, progressive
KINDS = {0xC3: "lossless", 0xCB: "lossless", 0xC7: "hierarchical", 0xCF: "hierarchical"}


@dataclass(frozen=True)
class Jpeg:
    """A whole JPEG of a kind that is decoded."""

    height: int
    width: int
    bands: int
    sequential: bool
    plain: (
        bool  # grey or YCbCr, Huffman-coded, of nothing but segments and scans: every decoder reads it alike
    )


def read_jpeg(data: bytes) -> Jpeg:
    """BadImage if it is not whole, or of a kind that is not decoded."""
    frame: Jpeg | None = None
    following: tuple[int, ...] = ()
    at, scans, plain, rgb = 2, 0, True, False
    while found := (AFTER_SCAN if scans else MARKER).search(data, at):
        marker, start = data[found.end() - 1], found.end()
        if marker == END:
            break
        # in front of a scan no byte lies between segments; behind one come others of a picture in several
        plain = plain and (marker in following if scans else found.start() == at and marker not in ALONE)
        at = start
        if marker in ALONE or marker < min(FRAMES):  # the latter is damage within coded data
            continue
        length = int.from_bytes(data[start : start + 2])
        at += length
        if length < 2 or at > len(data):
            raise BadImage(f"damaged: a segment of a JPEG (0xff{marker:02x}) of {length} bytes")
        if marker in FRAMES:
            if frame:
                raise BadImage("damaged: a JPEG with two frames")
            frame = _frame(marker, data[start + 2 : at])
            rgb = rgb or data[start + 8 : at : 3] == b"RGB"
        elif marker == ADOBE and data.startswith(b"Adobe", start + 2) and length >= 14:
            rgb = rgb or data[start + 13] == 0
        elif marker == SCAN:
            if not frame:
                raise BadImage("damaged: a JPEG with a scan before its frame")
            scans += 1
            whole = data[start + 2] == frame.bands and frame.sequential
            following = () if whole else (TABLES, SCAN)
    else:
        raise BadImage("truncated: JPEG without its end marker")
    if not frame or not scans:
        raise BadImage(f"truncated: JPEG that ends before its {'first scan' if frame else 'header'}")
    plain = plain and frame.plain and not (rgb and frame.bands == 3)
    return replace(frame, plain=plain)


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
        raise BadImage(f"JPEG of {bands} bands is not decoded; of 1 (grey), 3 (colour) and 4 (CMYK) is")
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    sequential = marker in (0xC0, 0xC1, 0xC9)
    return Jpeg(height, width, bands, sequential, marker in HUFFMAN and bands < 4)
