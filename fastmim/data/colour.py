"""Which colours a view gets: the draws of the published recipes, and the two ops that carry them out.

    with probability `jitter`: brightness, contrast, saturation and hue, those of strength s > 0, in an order
        drawn uniformly; factors ~ U(max(0, 1 - s), 1 + s), of hue ~ U(-s, s)
    then, each with its own probability: greyscale, a Gaussian blur of sigma ~ U(sigma), solarised from 128 on

Source  shared by SimSiam (arXiv:2011.10566), BYOL (2006.07733), MoCo v3 (2104.02057), DINO (2104.14294); the
        laws of torchvision's ColorJitter and of PIL's GaussianBlur, not their random numbers.
Shapes  B = samples, C = channels.
Draws   stream 300 + draw (crop.py has 100 + crop), words 0: jitter; 1..4: factors; 5: order; 6: grey;
        7: blur; 8: sigma; 9: solarise. A word is taken for the same thing whatever the recipe.
"""

from dataclasses import dataclass
from itertools import permutations

import torch
from fastmim_kernels import color_blur, color_jitter
from fastmim_kernels.philox import draw_uniform
from torch import Tensor

STREAM = 300
WORDS = 10
ORDERS = tuple(permutations(range(4)))


@dataclass(frozen=True, kw_only=True)
class Colour:
    """Strengths and probabilities of one view; each is off as it stands."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # of the whole circle
    jitter: float = 0.0  # probability of these four
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarise: float = 0.0

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation, self.hue) < 0 or self.hue > 0.5:
            raise ValueError(f"want strengths of at least 0 and a hue of at most 0.5, got {self}")
        if not all(0 <= p <= 1 for p in (self.jitter, self.grey, self.blur, self.solarise)):
            raise ValueError(f"want probabilities from 0 to 1, got {self}")
        if not 0 < self.sigma[0] <= self.sigma[1] <= 100:
            raise ValueError(f"want 0 < sigma <= 100, ascending, got {self}")


C_MAE = Colour(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, grey=0.2)
SIMSIAM = Colour(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter=0.8, grey=0.2, blur=0.5)
# the two views of BYOL and MoCo v3, the two large crops of DINO; its small ones
BYOL_FIRST = Colour(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter=0.8, grey=0.2, blur=1.0)
BYOL_SECOND = Colour(
    brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter=0.8, grey=0.2, blur=0.1, solarise=0.2
)
DINO_SMALL = Colour(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter=0.8, grey=0.2, blur=0.5)


@dataclass(frozen=True)
class ColourDraws:
    """What each sample gets, on the CPU, in the form that the ops take."""

    order_B4: Tensor  # int64: which stage comes at each place, -1 for none
    factors_B4: Tensor  # fp32
    grey_B: Tensor  # bool
    sigmas_B: Tensor  # fp32, 0 for no blur
    solarise_B: Tensor  # bool


def draw_colours(keys_B: Tensor, colour: Colour, draw: int = 0) -> ColourDraws:
    """What `colour` draws for these keys, which are on the CPU; another `draw` is independent."""
    if keys_B.device.type != "cpu" or draw < 0:
        raise ValueError(f"want keys on the CPU and draw >= 0, got {keys_B.device} and {draw}")
    u = draw_uniform(keys_B, WORDS, STREAM + draw)
    strengths = torch.tensor(
        [colour.brightness, colour.contrast, colour.saturation, colour.hue], dtype=torch.float64
    )
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    low = torch.where(middle == 1, (middle - strengths).clamp(min=0), -strengths)
    factors = low + u[:, 1:5] * (middle + strengths - low)
    order = torch.tensor(ORDERS)[(u[:, 5] * len(ORDERS)).long()]
    order = torch.where((u[:, :1] < colour.jitter) & (strengths > 0)[order], order, -1)
    sigmas = colour.sigma[0] + u[:, 8] * (colour.sigma[1] - colour.sigma[0])
    return ColourDraws(
        order_B4=order,
        factors_B4=factors.float(),
        grey_B=u[:, 6] < colour.grey,
        sigmas_B=torch.where(u[:, 7] < colour.blur, sigmas, 0).float(),
        solarise_B=u[:, 9] < colour.solarise,
    )


def apply_colours(images_BHWC: Tensor, draws: ColourDraws) -> Tensor:
    """Jitter, greyscale, blur, solarise: uint8 `[B, H, W, C]`, on any device, -> the same."""
    d = draws
    if not bool((d.sigmas_B > 0).any()):
        return color_jitter(images_BHWC, d.order_B4, d.factors_B4, grey_B=d.grey_B, solarise_B=d.solarise_B)
    images_BHWC = color_jitter(images_BHWC, d.order_B4, d.factors_B4, grey_B=d.grey_B)
    return color_blur(images_BHWC, d.sigmas_B, solarise_B=d.solarise_B)
