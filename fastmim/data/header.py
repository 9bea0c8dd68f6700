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
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2",
)  # fmt: skip

START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"


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
        raise BadImage(f"no header of {', '.join(FORMATS)}; starts with {data[:8]!r}") from None
    except Exception as error:  # a broken header makes Pillow's plugins raise almost anything
        raise BadImage(f"header: {type(error).__name__}: {error}") from None
    if height < 1 or width < 1:
        raise BadImage(f"header says {height} x {width} pixels")
    if is_jpeg:
        # a thumbnail has an end of its own, so the last scan must start before the last end; both
        # searches are short in a good file, whose end is at its end
        end = data.rfind(END_OF_IMAGE)
        if end < 0 or data.find(START_OF_SCAN, end) >= 0:
            raise BadImage("truncated: JPEG without its end marker")
    return height, width
