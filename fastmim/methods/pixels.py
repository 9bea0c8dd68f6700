"""MIM by pixels: one encoder, one decoder, and the pixels of what was hidden. What MAE and R-MAE share.

Under colors or CutMix the encoder sees changed images x' and the target is the clean x: predicting what is
seen would keep the change.

Source  He et al., arXiv:2111.06377; facebookresearch/mae. Colors and CutMix: arXiv:2208.04164, its tables 4
        (`color`) and 5 (`color=visible`, `cutmix`, `mask_ratio` 0), which leave the target unsaid: the rows
        that gain from CutMix or colors alone could not have gained by predicting what is seen.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from fastmim_kernels import split_patches
from torch import Tensor

from fastmim.methods.base import Method, MethodConfig, Reconstruction
from fastmim.methods.losses import pixel_loss
from fastmim.methods.masking import check_ratio, num_seen_checked
from fastmim.methods.work import Linear, Stack, Work
from fastmim.models.cutmix import cutmix_mask, mix_patches
from fastmim.models.mae_decoder import Decoder, DecoderConfig
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.views import C_MAE, Batch, Crop


@dataclass(frozen=True, kw_only=True)
class PixelConfig(MethodConfig):
    """What MAE and R-MAE have in common."""

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

    def fit(self, model: ViTConfig, decoder: DecoderConfig) -> Self:
        return replace(self, decoder=decoder)

    def seen_counts(self, num_patches: int) -> tuple[int, ...]:
        """How many patches each branch shows to the encoder."""
        raise NotImplementedError

    def work(self, model: ViTConfig) -> Work:
        seen = self.seen_counts(model.num_patches)
        N, V, d = model.num_patches, len(seen), self.decoder.width
        tokens = tuple(1 + n for n in seen)
        return Work(
            stacks=(
                Stack(tokens, model.width, model.depth),
                Stack((1 + N,) * V, d, self.decoder.depth),
            ),
            others=(
                Linear(N, model.patch_values, model.width, input_gradient=False),
                Linear(sum(tokens), model.width, d),
                Linear(V * (1 + N), d, model.patch_values),
            ),
        )


class PixelMethod(Method):
    """Encoder, decoder, crops and mask of a method that predicts pixels."""

    config: PixelConfig
    encoder: Encoder

    def __init__(self, config: PixelConfig, model: ViTConfig):
        super().__init__()
        self.config, self.model = config, model
        self.num_seen = model.num_patches
        if config.mask_ratio:
            self.num_seen = num_seen_checked("method.mask-ratio", model.num_patches, config.mask_ratio)
        clean, jittered = Crop(size=model.size), Crop(size=model.size, color=C_MAE)
        self.crops = {"none": (clean,), "visible": (jittered, clean), "whole": (jittered,)}[config.color]
        self.encoder = Encoder(model)
        self.decoder = Decoder(config.decoder, model)

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
        z = self.encoder(Tokens(shown_BHWC, seen_BK))
        (pred_BNP,) = self.decoder(z.tokens_BTD, (seen_BK,))
        return Reconstruction(target_BHWC, seen_BK, pred_BNP, self.config.norm_pix)
