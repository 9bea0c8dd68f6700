"""What fine-tuning does to a batch on its device: random erasing, then Mixup or CutMix, and smoothed labels.

    erasing   with probability p one box is filled with N(0, 1) of normalized pixels: area ~ U(0.02, 1/3) of
              the image, log of the aspect ~ U(log 0.3, log 1/0.3), the first of ten tries that fits
    mixing    of a block of images with one lambda and the same block reversed, x <- l x + (1 - l) x':
              Mixup l ~ Beta(0.8, 0.8);   CutMix l ~ Beta(1, 1), a box of share 1 - l of the area, its center
              anywhere, is x' and l becomes what is left of the image
    labels    l t + (1 - l) t',  t = smoothing / classes elsewhere, 1 - smoothing more at the label

Source  timm's RandomErasing (mode `pixel`) and Mixup (mode `batch`), by which facebookresearch/mae and BEiT
        fine-tune; the laws, not their random numbers. Zhong et al., arXiv:1708.04896; Zhang et al.,
        arXiv:1710.09412; Yun et al., arXiv:1905.04899.
Shapes  B images in S blocks, [B, H, W, C] in 0 to 1 before normalization, K classes.
Draws   stream ERASING 0, words 0: whether; 1...: area, aspect, row, column of each try; ERASING 1: noise.
        MIXING of a block's first seed, words 0: whether; 1: which; 2, 3: center; 4...: tries of lambda.
Limits  lambda is drawn by rejection (Joehnk 1964), which wants alpha <= 1.
"""

import math
from typing import NamedTuple

import torch
from fastmim_kernels.philox import draw_uniform
from torch import Tensor

from fastmim.streams import ERASING, MIXING

TRIES = 10  # of a box, as published
AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
LAMBDA_TRIES = 32  # the last is needed once in ten thousand million draws


class Mixing(NamedTuple):
    """How two images become one."""

    mixup: float  # alpha of Mixup, 0 for none
    cutmix: float  # alpha of CutMix, 0 for none
    probability: float  # that a block is mixed at all
    switch: float  # that this is CutMix, where there are both


def erased(
    image_BHWC: Tensor,
    seeds_B: Tensor,
    probability: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """Images with noise in a box of some of them. fp32 `[B, H, W, C]`, in 0 to 1 but for the noise."""
    B, H, W, C = image_BHWC.shape
    box_B4, erases_B = erased_boxes(seeds_B, (H, W), probability)
    inside_BHW = within(box_B4, (H, W)) & erases_B[:, None, None]
    pairs = (H * W * C + 1) // 2
    u_B2P = draw_uniform(seeds_B, 2 * pairs, ERASING.of(1)).float().view(B, 2, pairs)
    radius_BP, angle_BP = (-2 * (1 - u_B2P[:, 0]).clamp(min=1e-30).log()).sqrt(), 2 * math.pi * u_B2P[:, 1]
    noise = torch.cat([radius_BP * angle_BP.cos(), radius_BP * angle_BP.sin()], dim=1)
    noise_BHWC = noise[:, : H * W * C].view(B, H, W, C)
    by_channel = zip(noise_BHWC.unbind(3), mean, std, strict=True)  # a tensor of them would wait for its copy
    filled_BHWC = torch.stack([n_BHW * s + m for n_BHW, m, s in by_channel], dim=3)
    return torch.where(inside_BHW[..., None], filled_BHWC, image_BHWC)


def erased_boxes(seeds_B: Tensor, size: tuple[int, int], probability: float) -> tuple[Tensor, Tensor]:
    """(top, left, bottom, right) of each image's box, int64 `[B, 4]`, and if it is erased, bool `[B]`."""
    H, W = size
    u = draw_uniform(seeds_B, 1 + 4 * TRIES, ERASING.of(0))
    tries = u[:, 1:].view(-1, TRIES, 4)
    area = (AREA[0] + tries[..., 0] * (AREA[1] - AREA[0])) * (H * W)
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = (low + tries[..., 1] * (high - low)).exp()
    height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (height < H) & (width < W)
    top = (tries[..., 2] * (H - height + 1)).floor()
    left = (tries[..., 3] * (W - width + 1)).floor()
    boxes_BT4 = torch.stack([top, left, top + height, left + width], dim=2)
    first_B = fits.float().argmax(1)
    box_B4 = boxes_BT4.take_along_dim(first_B[:, None, None], 1)[:, 0].long()
    return box_B4, (u[:, 0] < probability) & fits.any(1)


def within(box_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels lie in each box. bool `[B, H, W]`."""
    top, left, bottom, right = (x[:, None] for x in box_B4.unbind(1))
    rows_H, columns_W = (torch.arange(n, device=box_B4.device) for n in size)
    in_rows_BH, in_columns_BW = (rows_H >= top) & (rows_H < bottom), (columns_W >= left) & (columns_W < right)
    return in_rows_BH[:, :, None] & in_columns_BW[:, None, :]


def mixed(
    image_BHWC: Tensor, target_BK: Tensor, seeds_B: Tensor, how: Mixing, block: int
) -> tuple[Tensor, Tensor]:
    """Images and targets after Mixup or CutMix of blocks of so many images, an even number that divides B."""
    _, H, W, _ = image_BHWC.shape
    own_SHW, share_S = mixing_weights(seeds_B[::block], (H, W), how)
    share_S11, own_S1HW1 = share_S[:, None, None], own_SHW[:, None, :, :, None]
    image, target = image_BHWC.unflatten(0, (-1, block)), target_BK.unflatten(0, (-1, block))
    image = image * own_S1HW1 + image.flip(1) * (1 - own_S1HW1)
    target = target * share_S11 + target.flip(1) * (1 - share_S11)
    return image.flatten(0, 1), target.flatten(0, 1)


def mixing_weights(seeds_S: Tensor, size: tuple[int, int], how: Mixing) -> tuple[Tensor, Tensor]:
    """The weight of each pixel of the image itself, fp32 `[S, H, W]`, and of its label, `[S]`."""
    H, W = size
    u = draw_uniform(seeds_S, 4 + 2 * LAMBDA_TRIES, MIXING.of())
    is_mixed_S = u[:, 0] < how.probability * (how.mixup > 0 or how.cutmix > 0)
    switch = how.switch if how.mixup > 0 and how.cutmix > 0 else float(how.cutmix > 0)
    is_cut_S = u[:, 1] < switch
    alpha_S = torch.where(is_cut_S, how.cutmix or 1.0, how.mixup or 1.0)
    share_S = beta(u[:, 4:].unflatten(1, (LAMBDA_TRIES, 2)), alpha_S)
    height_S, width_S = ((n * (1 - share_S).sqrt()).floor() for n in size)
    row_S, column_S = (u[:, 2] * H).floor(), (u[:, 3] * W).floor()
    top_S, left_S = row_S - (height_S / 2).floor(), column_S - (width_S / 2).floor()
    bottom_S, right_S = row_S + (height_S / 2).ceil(), column_S + (width_S / 2).ceil()
    box_S4 = torch.stack(
        [top_S.clamp(0, H), left_S.clamp(0, W), bottom_S.clamp(0, H), right_S.clamp(0, W)], dim=1
    ).long()
    inside_SHW = within(box_S4, size)
    share_S = torch.where(is_cut_S, 1 - inside_SHW.double().mean((1, 2)), share_S)
    share_S = torch.where(is_mixed_S, share_S, 1.0)
    own_SHW = torch.where(is_cut_S[:, None, None], (~inside_SHW).double(), share_S[:, None, None])
    own_SHW = torch.where(is_mixed_S[:, None, None], own_SHW, 1.0)
    return own_SHW.float(), share_S.float()


def beta(u_ST2: Tensor, alpha_S: Tensor) -> Tensor:
    """One draw of Beta(alpha, alpha), alpha <= 1, of each row of uniform pairs; 1/2 if none is accepted."""
    x_ST2 = (1 - u_ST2) ** (1 / alpha_S)[:, None, None]
    sum_ST = x_ST2.sum(2)
    accepted_ST = sum_ST <= 1
    first_S1 = accepted_ST.float().argmax(1)[:, None]
    drawn_S = (x_ST2[..., 0] / sum_ST).take_along_dim(first_S1, 1)[:, 0]
    return torch.where(accepted_ST.any(1), drawn_S, 0.5)


def smoothed(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets fp32 `[B, K]` of labels int64 `[B]`."""
    target_BK = torch.full((len(labels_B), classes), smoothing / classes, device=labels_B.device)
    ones_B1 = torch.full((len(labels_B), 1), 1 - smoothing, device=labels_B.device)
    return target_BK.scatter_add_(1, labels_B[:, None], ones_B1)
