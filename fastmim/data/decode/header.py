"""What is asked of the bytes of an image before they are decoded: that they are one we take, and its size.

The answer is a property of the file alone, never of the box that is cut from it: a decoder that reads only
the rows of a box would take the upper half of a truncated JPEG for a good image in one epoch and refuse
it in the next. It is asked by content, whatever the file is called, and is the same for every decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import WebPImagePlugin

from fastmim.data.decode import bmp, jp2, jpeg, netpbm, png, tiff
from fastmim.data.decode.bad_image import BadImage as BadImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".png", ".webp", ".bmp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
)  # fmt: skip
STARTS = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"RIFF": "WEBP", b"BM": "BMP", b"II*\0": "TIFF",
    b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF", b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
} | {b"P%d" % i: "PPM" for i in range(1, 8)}  # fmt: skip
OTHERS = {  # pictures that are not decoded
    b"GIF8": "GIF", b"Pf": "PFM (floating-point numbers)", b"PF": "PFM (floating-point numbers)",
    b"\xff\n": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"8BPS": "Photoshop's", b"\0\0\1\0": "an icon's",
    b"<svg": "SVG", b"%PDF": "PDF", b"v/1\1": "OpenEXR", b"#?RADIANCE": "Radiance's HDR", b"SIMPLE": "FITS",
    b"IIU\0": "Panasonic's raw", b"II\xbc\1": "JPEG XR", b"DDS ": "DDS", b"qoif": "QOI",
}  # fmt: skip
MAX_PIXELS = 178_956_970  # more is no picture but an attack on memory: Pillow's limit


@dataclass(frozen=True)
class Header:
    """What the header of a whole image of a format that is decoded says."""

    form: str  # of FORMATS
    height: int
    width: int
    facts: Any  # what its own module reads


@dataclass(frozen=True)
class _WebP:
    height: int
    width: int


def _read_webp(data: bytes) -> _WebP:
    width, height = WebPImagePlugin.WebPImageFile(BytesIO(data)).size
    return _WebP(height, width)


READ: dict[str, Callable[[bytes], Any]] = {
    "JPEG": jpeg.read_jpeg,
    "PNG": png.read_png,
    "WEBP": _read_webp,
    "BMP": bmp.read_bmp,
    "TIFF": tiff.read_tiff,
    "PPM": netpbm.read_netpbm,
    "JPEG2000": jp2.read_jp2,
}


def read_header(data: bytes) -> Header:
    """BadImage, with the reason and what is accepted, if it is not an image that is decoded."""
    if not data:
        raise BadImage("empty file")
    form = next((name for start, name in STARTS.items() if data.startswith(start)), None)
    if form is None:
        raise BadImage(_what_it_is(data))
    try:
        facts = READ[form](data)
    except BadImage:
        raise
    except Exception as error:  # a broken header makes Pillow's plugins raise almost anything
        raise BadImage(f"damaged header of a {form}: {type(error).__name__}: {error}") from None
    height, width = facts.height, facts.width
    if height < 1 or width < 1:
        raise BadImage(f"header says {height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise BadImage(f"header says {height} x {width} pixels, more than the {MAX_PIXELS} that are decoded")
    return Header(form, height, width, facts)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as stored: orientation is ignored. BadImage if it is not decoded."""
    header = read_header(data)
    return header.height, header.width


def _what_it_is(data: bytes) -> str:
    """What is wrong with bytes that are of none of the formats."""
    accepted = ", ".join(FORMATS)
    other = next((name for start, name in OTHERS.items() if data.lstrip().startswith(start)), None)
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("ascii", "replace")
        other = {"avif": "AVIF", "avis": "AVIF"}.get(brand, f"HEIF or video ({brand})")
    if other:
        return f"{other} format is not decoded; {accepted} are"
    return f"no header of {accepted}; starts with {data[:8]!r}"
