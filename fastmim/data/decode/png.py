"""A PNG: what its header says, and its bytes without all that is not pixels.

Text, profiles, animation and transparency are left out unread, however long or broken they are; what Pillow
gets is the picture alone. Frames of an animation are not the picture but come beside it.
"""

import struct
from dataclasses import dataclass
from zlib import crc32

from fastmim.data.decode.bad_image import BadImage

GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf"}
AT = 8  # of the first chunk


@dataclass(frozen=True)
class Png:
    """The header of a PNG."""

    height: int
    width: int
    bits: int
    color: int


def read_png(data: bytes) -> Png:
    """BadImage if there is no header."""
    if data[12:16] == b"CgBI":
        raise BadImage("PNG in Apple's own form (CgBI) is not decoded; the standard's is")
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise BadImage("damaged: a PNG without its header")
    width, height, bits, color = struct.unpack_from(">IIBB", data, 16)
    return Png(height, width, bits, color)


def only_pixels(data: bytes, *, checked: bool = False) -> bytes:
    """The chunks that a picture is of, and of its orientation. BadImage for an unknown one that is needed.

    `checked`: of the picture only, and BadImage as well if a checksum is wrong or the end is not there.
    """
    pieces, at, name = [data[:AT]], AT, b""
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if name in KEPT:
            piece = data[at:end]
            if not checked:
                pieces.append(piece)
            elif name != b"eXIf":
                if crc32(memoryview(piece)[4:-4]) != int.from_bytes(piece[-4:]):
                    raise BadImage(f"damaged: a PNG whose chunk {name!r} has another checksum")
                pieces.append(piece)
        elif not name[0] & 0x20:  # a capital: it cannot be read without
            raise BadImage(f"damaged: a PNG with the unknown chunk {name!r}")
        at = end
        if name == b"IEND":
            break
    if checked and name != b"IEND":
        raise BadImage("truncated: a PNG without its end")
    return b"".join(pieces)


def with_header(data: bytes, bits: int, color: int) -> bytes:
    """The same as another kind of pixel of as many bytes: filters see bytes, and so no difference."""
    header = data[12:24] + bytes((bits, color)) + data[26:29]
    return data[:12] + header + struct.pack(">I", crc32(header)) + data[33:]
