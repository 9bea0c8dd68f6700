"""Which colors a crop gets: the draws of the published recipes, and the two ops that carry them out.

    with probability `jitter`: brightness, contrast, saturation and hue, those of strength s > 0, in an order
        drawn uniformly; factors ~ U(max(0, 1 - s), 1 + s), of hue ~ U(-s, s)
    then, each with its own probability: grayscale, a Gaussian blur of sigma ~ U(sigma), solarized from 128 on

Source  shared by SimSiam (arXiv:2011.10566), BYOL (2006.07733), MoCo v3 (2104.02057), DINO (2104.14294); the
        laws of torchvision's ColorJitter and of PIL's GaussianBlur, not their random numbers.
Shapes  B = samples, C = channels.
Draws   stream COLORS + draw, words 0: jitter; 1..4: factors; 5: order; 6: gray;
        7: blur; 8: sigma; 9: solarize. A word is taken for the same thing whatever the recipe.
"""

from dataclasses import dataclass
from itertools import permutations

import torch
from fastmim_kernels import color_blur, color_jitter
from fastmim_kernels.philox import draw_uniform
from torch import Tensor

from fastmim.streams import COLORS
from fastmim.views import Color

WORDS = 10
ORDERS = tuple(permutations(range(4)))


@dataclass(frozen=True)
class ColorDraws:
    """What each sample gets, on the CPU, in the form that the ops take."""

    order_B4: Tensor  # int64: which stage comes at each place, -1 for none
    factors_B4: Tensor  # fp32
    gray_B: Tensor  # bool
    sigmas_B: Tensor  # fp32, 0 for no blur
    solarize_B: Tensor  # bool


def draw_colors(seeds_B: Tensor, color: Color, draw: int = 0) -> ColorDraws:
    """What `color` draws for these keys, which are on the CPU; another `draw` is independent."""
    if seeds_B.device.type != "cpu" or draw < 0:
        raise ValueError(f"want seeds on the CPU and draw >= 0, got {seeds_B.device} and {draw}")
    u = draw_uniform(seeds_B, WORDS, COLORS.of(draw))
    strengths = torch.tensor(
        [color.brightness, color.contrast, color.saturation, color.hue], dtype=torch.float64
    )
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    low = torch.where(middle == 1, (middle - strengths).clamp(min=0), -strengths)
    factors = low + u[:, 1:5] * (middle + strengths - low)
    order = torch.tensor(ORDERS)[(u[:, 5] * len(ORDERS)).long()]
    order = torch.where((u[:, :1] < color.jitter) & (strengths > 0)[order], order, -1)
    sigmas = color.sigma[0] + u[:, 8] * (color.sigma[1] - color.sigma[0])
    return ColorDraws(
        order_B4=order,
        factors_B4=factors.float(),
        gray_B=u[:, 6] < color.gray,
        sigmas_B=torch.where(u[:, 7] < color.blur, sigmas, 0).float(),
        solarize_B=u[:, 9] < color.solarize,
    )


def apply_colors(images_BHWC: Tensor, draws: ColorDraws) -> Tensor:
    """Jitter, grayscale, blur, solarize: uint8 `[B, H, W, C]`, on any device, -> the same."""
    d = draws
    if not bool((d.sigmas_B > 0).any()):
        return color_jitter(images_BHWC, d.order_B4, d.factors_B4, gray_B=d.gray_B, solarize_B=d.solarize_B)
    images_BHWC = color_jitter(images_BHWC, d.order_B4, d.factors_B4, gray_B=d.gray_B)
    return color_blur(images_BHWC, d.sigmas_B, solarize_B=d.solarize_B)
