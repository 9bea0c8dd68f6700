"""What is asked of the bytes of an image before they are decoded: that they are one, and its size.

The answer is a property of the file alone, never of the box that is cut from it: a decoder that reads only
the rows of a box would take the upper half of a truncated JPEG for a good image in one epoch and refuse
it in the next.
"""

from io import BytesIO

from PIL import Image, UnidentifiedImageError

# what DALI decodes; Pillow is held to the same, so that both refuse the same files
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".png", ".webp", ".bmp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
)  # fmt: skip

START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that say how a JPEG is coded
DECODED = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # baseline, extended, progressive; with arithmetic coding
STARTS = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP", b"BM": "BMP", b"II*\0": "TIFF",
    b"MM\0*": "TIFF", b"P5": "PPM", b"P6": "PPM", b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cjP": "JPEG2000",
}  # fmt: skip


class BadImage(Exception):
    """The bytes are no image that can be decoded; the message says why."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as stored: EXIF orientation is ignored. BadImage if it is not an image."""
    if not data:
        raise BadImage("empty file")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            (width, height), is_jpeg = image.size, image.format in ("JPEG", "MPO")
    except UnidentifiedImageError:
        raise BadImage(_why_unidentified(data)) from None
    except Exception as error:  # a broken header makes Pillow's plugins raise almost anything
        raise BadImage(f"header: {type(error).__name__}: {error}") from None
    if height < 1 or width < 1:
        raise BadImage(f"header says {height} x {width} pixels")
    if is_jpeg:
        frame = jpeg_frame(data)
        if frame and frame[0] not in DECODED:
            raise BadImage(f"JPEG of a kind that is not decoded, lossless or hierarchical (0x{frame[0]:x})")
        # a thumbnail has an end of its own, so the last scan must start before the last end; both
        # searches are short in a good file, whose end is at its end
        end = data.rfind(END_OF_IMAGE)
        if end < 0 or data.find(START_OF_SCAN, end) >= 0:
            raise BadImage("truncated: JPEG without its end marker")
    return height, width


def jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """Marker, height and width of the frame header of a JPEG; None if there is none before its first scan."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in FRAMES:
            return marker, int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
        if marker == START_OF_SCAN[1]:
            return None
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])  # fill bytes may precede one
    return None


def _why_unidentified(data: bytes) -> str:
    """What is wrong with bytes that Pillow does not know."""
    known = next((name for start, name in STARTS.items() if data.startswith(start)), None)
    if known is None:
        return f"no header of {', '.join(FORMATS)}; starts with {data[:8]!r}"
    size = (1, 1)
    if known == "PNG":
        size = int.from_bytes(data[20:24]), int.from_bytes(data[16:20])
    elif known == "JPEG" and (frame := jpeg_frame(data)):
        size = frame[1:]
    if 0 in size:
        return f"header says {size[0]} x {size[1]} pixels"
    return f"starts as {known} does, but its header is damaged: no size can be read"
