"""A BMP: what its header says, and pixels of 16 and 32 bits, whose channels lie where masks say."""

import struct
from dataclasses import dataclass

import numpy as np

from fastmim.data.decode.bad_image import BadImage

RGB, RLE8, RLE4, BITFIELDS, ALPHA_BITFIELDS = 0, 1, 2, 3, 6
DEFAULT = {16: (0x7C00, 0x3E0, 0x1F), 32: (0xFF0000, 0xFF00, 0xFF)}


@dataclass(frozen=True)
class Bmp:
    """The header of a BMP; pixels begin at byte `start`."""

    height: int
    width: int
    bits: int
    start: int
    upwards: bool
    masks: tuple[int, ...] | None  # of red, green, blue, where bits are 16 or 32


def read_bmp(data: bytes) -> Bmp:
    """BadImage for one of a kind that is not decoded."""
    start, size = struct.unpack_from("<II", data, 10)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = RGB
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression not in (RGB, RLE8, RLE4, BITFIELDS, ALPHA_BITFIELDS) or bits not in (1, 4, 8, 16, 24, 32):
        raise BadImage(
            f"BMP of {bits} bits and compression {compression} is not decoded; 1 to 32 bits, RLE are"
        )
    masks: tuple[int, ...] | None = DEFAULT.get(bits)
    if masks and compression in (BITFIELDS, ALPHA_BITFIELDS):
        masks = struct.unpack_from("<III", data, 54)
    if masks and not all(mask and (mask // (mask & -mask) + 1).bit_count() == 1 for mask in masks):
        raise BadImage(f"BMP with the masks {masks} is not decoded; each must be one run of bits")
    return Bmp(abs(height), width, bits, start, height > 0, masks)


def samples(data: bytes, bmp: Bmp) -> list[tuple[np.ndarray, int]]:
    """Red, green and blue of 16 or 32 bits: whole numbers `[H, W]`, and the largest that fits."""
    assert bmp.masks
    size = bmp.bits // 8
    row = -(-bmp.width * size // 4) * 4
    if len(data) < bmp.start + row * bmp.height:
        raise BadImage(f"truncated: want {bmp.start + row * bmp.height} bytes of a BMP, got {len(data)}")
    rows = np.frombuffer(data, np.uint8, row * bmp.height, bmp.start).reshape(bmp.height, row)
    pixels = rows[:: -1 if bmp.upwards else 1, : bmp.width * size].copy().view(f"<u{size}")
    lows = [mask & -mask for mask in bmp.masks]
    return [((pixels & mask) // low, mask // low) for mask, low in zip(bmp.masks, lows, strict=True)]
