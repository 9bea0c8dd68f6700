"""An image at most so large, encoded again in its own format.

Pillow's bicubic filter, which is antialiased and the filter of the crops, on the pixels that the crops show:
alpha is dropped, and what lies deep is by the rule of `pixels`; gray of more than 8 bits keeps 16. Colors of
a palette and pixels of one bit cannot be averaged: these become RGB and gray. Of what is not pixels the
orientation is kept.
"""

from io import BytesIO

from PIL import Image

from fastmim.data.decode import png

ORIENTATION = 0x0112  # EXIF


def resized(data: bytes, image: Image.Image, short_side: int | None, quality: int) -> bytes:
    """`data`, of which `image` is the decoded, if its short side is at most `short_side`, else it smaller."""
    if short_side is None or min(image.size) <= short_side:
        return data
    scale = short_side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    kept, form = Image.Exif(), image.format
    orientation = _orientation(data, form)
    if image.mode in ("P", "1"):  # numbers of colors cannot be averaged
        image = image.convert("RGB" if image.mode == "P" else "L")
    if orientation:
        kept[ORIENTATION] = orientation
    small, file = image.resize(size, Image.Resampling.BICUBIC), BytesIO()
    small.info.clear()  # profiles, comments and thumbnails would be written
    small.save(file, form, quality=quality, **({"exif": kept} if orientation else {}))
    return file.getvalue()


def _orientation(data: bytes, form: str | None) -> int | None:
    """The EXIF orientation of a file, or none that can be read."""
    try:
        with Image.open(BytesIO(png.only_pixels(data) if form == "PNG" else data)) as opened:
            return opened.getexif().get(ORIENTATION)
    except Exception:  # it is not of the pixels: a picture without it is whole
        return None
