"""An image at most so large, encoded again in its own format.

Pillow's bicubic filter, which is antialiased and the filter of the views. Colours of a palette and pixels of
one bit cannot be averaged: these become RGB or RGBA, and grey. Of what is not pixels the orientation is kept.
"""

from io import BytesIO

from PIL import Image

ORIENTATION = 0x0112  # EXIF


def resized(data: bytes, image: Image.Image, short_side: int | None, quality: int) -> bytes:
    """`data`, of which `image` is the decoded, if its short side is at most `short_side`, else it smaller."""
    if short_side is None or min(image.size) <= short_side:
        return data
    scale = short_side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    kept = Image.Exif()
    if orientation := image.getexif().get(ORIENTATION):
        kept[ORIENTATION] = orientation
    form = "JPEG" if image.format == "MPO" else image.format
    if image.mode in ("P", "PA"):  # numbers of colours cannot be averaged
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    small, file = image.resize(size, Image.Resampling.BICUBIC), BytesIO()
    small.info.clear()  # profiles, comments and thumbnails would be written
    small.save(file, form, quality=quality, **({"exif": kept} if orientation else {}))
    return file.getvalue()
