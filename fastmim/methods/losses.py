"""Distances that several papers take unchanged: of predicted patches to pixels, and means over them."""

import torch
from fastmim_kernels import gather_patches, norm_pix_loss_image
from torch import Tensor

from fastmim.models.vit import ViTConfig
from fastmim.ranks import AcrossRanks


def pixel_loss(
    pred_BLP: Tensor, image_BHWC: Tensor, index_BL: Tensor, model: ViTConfig, *, normalize: bool
) -> Tensor:
    """Mean squared error of each predicted patch against the pixels of the uint8 image. `[B, L]` fp32.

    With `normalize` against pixels normalized by the mean and deviation of their patch (arXiv:2111.06377).
    """
    return norm_pix_loss_image(
        pred_BLP, image_BHWC, index_BL, model.patch, model.pixel_mean, model.pixel_std, normalize=normalize
    )


def as_prediction(image_BHWC: Tensor, model: ViTConfig) -> Tensor:
    """A uint8 picture as a prediction of every patch's pixels, normalized by channel. `[B, N, P]` fp32."""
    index_BN = torch.arange(model.num_patches, device=image_BHWC.device).expand(len(image_BHWC), -1)
    return gather_patches(image_BHWC, index_BN, model.patch, model.pixel_mean, model.pixel_std)


def scored_mean(loss_BL: Tensor, weight_BL: Tensor | None) -> Tensor:
    """Mean over the scored patches of the micro-batch: Sum w l / Sum w, 0 if there are none."""
    if weight_BL is None:
        return loss_BL.mean()
    return (loss_BL * weight_BL).sum() / weight_BL.sum().clamp(min=1)


def mean_over_ranks(loss_BL: Tensor, weight_BL: Tensor, ranks: AcrossRanks) -> Tensor:
    """The same over the images of all ranks, whose weights differ, once they average their gradients."""
    total = ranks.mean(weight_BL.sum().float()[None])[0]
    return (loss_BL * weight_BL).sum() / total.clamp(min=1 / ranks.world)
