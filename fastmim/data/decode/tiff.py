"""The first picture of a TIFF: what its tags say, and its bytes as Pillow reads every meaning of them.

Pillow turns by the orientation, inverts white-is-zero at some depths only, takes signed samples for unsigned
ones, and divides by alpha in whole levels. So it is told of none of these: the tags are set to the plain
value in a copy, and `pixels` does what they say.
"""

import struct
from dataclasses import dataclass

from fastmim.data.decode.bad_image import BadImage

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION = 256, 257, 258, 259, 262, 274
SAMPLES, PLANAR, EXTRA, FORMAT = 277, 284, 338, 339
COLORS = {0: "gray", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}
OTHERS = {4: "a mask", 8: "CIELAB", 9: "ICCLAB", 10: "ITULAB", 32803: "a color filter array"}
BASE = {"gray": 1, "palette": 1, "RGB": 3, "YCbCr": 3, "CMYK": 4}  # bands without alpha
DEPTHS = {
    "gray": (1, 2, 4, 8, 12, 16),
    "palette": (1, 2, 4, 8),
    "RGB": (8, 16),
    "CMYK": (8, 16),
    "YCbCr": (8,),
}
ACCEPTED = "gray, palette, RGB, CMYK and YCbCr (JPEG) of 1 to 16 bits, with or without alpha, are"
# none, fax, LZW, JPEG, deflate, packed bits and words, LZMA, Zstandard, WebP
COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32946, 32773, 32771, 34925, 50000, 50001)
SHORT, LONG, LONG8 = 3, 4, 16
SIZES = {1: "B", SHORT: "H", LONG: "I", LONG8: "Q"}
MAX_VALUES = 64  # of a tag that is read


@dataclass(frozen=True)
class Tiff:
    """A TIFF of a kind that is decoded."""

    height: int
    width: int
    color: str  # of COLORS
    bits: int
    bands: int
    white_is_zero: bool
    signed: bool
    premultiplied: bool
    big_endian: bool
    raw: bool  # not compressed
    places: dict[int, tuple[int, str, int]]  # tag -> where its values lie, their type, how many


def read_tiff(data: bytes) -> Tiff:
    """BadImage if the first picture is of a kind that is not decoded."""
    order = ">" if data[:2] == b"MM" else "<"
    try:
        places = _places(data, order)
        tags = {
            tag: struct.unpack_from(f"{order}{n}{kind}", data, at) for tag, (at, kind, n) in places.items()
        }
    except struct.error:
        raise BadImage("damaged: the tags of a TIFF lie beyond its end") from None

    def tag(number: int, default: int) -> int:
        return int(tags[number][0]) if tags.get(number) else default

    if not tags.get(WIDTH) or not tags.get(HEIGHT):
        raise BadImage("damaged: a TIFF without width or height")
    bands, bits = tag(SAMPLES, 1), tags.get(BITS) or (1,)
    formats, extra = set(tags.get(FORMAT) or (1,)), tags.get(EXTRA) or ()
    photometric, compression, planar = tag(PHOTOMETRIC, 0), tag(COMPRESSION, 1), tag(PLANAR, 1)
    color = COLORS.get(photometric)
    base = BASE.get(color or "", 1)
    depth = f"{'/'.join(map(str, sorted(set(bits))))}-bit"

    def refuse(what: str) -> BadImage:
        return BadImage(f"TIFF of {what} is not decoded; {ACCEPTED}")

    if color is None:
        raise refuse(OTHERS.get(photometric, f"photometric interpretation {photometric}"))
    if formats - {1, 2} or len(formats) > 1:
        raise refuse("floating-point numbers" if 3 in formats else f"sample format {max(formats)}")
    if len(set(bits)) > 1 or bits[0] not in DEPTHS[color]:
        raise refuse(f"{depth} {color}")
    many = bands > base + (0 if color in ("gray", "palette", "CMYK") else 1) and bits[0] != 8
    if not base <= bands <= base + 1 + 2 * (color in ("RGB", "CMYK")) or many:
        raise refuse(f"{bands} bands of {depth} {color}")
    signed = formats == {2}
    if signed and (bits[0] not in (8, 16) or color not in ("gray", "RGB")):
        raise refuse(f"signed {depth} {color}")
    if (color == "YCbCr" and compression != 7) or compression == 6:
        raise refuse("YCbCr that is not coded as (new) JPEG")
    if compression not in COMPRESSIONS:
        raise refuse(f"compression {compression}")
    if bits[0] == 12 and order == ">" and compression != 1:
        raise refuse("compressed big-endian 12-bit gray")
    if planar == 2 and bands > 1 and (bits[0] > 8 or signed):
        raise refuse(f"{depth} {color} in planes")
    return Tiff(
        tag(HEIGHT, 0), tag(WIDTH, 0), color, bits[0], bands, color == "gray" and photometric == 0, signed,
        bool(extra) and extra[0] == 1 and bands > base, order == ">", compression == 1,
        places,
    )  # fmt: skip


def plain_tags(data: bytes, tiff: Tiff) -> bytes:
    """The bytes with tags of a TIFF that is upright, black-is-zero, unsigned, of straight alpha."""
    plain = {ORIENTATION: 1, FORMAT: 1}
    plain |= {PHOTOMETRIC: 1} if tiff.white_is_zero else {}
    plain |= {EXTRA: 2} if tiff.premultiplied else {}
    plain |= {BITS: 16} if tiff.bits == 12 and tiff.big_endian and tiff.raw else {}
    copy, order = bytearray(data), ">" if tiff.big_endian else "<"
    for tag, value in plain.items():
        if tag in tiff.places:
            at, kind, count = tiff.places[tag]
            values = [value] * count
            if tag == EXTRA:
                values[1:] = struct.unpack_from(f"{order}{count}{kind}", data, at)[1:]
            struct.pack_into(f"{order}{count}{kind}", copy, at, *values)
    return bytes(copy)


def _places(data: bytes, order: str) -> dict[int, tuple[int, str, int]]:
    """Where the values of the first directory's tags of whole numbers lie."""
    big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    word, inline, entry = ("Q", 8, 20) if big else ("I", 4, 12)
    (at,) = struct.unpack_from(f"{order}{word}", data, 8 if big else 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, at)
    at += 8 if big else 2
    if at + count * entry > len(data):
        raise struct.error
    places = {}
    for start in range(at, at + count * entry, entry):
        tag, kind, num = struct.unpack_from(f"{order}HH{word}", data, start)
        if kind in SIZES and 0 < num <= MAX_VALUES:
            where = start + entry - inline
            if num * struct.calcsize(SIZES[kind]) > inline:
                (where,) = struct.unpack_from(f"{order}{word}", data, where)
            places[tag] = where, SIZES[kind], num
    wanted = (WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES, PLANAR, EXTRA, FORMAT)
    return {tag: places[tag] for tag in wanted if tag in places}
