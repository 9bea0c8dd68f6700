"""Are our pixels those of Pillow and torchvision? Stage by stage, on the images of a folder.

python -m benchmarks.pipeline.parity IMAGENET/train --images 100

Question   where does an image differ, from the bytes of its file to the crop that a method sees, from what
           torchvision's transforms make of it on PIL images, and by how much? Do boxes follow the same law?
           What becomes of files that are no plain JPEG?
Expected   equal to the last bit, but for the decoder where DALI's is not Pillow's, and for boxes that Pillow
           13 resizes columns first.
Check      each stage has the same input and the same draws on both sides. The status is 1 if a stage that is
           to be equal is not, or if a p-value is below 1e-4.
Writes     parity.md and parity.png anew, rows to parity.jsonl.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastmim_kernels import resized_crop, sample_seeds
from PIL import Image
from torch import Tensor

from benchmarks.pipeline import parity_boxes, parity_files, parity_page
from benchmarks.pipeline import parity_reference as reference
from benchmarks.provenance import DEVICE, RESULTS, ROOT, append, environment
from fastmim.data import Images, find_images, why_no_dali
from fastmim.data.augment.color import apply_colors, draw_colors
from fastmim.data.augment.crop import draw_boxes
from fastmim.data.augment.draws import Draws, draw_crops
from fastmim.data.decode.choose import DecoderName, make_decoder
from fastmim.data.decode.contract import Request
from fastmim.data.decode.header import BadImage, image_size
from fastmim.views import BYOL_SECOND, C_MAE, Color, Crop, Interpolation

SAMPLE = ROOT.parent / "shared" / "data" / "imagenet-sample-100.tar"
LEAST_P = 1e-4  # of fifteen tests: a sound law is below it once in 700 runs
RESIZES: tuple[tuple[Interpolation, int], ...] = (("bicubic", 224), ("bilinear", 224), ("lanczos", 112))
PLAIN = Crop(size=(224, 224))
ALONE = {
    "brightness": Color(brightness=0.4, jitter=1.0),
    "contrast": Color(contrast=0.4, jitter=1.0),
    "saturation": Color(saturation=0.4, jitter=1.0),
    "hue": Color(hue=0.1, jitter=1.0),
    "grayscale": Color(gray=1.0),
    "blur": Color(blur=1.0),
    "solarize": Color(solarize=1.0),
}
CHAINS = {
    "MAE": PLAIN,
    "C-MAE": Crop(size=(224, 224), color=C_MAE),
    "BYOL, second": Crop(size=(224, 224), scale=(0.08, 1.0), color=BYOL_SECOND),
    "BEiT, second": Crop(size=(112, 112), scale=(0.08, 1.0), interpolation="lanczos"),
}
PILLOW, VISION = "Pillow", "torchvision"


@dataclass(frozen=True)
class Sample:
    name: str
    data: bytes
    key_1: Tensor  # int64 [1]
    size_12: np.ndarray  # height and width
    image: Image.Image  # as Pillow decodes it


def samples_of(images: Images, count: int) -> Iterator[Sample]:
    """The first `count` images, with the keys of epoch 0 and seed 0. Files that Pillow refuses are named."""
    for i in range(min(count, len(images))):
        try:
            data = images.read(i)
            key, size = sample_seeds(0, 0, torch.tensor([i])), np.array([image_size(data)])
            yield Sample(Path(images.names[i]).stem, data, key, size, reference.decoded(data))
        except (BadImage, OSError) as error:
            print(f"left out: {images.names[i]}: {error}", file=sys.stderr)


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).to(DEVICE)


# --- the stages ---------------------------------------------------------------------------------------


def compare_decoders(samples: Sequence[Sample], found: reference.Comparisons) -> None:
    """What our decoders make of a file, whole and of a box, in color and in gray."""
    boxes = [draw_boxes(s.key_1, s.size_12, PLAIN)[0] for s in samples]
    for decoder in decoders():
        equal = decoder == "pillow"
        for channels, mode in ((3, "RGB"), (1, "L")):
            wholes = parity_files.decode(decoder, [s.data for s in samples], channels=channels)
            for s, ours in zip(samples, wholes, strict=True):
                stage = f"decode{'' if channels == 3 else ' to gray'}, {decoder}"
                theirs = s.image if channels == 3 else reference.decoded(s.data, mode)
                found.add(stage, PILLOW, s.name, ours, theirs, equal)
        cuts = parity_files.decode(decoder, [s.data for s in samples], np.concatenate(boxes))
        for s, box, ours in zip(samples, boxes, cuts, strict=True):
            top, left, height, width = box[0].tolist()
            theirs = s.image.crop((left, top, left + width, top + height))
            found.add(f"decode a box, {decoder}", PILLOW, s.name, ours, theirs, equal)


def compare_resizes(s: Sample, found: reference.Comparisons) -> Image.Image:
    """Box, resize and flip of the same pixels. The crop without flip, as torchvision makes it."""
    (boxes, _), yes = draw_boxes(s.key_1, s.size_12, PLAIN), torch.tensor([True])
    box = tuple(boxes[0].tolist())
    for filter, side in RESIZES:
        size, cut = (side, side), torch.from_numpy(boxes).long()
        ours = resized_crop([pixels(s.image)], cut, size, filter=filter)[0]
        stage, crop = f"crop and resize, {filter} to {side}", (s.image, box, size, filter)
        found.add(stage, f"{PILLOW}, rows first", s.name, ours, reference.cropped_rows_first(*crop))
        found.add(stage, VISION, s.name, ours, reference.cropped(*crop), False)
    ours = resized_crop([pixels(s.image)], torch.from_numpy(boxes).long(), PLAIN.size, flips_B=yes)[0]
    theirs = reference.cropped_rows_first(s.image, box, PLAIN.size, "bicubic")
    found.add("flip", VISION, s.name, ours, reference.flipped(theirs))
    return reference.cropped(s.image, box, PLAIN.size, "bicubic")


def compare_colors(s: Sample, crop: Image.Image, found: reference.Comparisons) -> None:
    """Each color alone, on the same crop with the same factor."""
    for name, color in ALONE.items():
        draws = draw_colors(s.key_1, color)
        ours = apply_colors(pixels(crop)[None], draws)[0]
        found.add(name, "PIL" if name == "blur" else VISION, s.name, ours, reference.colored(crop, draws, 0))
        if name == "blur":
            sampled = reference.sampled_blur(crop, draws.sigmas_B[0].item())
            found.add(name, f"{VISION}, 23 taps", s.name, ours, sampled, False)


def compare_chains(samples: Sequence[Sample], found: reference.Comparisons) -> list[tuple[Any, ...]]:
    """From the bytes to the crop, as a run has it. Rows (name, original, ours, theirs) for the picture."""
    pictures = []
    for decoder, (chain, crop) in itertools.product(decoders(), CHAINS.items()):
        running = make_decoder(
            decoder, [crop], batch=1, channels=3, threads=1, depth=1, device=torch.device(DEVICE)
        )
        for s in samples:
            draws, stage = draw_crops(s.key_1, s.size_12, [crop]), f"the whole chain, {chain}, {decoder}"
            running.submit(Request([s.data], draws))
            ours = running.result()[0][0]
            rows_first = chain_of(s.image, crop, draws, reference.cropped_rows_first)
            found.add(stage, f"{VISION}, rows first", s.name, ours, rows_first, decoder == "pillow")
            theirs = chain_of(s.image, crop, draws, reference.cropped)
            found.add(stage, VISION, s.name, ours, theirs, False)
            if decoder == decoders()[0]:
                pictures.append((chain, s.name, s.image, ours.cpu().numpy(), np.asarray(theirs)))
        running.close()
    return pictures


def chain_of(image: Image.Image, crop: Crop, draws: Draws, cut: Callable[..., Image.Image]) -> Image.Image:
    """What torchvision makes of the same draws, with one of the two crops."""
    image = cut(image, tuple(draws.boxes[0][0].tolist()), crop.size, crop.interpolation)
    image = reference.flipped(image) if draws.flips[0][0] else image
    return reference.colored(image, draws.colors[0], 0) if draws.colors else image


def decoders() -> list[DecoderName]:
    return ["pillow"] if why_no_dali() else ["dali", "pillow"]


# --- command ------------------------------------------------------------------------------------------


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What should not be, in words."""
    said = []
    for row in rows:
        if row["kind"] == "stage" and row["expect_equal"] and row["equal_share"] < 1:
            said.append(f"{row['stage']} is not that of {row['reference']}: worst {row['worst']}")
        if row["kind"] == "boxes" and row["p"] < LEAST_P:
            said.append(f"boxes of {row['law']} have another {row['quantity']}: p = {row['p']:.2g}")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=SAMPLE, help="images, as --data.path")
    parser.add_argument("--images", type=int, default=100, help="the first so many")
    parser.add_argument("--draws", type=int, default=100_000, help="of boxes, for each law")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page and the rows")
    a = parser.parse_args(arguments)
    if min(a.images, a.draws) < 1:
        parser.error(f"want at least one image and one draw, got {a.images} and {a.draws}")
    try:
        samples = list(samples_of(find_images(a.folder), a.images))
    except ValueError as error:
        parser.error(str(error))
    if not samples:
        parser.error(f"want images that Pillow can read, got none in {a.folder}")
    rows, pictures = measured(samples, a.draws)
    env = environment()
    for row in rows:
        append(a.results / "parity.jsonl", {**row, "source": a.folder.name, **env})
    text = parity_page.page(rows, env, a.folder.name)
    (a.results / "parity.md").write_text(text)
    parity_page.draw(pictures, a.results / "parity.png")
    print(text)
    for said in (wrong := failures(rows)):
        print(f"FAILED: {said}", file=sys.stderr)
    return 1 if wrong else 0


def measured(samples: Sequence[Sample], draws: int) -> tuple[list[dict[str, Any]], list[tuple[Any, ...]]]:
    """All rows, and what the picture is made of."""
    found = reference.Comparisons()
    compare_decoders(samples, found)
    for s in samples:
        compare_colors(s, compare_resizes(s, found), found)
    pictures = compare_chains(samples, found)
    rows = [*found.rows()]
    rows += parity_boxes.compare_boxes(np.concatenate([s.size_12 for s in samples]), draws)
    rows += parity_files.compare_kinds(decoders(), samples[0].image)
    rows += parity_page.speeds(torch.stack([pixels(x) for x in parity_page.squares(samples)]))
    return rows, pictures


if __name__ == "__main__":
    sys.exit(main())
