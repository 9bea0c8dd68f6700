"""MAE: hide 75 % of the patches, encode the rest, predict the pixels of the hidden ones.

    T  T1(x) keeps K = floor(N (1 - mask_ratio)) patches drawn uniformly; the second branch is x itself
    f  encoder on the visible patches and a class token; d decoder with mask tokens elsewhere
    M  mean over hidden patches of || d(z)_i - norm(x_i) ||^2 / P

Source  He et al., arXiv:2111.06377; facebookresearch/mae. In the words of arXiv:2208.04164: Eq. 3.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from fastmim_kernels import norm_pix_loss_image, num_seen, split_patches
from torch import Tensor

from fastmim.methods.base import Method, MethodConfig, Output, Reconstruction
from fastmim.models.mae_decoder import Decoder, DecoderConfig
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.views import Batch, View


@dataclass(frozen=True, kw_only=True)
class MAEConfig(MethodConfig):
    """MAE (arXiv:2111.06377)."""

    name: ClassVar[str] = "mae"
    mask_ratio: float = 0.75
    """Fraction of the patches that is hidden"""
    norm_pix: bool = True
    """Predict pixels normalised by the mean and deviation of their own patch"""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        check_ratio("method.mask-ratio", self.mask_ratio)

    def build(self, model: ViTConfig) -> "MAE":
        return MAE(self, model)


class MAE(Method):
    def __init__(self, config: MAEConfig, model: ViTConfig):
        super().__init__()
        self.config, self.model = config, model
        self.num_seen = num_seen_checked("method.mask-ratio", model.num_patches, config.mask_ratio)
        self.views = (View(size=model.size),)
        self.encoder = Encoder(model)
        self.decoder = Decoder(config.decoder, model)

    def forward(self, batch: Batch) -> Output:
        (image_BHWC,) = batch.views
        seen_BK, hidden_BL = split_patches(batch.keys_B, self.model.num_patches, self.num_seen)
        z_BTD = self.encoder(image_BHWC, seen_BK)
        (pred_BLP,) = self.decoder(z_BTD, (seen_BK,), hidden_BL)
        return Output(self.pixel_loss(pred_BLP, image_BHWC, hidden_BL).mean())

    def pixel_loss(self, pred_BLP: Tensor, image_BHWC: Tensor, index_BL: Tensor) -> Tensor:
        """Mean squared error of each patch against the pixels of the uint8 image. `[B, L]` fp32."""
        m = self.model
        return norm_pix_loss_image(
            pred_BLP, image_BHWC, index_BL, m.patch, m.pixel_mean, m.pixel_std, normalize=self.config.norm_pix
        )

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        (image_BHWC,) = batch.views
        seen_BK, _ = split_patches(batch.keys_B, self.model.num_patches, self.num_seen)
        (pred_BNP,) = self.decoder(self.encoder(image_BHWC, seen_BK), (seen_BK,))
        return Reconstruction(image_BHWC, seen_BK, pred_BNP, self.config.norm_pix)


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
