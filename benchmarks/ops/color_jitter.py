"""The colors of one batch of 224 pixels: SimSiam's jitter and grayscale, BYOL's blur.

Question   what do two launches for a whole batch, or passes over bytes that stay in the cache, save over
           Pillow, image by image, whose pixels they are?
Expected   jitter: an integer division or eight for each pixel's hue, twice where contrast comes behind it,
           against nine bytes moved: on a GPU arithmetic weighs as much as bandwidth, half of a copy's. Blur:
           six launches, each of which reads and writes all: a tenth. On a CPU several times Pillow's speed,
           whose stages make a new image each and its blur one value at a time.
Baselines  "eager" is the reference, image by image; "pillow" is what torchvision's ColorJitter and
           RandomGrayscale call, from arrays and back, on a CPU alone.
Check      the reference on the CPU; all agree to the last bit.
Bytes      the images read and written once.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from fastmim_kernels import color_blur, color_jitter, sample_seeds
from fastmim_kernels.color_blur import color_blur_reference
from fastmim_kernels.color_jitter import color_jitter_reference
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE
from fastmim.data.augment.color import ColorDraws, draw_colors
from fastmim.views import BYOL_FIRST, SIMSIAM

IMAGES = [64, 512] if DEVICE == "cuda" else [16]
SIDE = 224
Run = Callable[[Tensor, ColorDraws], Tensor]


def eager_jitter(images: Tensor, d: ColorDraws) -> Tensor:
    return color_jitter_reference(images, d.order_B4, d.factors_B4, d.gray_B, d.solarize_B)


def pillow_jitter(images: Tensor, d: ColorDraws) -> Tensor:
    from PIL import Image, ImageEnhance

    enhance = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    out = torch.empty_like(images)
    for b, image in enumerate(images):
        x = Image.fromarray(image.numpy())
        for stage in d.order_B4[b].tolist():
            factor = d.factors_B4[b, stage].item()
            if stage == 3:
                h, s, v = x.convert("HSV").split()
                h = Image.fromarray(np.asarray(h) + np.int32(factor * 255).astype(np.uint8))
                x = Image.merge("HSV", (h, s, v)).convert("RGB")
            elif stage >= 0:
                x = enhance[stage](x).enhance(factor)
        x = x.convert("L").convert("RGB") if d.gray_B[b] else x
        out[b] = torch.from_numpy(np.array(x))
    return out


def pillow_blur(images: Tensor, d: ColorDraws) -> Tensor:
    from PIL import Image, ImageFilter

    blurred = [
        Image.fromarray(image.numpy()).filter(ImageFilter.GaussianBlur(sigma))
        for image, sigma in zip(images, d.sigmas_B.tolist(), strict=True)
    ]
    return torch.stack([torch.from_numpy(np.array(x)) for x in blurred])


GROUPS: dict[str, dict[str, Run]] = {
    "jitter": {
        "eager": eager_jitter,
        "pillow": pillow_jitter,
        "fastmim": lambda x, d: color_jitter(x, d.order_B4, d.factors_B4, gray_B=d.gray_B),
    },
    "blur": {
        "eager": lambda x, d: color_blur_reference(x, d.sigmas_B, d.solarize_B),
        "pillow": pillow_blur,
        "fastmim": lambda x, d: color_blur(x, d.sigmas_B),
    },
}


def absent(provider: str) -> str | None:
    if provider != "pillow":
        return None
    if DEVICE == "cuda":
        return "it works on the host"
    return None if importlib.util.find_spec("PIL") else "pillow is not installed"


def photographs(images: int) -> Tensor:
    """Smooth, with all levels: noise of 14 pixels made larger, and a little of 224."""
    coarse = torch.rand(images, 3, 14, 14)
    smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    noisy = 250 * smooth + 16 * torch.rand(images, 3, SIDE, SIDE) - 8
    return noisy.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def run(call: Run, images: Tensor, draws: ColorDraws) -> tuple[Tensor, ...]:
    return (call(images, draws),)


def oracle(call: Run, images: Tensor, draws: ColorDraws) -> tuple[Tensor, ...]:
    return (call(images.cpu(), draws).to(DEVICE),)


def cases() -> Iterator[list[Case]]:
    for count in IMAGES:
        images, seeds = photographs(count).to(DEVICE), sample_seeds(0, 0, torch.arange(count))
        for mode, providers in GROUPS.items():
            draws = draw_colors(seeds, SIMSIAM if mode == "jitter" else BYOL_FIRST)
            yield [
                Case(
                    op="color_jitter",
                    provider=provider,
                    mode=mode,
                    shape={"B": count, "H": SIDE, "W": SIDE, "C": 3},
                    dtype="uint8",
                    bytes_moved=2 * images.numel(),
                    run=partial(run, call, images, draws),
                    oracle=partial(oracle, providers["eager"], images, draws),
                    absent=absent(provider),
                )
                for provider, call in providers.items()
            ]
