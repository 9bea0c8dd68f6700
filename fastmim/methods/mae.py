"""MAE: hide 75 % of the patches, encode the rest, predict the pixels of the hidden ones.

    T  T1(x) keeps K = floor(N (1 - mask_ratio)) patches drawn uniformly; the second branch is x itself
    f  encoder on the visible patches and a class token; d decoder with mask tokens elsewhere
    M  mean over hidden patches of || d(z)_i - norm(x_i) ||^2 / P

Where nothing is hidden, the patches that CutMix replaced are scored, and without CutMix all.

Source  He et al., arXiv:2111.06377; facebookresearch/mae. In the words of arXiv:2208.04164: Eq. 3.
"""

from dataclasses import dataclass
from typing import ClassVar

from fastmim_kernels import num_seen

from fastmim.methods.base import About, Output
from fastmim.methods.losses import scored_mean
from fastmim.methods.pixels import PixelConfig, PixelMethod
from fastmim.methods.variants import Variant, columns_of_table_5
from fastmim.models.tokens import Tokens
from fastmim.models.vit import ViTConfig
from fastmim.views import Batch


@dataclass(frozen=True, kw_only=True)
class MAEConfig(PixelConfig):
    """MAE (arXiv:2111.06377)."""

    name: ClassVar[str] = "mae"
    about: ClassVar[About] = About(
        paper="He et al., arXiv:2111.06377",
        t1="25 % of the patches",
        t2="the pixels",
        similarity="l2 on hidden patches",
    )
    # arXiv:2208.04164: accuracy of ViT-B on ImageNet-1k after fine-tuning, 100 epochs of each
    variants: ClassVar = {
        "color-whole": Variant(changes={"color": "whole"}, expected="83.1 % (Table 4)"),
        "color-visible": Variant(changes={"color": "visible"}, expected="83.0 % (Table 4)"),
        **columns_of_table_5(
            color={"color": "visible"},
            no_color={"color": "none"},
            no_mask={"mask_ratio": 0.0},
            accuracy={
                "plain": 71.9, "mask": 87.1, "cutmix": 83.3, "color": 81.6, "mask+cutmix": 86.1,
                "mask+color": 85.5, "cutmix+color": 83.8, "mask+cutmix+color": 86.4,
            },
        ),
    }  # fmt: skip

    def seen_counts(self, num_patches: int) -> tuple[int, ...]:
        return (num_seen(num_patches, self.mask_ratio),)

    def build(self, model: ViTConfig) -> "MAE":
        return MAE(self, model)


class MAE(PixelMethod):
    def forward(self, batch: Batch) -> Output:
        shown_BHWC, target_BHWC, foreign_BN = self.images(batch)
        seen_BK, hidden_BL = self.split(batch.seeds_B)
        weight_BL = None
        if hidden_BL.shape[1] == 0:  # all are visible: seen_BK is 0 to N - 1
            hidden_BL, weight_BL = seen_BK, None if foreign_BN is None else foreign_BN.float()
        z = self.encoder(Tokens(shown_BHWC, seen_BK))
        (pred_BLP,) = self.decoder(z.tokens_BTD, (seen_BK,), hidden_BL)
        return Output(scored_mean(self.pixel_loss(pred_BLP, target_BHWC, hidden_BL), weight_BL))
