"""A JPEG 2000: bits of its components, from its codestream, which a JP2 file wraps or which is bare."""

import struct
from dataclasses import dataclass

from fastmim.data.decode.bad_image import BadImage

START = b"\xff\x4f\xff\x51"
SPACES = {12: "CMYK", 16: "sRGB", 17: "gray", 18: "sYCC"}


@dataclass(frozen=True)
class Jp2:
    """What SIZ says."""

    height: int
    width: int
    bits: tuple[int, ...]  # of each component
    start: int  # of the codestream
    palette: bool


def read_jp2(data: bytes) -> Jp2:
    """BadImage for one of a kind that is not decoded."""
    start, end = 0, len(data)
    header = data[:0]
    while not data.startswith(START, start):
        if start + 8 > end:
            raise BadImage("truncated: a JPEG 2000 without its codestream")
        length, name = struct.unpack_from(">I4s", data, start)
        skip = 8
        if length == 1:
            (length,), skip = struct.unpack_from(">Q", data, start + 8), 16
        if name == b"jp2h":
            header = data[start + skip : start + length]
        if name == b"jp2c":
            start += skip
            if not data.startswith(START, start):
                raise BadImage("damaged: the codestream of a JPEG 2000 does not begin as one")
        elif length < skip:
            raise BadImage("damaged: a box of a JPEG 2000 without a length")
        else:
            start += length
    right, bottom, left, top = struct.unpack_from(">IIII", data, start + 8)
    (num,) = struct.unpack_from(">H", data, start + 40)
    depths = data[start + 42 : start + 42 + 3 * num : 3]
    bits = tuple((depth & 0x7F) + 1 for depth in depths)
    if not 1 <= num <= 4 or len(bits) < num or max(bits) > 16:
        raise BadImage(
            f"JPEG 2000 of {num} components of {max(bits, default=0)} bits is not decoded;"
            " 1 to 4 of 1 to 16 are"
        )
    at = header.find(b"colr")
    if at >= 0 and header[at + 4 : at + 5] == b"\1":
        space = int.from_bytes(header[at + 7 : at + 11])
        if space not in SPACES:
            raise BadImage(
                f"JPEG 2000 of color space {space} is not decoded; {', '.join(SPACES.values())} are"
            )
    return Jp2(bottom - top, right - left, bits, start, b"pclr" in header)
