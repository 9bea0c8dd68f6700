"""Predicted pixels, and how near they are to the true ones, in dB.

    norm_pix:  x_hat = p * sqrt(var(x) + eps) + mean(x)    over the P values of the true patch x, var unbiased
    then       pixel = x_hat * std_c + mean_c, clamped to [0, 1];   PSNR = -10 log10 MSE of an image

    composite  visible patches pasted over the prediction, over the whole image
    masked     over the hidden patches alone
    raw        the prediction alone, over the whole image, as it is also where patches are visible

Source  arXiv:2208.04164, Table 1, which says neither of the three nor how patch-normalized predictions become
        pixels. The true mean and deviation of a hidden patch are known to no model: with `norm_pix` this is
        no score of reconstruction in the usual sense, and no two conventions can be compared.
Shapes  image uint8 `[B, H, W, C]`, N patches of P = patch * patch * C values in the order row, column,
        channel, K of them visible.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-6  # of the pixel loss
LEAST_MSE = 1e-10  # 100 dB: what an equal image gets


def patches_of(image_BHWC: Tensor, patch: int) -> Tensor:
    """`[B, H, W, C] -> [B, N, P]`."""
    B, H, W, C = image_BHWC.shape
    x = image_BHWC.reshape(B, H // patch, patch, W // patch, patch, C)
    return x.transpose(2, 3).reshape(B, -1, patch * patch * C)


def predicted_pixels(
    pred_BNP: Tensor, true_BNP: Tensor, mean: Sequence[float], std: Sequence[float], *, norm_pix: bool
) -> Tensor:
    """What the network says on the scale 0 to 1, not clamped. fp32 `[B, N, P]`; `true_BNP` is uint8."""
    per_pixel, device = pred_BNP.shape[-1] // len(mean), pred_BNP.device
    mean_P = torch.tensor(mean, dtype=torch.float32, device=device).repeat(per_pixel)
    std_P = torch.tensor(std, dtype=torch.float32, device=device).repeat(per_pixel)
    pred_BNP = pred_BNP.float()
    if norm_pix:
        x_BNP = (true_BNP.float() / 255 - mean_P) / std_P
        var_BN1, mean_BN1 = torch.var_mean(x_BNP, dim=-1, keepdim=True)
        pred_BNP = pred_BNP * (var_BN1 + EPS).sqrt() + mean_BN1
    return pred_BNP * std_P + mean_P


def psnr(
    image_BHWC: Tensor,
    seen_BK: Tensor,
    pred_BNP: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    norm_pix: bool,
) -> dict[str, Tensor]:
    """`composite`, `masked` and `raw` of each image, fp64 `[B]` in dB. ValueError if nothing is hidden."""
    B, H, W, C = image_BHWC.shape
    N, P = pred_BNP.shape[1:]
    if len(pred_BNP) != B or N * P != H * W * C or seen_BK.shape[:1] != (B,):
        shapes = f"{tuple(image_BHWC.shape)}, {tuple(seen_BK.shape)} and {tuple(pred_BNP.shape)}"
        raise ValueError(f"psnr: want images, visible patches and predictions of all, got {shapes}")
    if seen_BK.shape[1] >= N:
        raise ValueError(f"psnr: want hidden patches, got {seen_BK.shape[1]} of {N} that are visible")
    true_BNP = patches_of(image_BHWC, round((P / C) ** 0.5))
    pixels_BNP = predicted_pixels(pred_BNP, true_BNP, mean, std, norm_pix=norm_pix).clamp(0, 1)
    error_BN = (pixels_BNP.double() - true_BNP.double() / 255).square().mean(-1)
    hidden_BN = torch.ones(B, N, dtype=torch.bool, device=error_BN.device).scatter_(1, seen_BK, False)
    of_hidden_B = (error_BN * hidden_BN).sum(1)
    errors = {
        "composite": of_hidden_B / N,
        "masked": of_hidden_B / hidden_BN.sum(1),
        "raw": error_BN.mean(1),
    }
    return {name: -10 * error_B.clamp(min=LEAST_MSE).log10() for name, error_B in errors.items()}
