"""What our decoders make of files, whole and of a box; every kind of file against Pillow's conversion to RGB.

Of 16-bit gray that conversion keeps the levels to 255 and makes white of the rest: there ours is held against
what the levels are, scaled, and the difference to Pillow's conversion is said beside it.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.pipeline import parity_reference as reference
from benchmarks.provenance import DEVICE
from fastmim.data.augment.draws import Draws
from fastmim.data.decode.choose import DecoderName, make_decoder
from fastmim.data.decode.contract import Rejected, Request
from fastmim.data.decode.header import image_size
from fastmim.views import Crop

BATCH = 16  # whole images that DALI holds at a time
SIDE = 96
ORIENTATION = 0x0112  # EXIF
# what is done, and why Pillow may do another thing
CONVENTIONS = {
    "JPEG": "as stored",
    "JPEG, 4:4:4": "as stored",
    "JPEG, progressive": "all scans",
    "JPEG, grayscale": "repeated in three channels",
    "JPEG, CMYK": "RGB = (1 - CMY) (1 - K), no color profile",
    "JPEG, turned by EXIF": "EXIF is ignored, as torchvision does",
    "PNG": "as stored",
    "PNG, alpha": "alpha is dropped, not blended",
    "PNG, gray and alpha": "alpha is dropped, not blended",
    "PNG, palette": "the colors looked up",
    "PNG, palette, transparent": "the colors looked up, transparency is dropped",
    "PNG, 16-bit gray": "scaled by 1/257, where Pillow's conversion clips at 255",
    "PNG, one bit": "0 and 255",
    "WebP": "as stored",
    "WebP, lossless, alpha": "alpha is dropped, not blended",
    "BMP": "as stored",
    "TIFF": "as stored",
    "JPEG 2000": "as stored",
}


# --- our side -----------------------------------------------------------------------------------------


def decode(
    decoder: DecoderName, data: Sequence[bytes], boxes_B4: np.ndarray | None = None, channels: int = 3
) -> Iterator[Tensor]:
    """Decoded images uint8 `[H, W, C]`, or the boxes of them, as they come before the resize."""
    if boxes_B4 is None:
        boxes_B4 = np.array([[0, 0, *image_size(x)] for x in data], np.int32)
    if decoder == "pillow":
        for one, box in zip(data, boxes_B4, strict=True):
            yield view_of(decoder, one, box, channels)
        return
    crops = [Crop(size=(1, 1))]
    with closing(
        make_decoder(
            "dali", crops, batch=BATCH, channels=channels, threads=1, depth=1, device=torch.device(DEVICE)
        )
    ) as dali:
        for start in range(0, len(data), BATCH):
            some = slice(start, start + BATCH)
            boxes = boxes_B4[some]
            dali.submit(Request(list(data[some]), Draws({0: boxes}, {0: np.zeros(len(boxes), bool)}, {}, {})))
            yield from (image.cpu() for image in dali.decoded()[0])


def view_of(decoder: DecoderName, data: bytes, box: np.ndarray, channels: int = 3) -> Tensor:
    """A crop as large as its box, which the resize leaves as it is. Rejected if it cannot be decoded."""
    height, width = box[2:].tolist()
    one = make_decoder(
        decoder,
        [Crop(size=(height, width))],
        batch=1,
        channels=channels,
        threads=1,
        depth=1,
        device=torch.device(DEVICE),
    )
    try:
        one.submit(Request([data], Draws({0: box[None]}, {0: np.array([False])}, {}, {})))
        return one.result()[0][0]
    finally:
        one.close()


# --- every kind ---------------------------------------------------------------------------------------


def kinds_of(photograph: Image.Image) -> dict[str, bytes]:
    """One picture as a file of each kind; what is transparent is a ramp across it."""
    rgb = photograph.convert("RGB").resize((SIDE, SIDE * 3 // 4), Image.Resampling.BICUBIC)
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, rgb.width).astype(np.uint8), (rgb.height, 1)))
    gray, rgba, turned = rgb.convert("L"), rgb.copy(), Image.Exif()
    rgba.putalpha(ramp)
    turned[ORIENTATION] = 6
    deep = Image.fromarray((np.asarray(gray, np.uint16) * 257 + np.asarray(ramp)).clip(0, 65535))
    palette = rgb.quantize(64)
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "JPEG": (rgb, "JPEG", {}),
        "JPEG, 4:4:4": (rgb, "JPEG", {"subsampling": 0}),
        "JPEG, progressive": (rgb, "JPEG", {"progressive": True}),
        "JPEG, grayscale": (gray, "JPEG", {}),
        "JPEG, CMYK": (rgb.convert("CMYK"), "JPEG", {}),
        "JPEG, turned by EXIF": (rgb, "JPEG", {"exif": turned}),
        "PNG": (rgb, "PNG", {}),
        "PNG, alpha": (rgba, "PNG", {}),
        "PNG, gray and alpha": (rgba.convert("LA"), "PNG", {}),
        "PNG, palette": (palette, "PNG", {}),
        "PNG, palette, transparent": (palette, "PNG", {"transparency": bytes(range(0, 256, 4))}),
        "PNG, 16-bit gray": (deep, "PNG", {}),
        "PNG, one bit": (gray.convert("1"), "PNG", {}),
        "WebP": (rgb, "WEBP", {}),
        "WebP, lossless, alpha": (rgba, "WEBP", {"lossless": True, "exact": True}),
        "BMP": (rgb, "BMP", {}),
        "TIFF": (rgb, "TIFF", {}),
        "JPEG 2000": (rgb, "JPEG2000", {}),
    }
    files = {}
    for name, (image, form, options) in made.items():
        file = BytesIO()
        image.save(file, form, **options)
        files[name] = file.getvalue()
    return files


def compare_kinds(decoders: Sequence[DecoderName], photograph: Image.Image) -> Iterator[dict[str, Any]]:
    """A row for each kind and decoder: the difference to Pillow, or why it is refused."""
    for kind, data in kinds_of(photograph).items():
        converted = np.asarray(reference.decoded(data), np.int16)
        theirs = scaled(data) if "16-bit" in kind else converted
        for decoder in decoders:
            row: dict[str, Any] = {
                "kind": "file",
                "file": kind,
                "decoder": decoder,
                "convention": CONVENTIONS[kind],
            }
            try:
                ours = view_of(decoder, data, np.array([0, 0, *image_size(data)], np.int32))
            except Rejected as rejected:
                yield {**row, "refused": rejected.slots[0]}
                continue
            error, other = (np.abs(ours.cpu().numpy() - x) for x in (theirs, converted))
            row |= {"mae": float(error.mean()), "largest": int(error.max())}
            yield {**row, "mae_to_conversion": float(other.mean())}


def scaled(data: bytes) -> np.ndarray:
    """16-bit levels as bytes, in three channels."""
    with Image.open(BytesIO(data)) as image:
        levels = np.rint(np.asarray(image) / 257)
    return np.repeat(levels[..., None], 3, axis=2).astype(np.int16)
