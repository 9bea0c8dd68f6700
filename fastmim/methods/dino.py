"""DINO: what the teacher says of a large crop, the student must say of every other crop of the image.

    T  2 large and L small crops of one image, colored at random; the teacher sees the large ones alone
    f  encoder and head g: MLP, L2 norm, cosines with K unit codes; the teacher's are averages of these
    M  mean over the 2 (2 + L) - 2 pairs of a teacher's crop t and another crop s of
       H(p_t, q_s) = -Sum_k p_t[k] log q_s[k],  p = softmax((g_t - c) / T_t),  q = softmax(g_s / T_s)

Source     Caron et al., arXiv:2104.14294; facebookresearch/dino.
Defaults   the released run without extras: K = 65,536, 8 small crops, T_t 0.04 throughout. `--variant warm`
           raises T_t to 0.07 in 30 epochs; with `local_crops` 0 large crops begin at 0.14 of the area.
Shapes     B images of this rank, S = 2 + L crops, K codes; rows of crops run image by image.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from fastmim_kernels import code_loss

from fastmim.methods.base import About, Output
from fastmim.methods.codes import LARGE, CodesConfig, CodesMethod, pairs
from fastmim.methods.variants import Variant
from fastmim.models.tokens import Tokens
from fastmim.models.vit import ViTConfig
from fastmim.views import Batch


@dataclass(frozen=True, kw_only=True)
class DINOConfig(CodesConfig):
    """DINO (arXiv:2104.14294)."""

    name: ClassVar[str] = "dino"
    about: ClassVar[About] = About(
        paper="Caron et al., arXiv:2104.14294",
        t1="2 large and 8 small crops",
        t2="EMA of f on the large ones",
        similarity="cross entropy over 65,536 codes, centered",
    )
    variants: ClassVar = {
        "warm": Variant(
            changes={"teacher_temperature": 0.07, "warmup_epochs": 30}, expected="not published apart"
        ),
        "two-crops": Variant(changes={"local_crops": 0}, expected="not published for ViT-B"),
    }

    def build(self, model: ViTConfig) -> "DINO":
        return DINO(self, model)


class DINO(CodesMethod):
    config: DINOConfig

    def __init__(self, config: DINOConfig, model: ViTConfig):
        super().__init__(config, model, mask_token=False)

    def forward(self, batch: Batch) -> Output:
        c, crops = self.config, [Tokens(image_BHWC) for image_BHWC in batch.crops]
        with torch.no_grad():
            teacher_UD = self.teacher(*crops[:LARGE]).class_tokens().flatten(0, 1)
            teacher_UE, teacher_UK = self.teacher_head(teacher_UD)
        student_RD = self.encoder(*crops, seeds_B=batch.seeds_B).class_tokens().flatten(0, 1)
        student_RE, student_RK = self.head(student_RD)
        pairs_RJ = pairs(len(batch.seeds_B), len(crops), device=student_RK.device)
        loss_RJ, entropy_U = code_loss(
            student_RK, teacher_UK, self.center.value_K, pairs_RJ,
            student_temperature=c.student_temperature, teacher_temperature=c.temperature(batch.epoch),
        )  # fmt: skip
        loss = loss_RJ.sum() / (pairs_RJ >= 0).sum()
        self.center.add(teacher_UK)
        entropy = entropy_U.mean()
        metrics = {"teacher_entropy": entropy, "divergence": loss.detach() - entropy}
        return Output(loss, metrics | self.health(student_RE, teacher_UE))
