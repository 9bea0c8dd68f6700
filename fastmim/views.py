"""What passes from the data to a method: uint8 crops of each sample, and the seeds of its random draws.

A method says which `Crop`s it wants and in which order; the data deliver a `Batch` that holds them in
that order. Neither side knows the other. Numbers say what crops share:

    box    what is cut out of the image, and the flip: C-MAE's two crops, BEiT's image and its half-size copy
           have one; the crops of DINO, iBOT and MoCo v3 one each
    draw   the colors, RandAugment, and the corner of a window: BEiT's two have one, C-MAE's one each
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Interpolation = Literal["bicubic", "bilinear", "lanczos"]
Augmentation = Literal["recipe", "strong"]


@dataclass(frozen=True, kw_only=True)
class Color:
    """Strengths and probabilities of one crop's colors, in this order; each is off as it stands."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # of the whole circle
    jitter: float = 0.0  # probability of these four
    gray: float = 0.0  # the others: of what they are called
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize: float = 0.0

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation, self.hue) < 0 or self.hue > 0.5:
            raise ValueError(f"want strengths of at least 0 and a hue of at most 0.5, got {self}")
        if not all(0 <= p <= 1 for p in (self.jitter, self.gray, self.blur, self.solarize)):
            raise ValueError(f"want probabilities from 0 to 1, got {self}")
        if not 0 < self.sigma[0] <= self.sigma[1] <= 100:
            raise ValueError(f"want 0 < sigma <= 100, ascending, got {self}")


C_MAE = Color(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, gray=0.2)
SIMSIAM = replace(C_MAE, blur=0.5)
# the two crops of BYOL and MoCo v3, the two large crops of DINO; its small ones
BYOL_FIRST = Color(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter=0.8, gray=0.2, blur=1.0)
BYOL_SECOND = replace(BYOL_FIRST, blur=0.1, solarize=0.2)
DINO_SMALL = replace(BYOL_FIRST, blur=0.5)
BEIT = Color(brightness=0.4, contrast=0.4, saturation=0.4, jitter=1.0)


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment (arXiv:1909.13719) as timm writes it `rand-m9-mstd0.5-inc1`, which fine-tuning takes."""

    layers: int = 2  # operations, one after the other
    magnitude: float = 9.0  # mean of how strong an operation is, of 10
    deviation: float = 0.5  # and how far that goes up and down
    probability: float = 0.5  # of each operation that was drawn

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= 20 or not 0 <= self.magnitude <= 10 or self.deviation < 0:
            raise ValueError(
                f"want 1 to 20 layers, a magnitude from 0 to 10 and a deviation >= 0, got {self}"
            )
        if not 0 <= self.probability <= 1:
            raise ValueError(f"want a probability from 0 to 1, got {self}")


@dataclass(frozen=True, kw_only=True)
class Crop:
    """One image per sample: a random crop, resized to `size` (H, W) pixels, flipped and colored at random.

    The crop is a share of the image's area, so any image serves: one smaller than `size` is enlarged.
    With a `master` size the crop is resized to that instead, and the crop is a window of it: at its top left
    corner, or as far down and as far right of it as is drawn, each from 0 to `shift` pixels.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)  # fraction of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, drawn log-uniformly
    interpolation: Interpolation = "bicubic"
    clamp: bool = (
        False  # one draw, cut to the image where it does not fit, in the place of torchvision's tries
    )
    flip: float = 0.5
    box: int = 0  # which draw of box and flip
    master: tuple[int, int] | None = None
    shift: int = 0
    color: Color | None = None
    rand_augment: RandAugment | None = None  # after the colors; made on the CPU
    draw: int = 0  # which draw of colors, operations and window

    def __post_init__(self) -> None:
        lo, hi = self.scale
        if not 0 < lo <= hi <= 1 or not 0 < self.ratio[0] <= self.ratio[1] or min(self.size) < 1:
            raise ValueError(f"want size >= 1, 0 < scale <= 1 and ratio > 0, both ascending, got {self}")
        if not 0 <= self.flip <= 1 or self.shift < 0:
            raise ValueError(f"want 0 <= flip <= 1 and shift >= 0, got {self}")
        if not all(0 <= number < 100 for number in (self.box, self.draw)):  # each has a random stream
            raise ValueError(f"want box and draw from 0 to 99, got {self}")
        if any(m < s + self.shift for m, s in zip(self.resized, self.size, strict=True)):
            raise ValueError(f"want a master as large as size + shift, got {self}")

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width that the crop is resized to."""
        return self.size if self.master is None else self.master


def augmented(crops: Sequence[Crop], augmentation: Augmentation) -> tuple[Crop, ...]:
    """`strong`, for pre-training on few images: smaller boxes, and all of SimSiam's colors where none were.

    Crops of one box and draw get the same colors, so that a method without colors reconstructs what it
    sees. arXiv:2208.04164 names no recipe for its "stronger augmentation": this one is ours.
    """
    if augmentation == "recipe":
        return tuple(crops)
    return tuple(
        replace(v, scale=(min(0.08, v.scale[0]), v.scale[1]), color=v.color or SIMSIAM) for v in crops
    )


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank."""

    crops: tuple[Tensor, ...]  # each uint8 [B, H, W, C], on the training device, in the order asked for
    seeds_B: Tensor  # int64 [B], same device: one seed per sample, a function of (seed, epoch, sample id)
    ids_B: Tensor  # int64 [B], on the CPU: sample ids, for reports
    epoch: int
    labels_B: Tensor | None = None  # int64 [B], on the training device, for a method that asks for labels
