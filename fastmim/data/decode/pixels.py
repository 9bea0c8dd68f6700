"""What a pixel means: one rule for every format and depth, wherever pixels are read.

    sample v of a file whose samples range from lo to hi   ->   round(255 (v - lo) / (hi - lo)), halves up

    b bits, unsigned      0 .. 2^b - 1, whatever of it the picture uses
    b bits, signed        -2^(b-1) .. 2^(b-1) - 1
    netpbm                0 .. maxval of the file
    white is zero         (TIFF) turned, so that black is 0
    palette               its colors, of 8 bits; TIFF's of 16 by their upper byte
    gray for color       repeated; color for gray: Pillow's luma, 0.299 R + 0.587 G + 0.114 B
    alpha                 dropped, not blended: colors are those stored; premultiplied ones are divided first
    CMYK, YCCK            (255 - C) (255 - K) / 255 and so on; Adobe's inverted JPEGs are turned first
    ignored               orientation, color profiles, gamma; pictures after the first of a file
    refused, by name      floating-point and 32-bit samples, CIELAB, bands beyond these, what DECODE lacks

The DALI decoder leaves plain JPEGs and PNGs (`for_dali`) to DALI. All else is decoded by DECODE here, as for
the Pillow decoder, packing, statistics and evaluations: these differ in plain JPEGs only.

Limits  JPEG 2000 in color of more than 8 bits is rounded by OpenJPEG's shift: at most a level off the rule.
"""

import sys
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from fastmim.data.decode import bmp, jp2, jpeg, netpbm, png, tiff
from fastmim.data.decode.bad_image import BadImage
from fastmim.data.decode.header import read_header

MODE = {3: "RGB", 1: "L"}
OPAQUE = {"RGBA": "RGB", "RGBX": "RGB", "LA": "L", "PA": "RGB", "YCbCr": "RGB"}
LEVELS, DEEP = 255, 65535


def for_dali(data: bytes, channels: int) -> tuple[bytes, tuple[int, int]] | None:
    """What DALI decodes of a file as the rule says, and its (height, width); None of others.

    A JPEG that leaves nothing to interpretation, and a PNG of bytes of gray or RGB whose checksums are right,
    without all that is not pixels. That a file is whole `read_header` has seen.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            front = jpeg.read_front(data)
            return (data, (front.height, front.width)) if front.plain else None
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            facts = png.read_png(data)
            if facts.bits == 8 and facts.color == (png.RGB if channels == 3 else png.GRAY):
                pixels = png.only_pixels(data, checked=True)
                return pixels, (facts.height, facts.width)
    except BadImage:
        pass  # `decode` says of what kind
    return None


def decode(data: bytes, *, deep: bool = False) -> Image.Image:
    """The picture without alpha, modes 1, L, P, RGB, CMYK; BadImage, which says why, if there is none.

    `deep` gives gray of more than 8 bits as I;16 of 0 to 65535. `format` is the file's.
    """
    header = read_header(data)
    try:
        image = DECODE[header.form](data, header.facts, deep)
    except BadImage:
        raise
    except Exception as error:  # broken bytes make Pillow's plugins raise almost anything
        raise BadImage(f"{type(error).__name__}: {error}") from None
    if image.size != (header.width, header.height):
        raise BadImage(f"its header says {header.width} x {header.height} pixels, but it has {image.size}")
    if image.mode in OPAQUE:
        image = image.convert(OPAQUE[image.mode])
    image.format = header.form
    return image


def as_array(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 `[H, W, channels]` of a decoded image that is not deep."""
    assert not image.mode.startswith("I"), image.mode
    image = image if image.mode == MODE[channels] else image.convert(MODE[channels])
    return np.array(image).reshape(image.height, image.width, channels)


def decode_array(data: bytes, channels: int) -> np.ndarray:
    """The picture as uint8 `[H, W, channels]`. BadImage."""
    return as_array(decode(data), channels)


# --- whole numbers to levels --------------------------------------------------------------------------


@cache
def _table(maxval: int, levels: int) -> np.ndarray:
    values = np.arange(maxval + 1, dtype=np.int64)
    return ((2 * levels * values + maxval) // (2 * maxval)).astype(
        np.uint8 if levels == LEVELS else np.uint16
    )


def scaled(values: np.ndarray, maxval: int, levels: int = LEVELS) -> np.ndarray:
    """Whole numbers 0 to maxval as 0 to levels, rounded, halves up."""
    return values if maxval == levels else _table(maxval, levels)[values]


def _image(values_HWC: np.ndarray, maxval: int, deep: bool) -> Image.Image:
    """Of one band or two, gray and alpha, or three or four."""
    colors = values_HWC[:, :, : 1 if values_HWC.shape[2] < 3 else 3]
    if colors.shape[2] == 1:
        colors = colors[:, :, 0]
    levels = DEEP if deep and maxval > LEVELS and colors.ndim == 2 else LEVELS
    return Image.fromarray(np.ascontiguousarray(scaled(colors, maxval, levels)))


def _straight(values_HWC: np.ndarray, maxval: int) -> np.ndarray:
    """Premultiplied colors divided by their alpha, the last band, which is left out; 0 where that is 0."""
    colors, alpha = values_HWC[:, :, :-1].astype(np.int64), values_HWC[:, :, -1:].astype(np.int64)
    divided = (2 * maxval * colors + alpha) // np.maximum(2 * alpha, 1)
    return np.where(alpha > 0, np.minimum(divided, maxval), 0).astype(values_HWC.dtype)


# --- the formats --------------------------------------------------------------------------------------


def _load(image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    return image


def _kind(image: ImageFile.ImageFile) -> tuple[Any, ...]:
    """What the decoder of Pillow is told of the first tile; in front how its pixels are laid out."""
    args = image.tile[0].args
    return args if isinstance(args, tuple) else (args,)


def _lay_out(image: ImageFile.ImageFile, raw: str) -> None:
    """Have the pixels of all tiles unpacked another way."""
    args = (raw, *_kind(image)[1:])
    image.tile = [tile._replace(args=args if len(args) > 1 else raw) for tile in image.tile]


def _both_bytes(opened: Callable[[], ImageFile.ImageFile]) -> np.ndarray:
    """uint16 `[H, W, bands]` of 16-bit colors, of which Pillow unpacks one byte at a time."""
    halves = []
    for upper in (True, False):
        image = opened()
        base, order = _kind(image)[0].split(";16")
        big = order == "B" or (order == "N" and sys.byteorder == "big")
        _lay_out(image, f"{base};16{'B' if big == upper else 'L'}")  # reads the byte in front, or behind
        halves.append(np.asarray(_load(image)).astype(np.uint16))
    return halves[0] * 256 + halves[1]


def _jpeg(data: bytes, facts: jpeg.Jpeg, deep: bool) -> Image.Image:
    return _load(JpegImagePlugin.JpegImageFile(BytesIO(data)))


def _png(data: bytes, facts: png.Png, deep: bool) -> Image.Image:
    data = png.only_pixels(data)
    if facts.bits < 16:
        return _load(PngImagePlugin.PngImageFile(BytesIO(data)))
    if facts.color in (png.GRAY, png.GRAY_ALPHA):  # two bytes of gray are one of gray and one of alpha
        bytewise = png.GRAY_ALPHA if facts.color == png.GRAY else png.RGB_ALPHA
        image = PngImagePlugin.PngImageFile(BytesIO(png.with_header(data, 8, bytewise)))
        pairs = np.asarray(_load(image)).astype(np.uint16)
        return _image(pairs[:, :, 0:1] * 256 + pairs[:, :, 1:2], DEEP, deep)
    return _image(_both_bytes(lambda: PngImagePlugin.PngImageFile(BytesIO(data))), DEEP, deep)


def _webp(data: bytes, facts: Any, deep: bool) -> Image.Image:
    return _load(WebPImagePlugin.WebPImageFile(BytesIO(data)))


def _bmp(data: bytes, facts: bmp.Bmp, deep: bool) -> Image.Image:
    if facts.masks is None:
        return _load(BmpImagePlugin.BmpImageFile(BytesIO(data)))
    bands = [scaled(values, maxval) for values, maxval in bmp.samples(data, facts)]
    return Image.fromarray(np.stack(bands, axis=2).astype(np.uint8))


def _tiff(data: bytes, facts: tiff.Tiff, deep: bool) -> Image.Image:
    plain, maxval = tiff.plain_tags(data, facts), 2**facts.bits - 1

    def opened() -> ImageFile.ImageFile:
        try:
            return TiffImagePlugin.TiffImageFile(BytesIO(plain))
        except SyntaxError:
            raise BadImage(
                f"TIFF of {facts.bands} bands of {facts.bits}-bit {facts.color} with such extra samples is"
                f" not decoded; {tiff.ACCEPTED}"
            ) from None

    if facts.bits == 16 and facts.bands >= 3:
        values = _both_bytes(opened)
        if facts.color == "CMYK":
            size = values.shape[1::-1]
            return Image.frombytes("CMYK", size, scaled(values[:, :, :4], maxval).tobytes())
    else:
        file = opened()
        if facts.bits == 12:
            file._mode = "I;16"  # bits are packed alike in both orders, Pillow knows one
            _lay_out(file, "I;12")
        image = _load(file)
        if facts.bits < 8 and facts.white_is_zero:
            image = image.convert("L")
        if not (facts.bits > 8 or facts.white_is_zero or facts.signed or facts.premultiplied):
            return image
        maxval = max(maxval, LEVELS)  # of fewer bits Pillow made 8
        values = np.asarray(image)
        values = values.astype(np.uint16 if facts.bits > 8 else np.uint8).reshape(*values.shape[:2], -1)
    if facts.signed:
        values = values ^ (maxval + 1) // 2
    if facts.white_is_zero:
        values = maxval - values
    if facts.premultiplied:
        values = _straight(values, maxval)
    return _image(values, maxval, deep)


def _netpbm(data: bytes, facts: netpbm.Netpbm, deep: bool) -> Image.Image:
    return _image(netpbm.samples(data, facts), facts.maxval, deep)


def _jp2(data: bytes, facts: jp2.Jp2, deep: bool) -> Image.Image:
    one = len(facts.bits) == 1 and not facts.palette
    # bare, a codestream of one component has its depth in Pillow; wrapped, not always
    image = _load(Jpeg2KImagePlugin.Jpeg2KImageFile(BytesIO(data[facts.start :] if one else data)))
    if image.mode.startswith("I"):  # shifted up to 16 bits
        [bits] = facts.bits
        return _image(np.asarray(image)[:, :, None] >> 16 - bits, 2**bits - 1, deep)
    if image.mode == "P" or min(facts.bits) >= 8:
        return image
    values = np.asarray(image).reshape(image.height, image.width, -1)  # fewer bits are shifted up to 8
    few = [min(bits, 8) for bits in facts.bits]
    bands = [scaled(values[:, :, i] >> 8 - bits, 2**bits - 1) for i, bits in enumerate(few)]
    return Image.frombytes(image.mode, image.size, np.stack(bands, 2).tobytes())


DECODE: dict[str, Callable[[bytes, Any, bool], Image.Image]] = {
    "JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "BMP": _bmp, "TIFF": _tiff, "PPM": _netpbm, "JPEG2000": _jp2,
}  # fmt: skip
