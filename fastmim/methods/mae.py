"""MAE: hide 75 % of the patches, encode the rest, predict the pixels of the hidden ones.

    T  T1(x) keeps K = floor(N (1 - mask_ratio)) patches drawn uniformly; the second branch is x itself
    f  encoder on the visible patches and a class token; d decoder with mask tokens elsewhere
    M  mean over hidden patches of || d(z)_i - norm(x_i) ||^2 / P

Under colors or CutMix the encoder sees changed images x' and M compares with the clean x: predicting what
is seen would keep the change. Where nothing is hidden, the patches that CutMix replaced are scored, and
without CutMix all.

Source  He et al., arXiv:2111.06377; facebookresearch/mae. In the words of arXiv:2208.04164: Eq. 3; its tables
        4 (`color`) and 5 (`color=visible`, `cutmix`, `mask_ratio` 0), which leave the target unsaid: the rows
        that gain from CutMix or colors alone could not have gained by predicting what is seen.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from fastmim_kernels import norm_pix_loss_image, num_seen, split_patches
from torch import Tensor

from fastmim.methods.base import Method, MethodConfig, Output, Reconstruction
from fastmim.models.cutmix import cutmix_mask, mix_patches
from fastmim.models.mae_decoder import Decoder, DecoderConfig
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.views import C_MAE, Batch, Crop


@dataclass(frozen=True, kw_only=True)
class MAEConfig(MethodConfig):
    """MAE (arXiv:2111.06377)."""

    name: ClassVar[str] = "mae"
    mask_ratio: float = 0.75
    """Fraction of the patches that is hidden; 0 hides none"""
    norm_pix: bool = True
    """Predict pixels normalized by the mean and deviation of their own patch"""
    color: Literal["none", "visible", "whole"] = "none"
    """Color jitter and grayscale: on what the encoder sees, or on the whole image, its target too"""
    cutmix: bool = False
    """Show the encoder a rectangle of another image in each"""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        if self.mask_ratio != 0:
            check_ratio("method.mask-ratio", self.mask_ratio)

    def check_batch(self, micro_batch: int, ranks: int) -> None:
        if self.cutmix and micro_batch % 2:
            raise ValueError(
                f"method.cutmix: want an even number of images per micro-batch, got {micro_batch}"
            )

    def build(self, model: ViTConfig) -> "MAE":
        return MAE(self, model)


class MAE(Method):
    def __init__(self, config: MAEConfig, model: ViTConfig):
        super().__init__()
        self.config, self.model = config, model
        self.num_seen = model.num_patches
        if config.mask_ratio:
            self.num_seen = num_seen_checked("method.mask-ratio", model.num_patches, config.mask_ratio)
        clean, jittered = Crop(size=model.size), Crop(size=model.size, color=C_MAE)
        self.crops = {"none": (clean,), "visible": (jittered, clean), "whole": (jittered,)}[config.color]
        self.encoder = Encoder(model)
        self.decoder = Decoder(config.decoder, model)

    def forward(self, batch: Batch) -> Output:
        shown_BHWC, target_BHWC, foreign_BN = self.images(batch)
        seen_BK, hidden_BL = self.split(batch.seeds_B)
        weight_BL = None
        if hidden_BL.shape[1] == 0:  # all are visible: seen_BK is 0 to N - 1
            hidden_BL, weight_BL = seen_BK, None if foreign_BN is None else foreign_BN.float()
        z_BTD = self.encoder(shown_BHWC, seen_BK)
        (pred_BLP,) = self.decoder(z_BTD, (seen_BK,), hidden_BL)
        return Output(scored_mean(self.pixel_loss(pred_BLP, target_BHWC, hidden_BL), weight_BL))

    def images(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the encoder sees; what it shall predict; which patches of the former are foreign, `[B, N]`."""
        shown_BHWC, target_BHWC = batch.crops[0], batch.crops[-1]
        if not self.config.cutmix:
            return shown_BHWC, target_BHWC, None
        foreign_BN = cutmix_mask(batch.seeds_B, self.model.grid)
        return mix_patches(shown_BHWC, foreign_BN, self.model.patch), target_BHWC, foreign_BN

    def split(self, seeds_B: Tensor) -> tuple[Tensor, Tensor]:
        """Visible and hidden patches of T1, `[B, K]` and `[B, N - K]`, ascending."""
        return split_patches(seeds_B, self.model.num_patches, self.num_seen)

    def pixel_loss(self, pred_BLP: Tensor, image_BHWC: Tensor, index_BL: Tensor) -> Tensor:
        """Mean squared error of each patch against the pixels of the uint8 image. `[B, L]` fp32."""
        return pixel_loss(pred_BLP, image_BHWC, index_BL, self.model, normalize=self.config.norm_pix)

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        shown_BHWC, target_BHWC, _ = self.images(batch)
        seen_BK, _ = self.split(batch.seeds_B)
        (pred_BNP,) = self.decoder(self.encoder(shown_BHWC, seen_BK), (seen_BK,))
        return Reconstruction(target_BHWC, seen_BK, pred_BNP, self.config.norm_pix)


def pixel_loss(
    pred_BLP: Tensor, image_BHWC: Tensor, index_BL: Tensor, model: ViTConfig, *, normalize: bool
) -> Tensor:
    """Mean squared error of each predicted patch against the pixels of the uint8 image. `[B, L]` fp32."""
    return norm_pix_loss_image(
        pred_BLP, image_BHWC, index_BL, model.patch, model.pixel_mean, model.pixel_std, normalize=normalize
    )


def scored_mean(loss_BL: Tensor, weight_BL: Tensor | None) -> Tensor:
    """Mean over the scored patches of the micro-batch: Sum w l / Sum w, 0 if there are none."""
    if weight_BL is None:
        return loss_BL.mean()
    return (loss_BL * weight_BL).sum() / weight_BL.sum().clamp(min=1)


def check_ratio(name: str, ratio: float) -> None:
    if not 0 < ratio < 1:
        raise ValueError(f"{name}: want a ratio between 0 and 1, got {ratio}")


def num_seen_checked(name: str, num_patches: int, ratio: float) -> int:
    """Patches left visible when `ratio` of them is hidden; a ValueError if none is seen or none hidden."""
    try:
        seen = num_seen(num_patches, ratio)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if seen == num_patches:
        raise ValueError(f"{name}: {ratio} of {num_patches} patches hides none")
    return seen
