"""R-MAE (RelaxMIM): MAE as a siamese network whose target is a decoded view instead of the pixels.

    T  T1(x) = x * M keeps 25 % of the patches; T2(x) = x * (1 - M) the others                (Eq. 6)
    f  one encoder on both, with gradient through both
    M  ||(d(z1) - d'(z2)) * (1 - M)||^2 + lambda ||(d'(z2) - x) * (1 - M)||^2                 (Eq. 5, 8)

Source  Kong & Zhang, arXiv:2208.04164; no official code exists. Theirs: phi' = phi (`tie_decoders`),
        lambda = 1 (`relax_weight`), patch-normalized x. Taken from MAE where the paper is silent: f drops
        what it may not see, d puts mask tokens in its place, and a squared norm is a mean over the values
        of a patch and over the scored patches.
Variants  t2   what T2 shows                              scored patches S
          complement   the patches hidden from T1         those, 147 of 196
          independent  a draw of its own, 75 % of them    those that T1 hides and T2 shows, 98 to 147
          full         all                                those hidden from T1, 147
        For `independent` the size of S differs from image to image: the loss is the sum over all scored
        patches of the micro-batch over their number, not a mean of means.
Not to be confused with R-MAE of arXiv:2306.05411 (regions).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from fastmim_kernels import norm_pix_loss, num_seen, split_patches
from torch import Tensor

from fastmim.methods.base import About, Output
from fastmim.methods.losses import scored_mean
from fastmim.methods.masking import check_ratio, num_seen_checked
from fastmim.methods.pixels import PixelConfig, PixelMethod
from fastmim.models.mae_decoder import Decoder
from fastmim.models.tokens import Encoded, Tokens
from fastmim.models.vit import ViTConfig
from fastmim.streams import SECOND_MASK
from fastmim.views import Batch


@dataclass(frozen=True, kw_only=True)
class RMAEConfig(PixelConfig):
    """R-MAE of Kong & Zhang (arXiv:2208.04164)."""

    name: ClassVar[str] = "rmae"
    about: ClassVar[About] = About(
        paper="Kong & Zhang, arXiv:2208.04164",
        t1="25 %",
        t2="f on the other 75 %, decoded (`--method.t2 complement`), on a draw of its own (`independent`), "
        "on all (`full`)",
        similarity="l2 between two decodes, and to the pixels",
    )
    t2: Literal["complement", "independent", "full"] = "complement"
    """What the second view shows: what the first hides, a draw of its own, or everything"""
    t2_ratio: float = 0.25
    """Fraction hidden from the second view; read by t2=independent only"""
    relax_weight: float = 1.0
    """Lambda of Eq. 8, weight of the term that keeps the second decode faithful to the pixels"""
    detach_target: Literal["none", "distance"] = "none"
    """distance: no gradient from the distance term into the second view"""
    tie_decoders: bool = True
    """One decoder for both views; otherwise the second view has its own"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("method.mask-ratio", self.mask_ratio)  # something must be hidden from T1
        check_ratio("method.t2-ratio", self.t2_ratio)
        if self.relax_weight < 0:
            raise ValueError(f"method.relax-weight: want 0 or more, got {self.relax_weight}")

    def seen_counts(self, num_patches: int) -> tuple[int, ...]:
        N, first = num_patches, num_seen(num_patches, self.mask_ratio)
        second = {"complement": N - first, "full": N, "independent": num_seen(N, self.t2_ratio)}
        return first, second[self.t2]

    def build(self, model: ViTConfig) -> "RMAE":
        return RMAE(self, model)


class RMAE(PixelMethod):
    config: RMAEConfig

    def __init__(self, config: RMAEConfig, model: ViTConfig):
        super().__init__(config, model)
        self.decoder2 = None if config.tie_decoders else Decoder(config.decoder, model)
        if config.t2 == "independent":
            self.num_seen2 = num_seen_checked("method.t2-ratio", model.num_patches, config.t2_ratio)

    def forward(self, batch: Batch) -> Output:
        shown_BHWC, target_BHWC, _ = self.images(batch)
        seen1_BK, seen2_BK, scored_BL, weight_BL = self.transform(batch.seeds_B)

        z = self.encoder(Tokens(shown_BHWC, seen1_BK), Tokens(shown_BHWC, seen2_BK))
        pred1_BLP, pred2_BLP = self.decode(z, (seen1_BK, seen2_BK), scored_BL)

        target_BLP = pred2_BLP.detach() if self.config.detach_target == "distance" else pred2_BLP
        distance_M = norm_pix_loss(pred1_BLP.flatten(0, 1), target_BLP.flatten(0, 1), normalize=False)
        anchor_BL = self.pixel_loss(pred2_BLP, target_BHWC, scored_BL)
        distance = scored_mean(distance_M.view_as(anchor_BL), weight_BL)
        anchor = scored_mean(anchor_BL, weight_BL)
        loss = distance + self.config.relax_weight * anchor
        return Output(loss, {"distance": distance.detach(), "anchor": anchor.detach()})

    def transform(self, seeds_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What T1 and T2 show, the patches T1 hides, and 0/1 weights `[B, L]` if not all of these score."""
        N = self.model.num_patches
        seen1_BK, hidden1_BL = self.split(seeds_B)
        if self.config.t2 == "complement":
            return seen1_BK, hidden1_BL, hidden1_BL, None
        if self.config.t2 == "full":
            everything_BN = torch.arange(N, device=seeds_B.device).expand(len(seeds_B), N)
            return seen1_BK, everything_BN, hidden1_BL, None
        seen2_BK, _ = split_patches(seeds_B, N, self.num_seen2, stream=SECOND_MASK.of())
        shown2_BN = torch.zeros(len(seeds_B), N, device=seeds_B.device).scatter_(1, seen2_BK, 1.0)
        return seen1_BK, seen2_BK, hidden1_BL, shown2_BN.gather(1, hidden1_BL)

    def decode(self, z: Encoded, seen: tuple[Tensor, Tensor], scored_BL: Tensor) -> tuple[Tensor, ...]:
        """d(z1) and d'(z2) at the scored patches: one batch for one decoder, two for two."""
        if self.decoder2 is None:
            return self.decoder(z.tokens_BTD, seen, scored_BL)
        z1_BTD, z2_BTD = z.split()
        (pred1_BLP,) = self.decoder(z1_BTD, seen[:1], scored_BL)
        (pred2_BLP,) = self.decoder2(z2_BTD, seen[1:], scored_BL)
        return pred1_BLP, pred2_BLP
