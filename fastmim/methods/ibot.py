"""iBOT: DINO's comparison of whole crops, and the same for each hidden patch with the teacher's patch.

    T  2 large and L small crops; of the large ones the student sees what masks leave, the teacher all
    f  encoder and one head g for class and patch tokens; the teacher's are averages of these
    M  L_cls + L_mim
       L_cls = mean over the 2 (2 + L) - 2 pairs of a teacher's crop and another one of H of the class tokens
       L_mim = mean over images and large crops of Sum_i m_i H(p_ti, q_si) / max(Sum_i m_i, 1), m the mask
       H(p, q) = -Sum_k p[k] log q[k],  p = softmax((g_t - c) / T_t),  q = softmax(g_s / T_s)

Source     Zhou et al., arXiv:2111.07832; bytedance/ibot.
Masks      half of the crops hide none, the others blocks of a share drawn from 0.1 to 0.5; `mask_shape` rand:
           as many patches anywhere. A crop without a mask counts in the mean with loss 0.
Centers    c of class tokens and c' of patches, of the mean over all patches of crops: logits are linear in
           the points that are compared with the codes, so their mean is the logits of the mean point.
Defaults   released runs: one head, K = 8,192, T_t from 0.04 to 0.07 for both kinds of token; ViT-S values
           (30 epochs of warm-up, crops from 0.25 and 0.05 to 0.25); the recipe of ViT-B has its own.
Shapes     B images of this rank, S = 2 + L crops, N patches of a large crop, H at most hidden, K codes.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from fastmim_kernels import block_mask, code_loss, ibot_targets, uniform_mask
from torch import Tensor

from fastmim.methods.base import About, Output
from fastmim.methods.codes import LARGE, CodesConfig, CodesMethod, pairs
from fastmim.methods.masking import first_hidden, taken
from fastmim.methods.targets import Center
from fastmim.methods.variants import Variant
from fastmim.models.tokens import Tokens
from fastmim.models.vit import ViTConfig
from fastmim.streams import MASK, SECOND_MASK
from fastmim.views import Batch

MASKS = (MASK, SECOND_MASK)  # of the two large crops
MOST = 0.5  # of the patches, that a mask can hide


@dataclass(frozen=True, kw_only=True)
class IBOTConfig(CodesConfig):
    """iBOT (arXiv:2111.07832)."""

    name: ClassVar[str] = "ibot"
    about: ClassVar[About] = About(
        paper="Zhou et al., arXiv:2111.07832",
        t1="2 large crops behind masks, 10 small ones",
        t2="EMA of f on the whole large ones",
        similarity="cross entropy of classes and hidden patches, both centered",
    )
    whole_scale: ClassVar[tuple[float, float]] = (0.25, 1.0)
    variants: ClassVar = {
        "rand": Variant(
            changes={"mask_shape": "rand"}, expected="84.1 % (ViT-B, arXiv:2111.07832), 84.0 with blocks"
        ),
        "two-crops": Variant(changes={"local_crops": 0}, expected="not published for ViT-B"),
    }
    mask_shape: Literal["block", "rand"] = "block"
    """Hide rectangles, or patches anywhere"""
    local_crops: int = 10
    """Small crops beside the two large ones, for the student alone; 0: there are none"""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Area of a small crop, of the image's"""
    out: int = 8192
    """K, number of codes"""
    teacher_temperature: float = 0.07
    """T_t, after its warm-up"""
    warmup_epochs: int = 30
    """Epochs from the first T_t to the last, in equal steps"""

    def most_hidden(self, model: ViTConfig) -> int:
        """The largest number of patches that a mask hides."""
        return int(MOST * model.num_patches)

    def head_rows(self, model: ViTConfig) -> int:
        """As published the head works on every patch of the large crops, in both networks."""
        return LARGE * (1 + model.num_patches)

    def build(self, model: ViTConfig) -> "IBOT":
        return IBOT(self, model)


class IBOT(CodesMethod):
    config: IBOTConfig

    def __init__(self, config: IBOTConfig, model: ViTConfig):
        super().__init__(config, model, mask_token=True)
        for token in (self.encoder.mask_token, self.teacher.mask_token):
            assert token is not None
            torch.nn.init.zeros_(token)
        self.most_hidden = config.most_hidden(model)
        if min(model.grid) < 2 or self.most_hidden < 1:
            raise ValueError(f"method.mask-shape: want 2 x 2 patches or more, got {model.grid}")
        self.patch_center = Center(config.out, config.center_momentum)

    def masks(self, seeds_B: Tensor) -> list[Tensor]:
        """What the student does not see of each large crop. Bool `[B, N]` each."""
        grid, masks = self.model.grid, []
        for stream in (mask.of() for mask in MASKS):
            targets_B = ibot_targets(seeds_B, self.model.num_patches, stream=stream)
            if self.config.mask_shape == "rand":
                masks.append(uniform_mask(seeds_B, self.model.num_patches, targets_B.long(), stream=stream))
            else:
                least = (min(grid) // 3) ** 2
                masks.append(block_mask(seeds_B, grid, targets_B, min_area=least, stream=stream))
        return masks

    def forward(self, batch: Batch) -> Output:
        c, B, N = self.config, len(batch.seeds_B), self.model.num_patches
        temperatures = {
            "student_temperature": c.student_temperature,
            "teacher_temperature": c.temperature(batch.epoch),
        }
        masks = self.masks(batch.seeds_B)
        chosen = [first_hidden(mask_BN, self.most_hidden) for mask_BN in masks]
        index = [index_BH for index_BH, _ in chosen]
        there_BTH = torch.stack([there_BH for _, there_BH in chosen], dim=1)

        whole = [Tokens(image_BHWC) for image_BHWC in batch.crops]
        hidden = [Tokens(t.image_BHWC, hidden_BN=mask_BN) for t, mask_BN in zip(whole, masks, strict=False)]
        with torch.no_grad():
            z = self.teacher(*whole[:LARGE])
            teacher_UE, teacher_UK = self.teacher_head(z.class_tokens().flatten(0, 1))
            patches_BTND = torch.stack([x_BTD[:, 1:] for x_BTD in z.split()], dim=1)
            points_BTNE = self.teacher_head.points(patches_BTND.flatten(0, 2)).view(B, LARGE, N, -1)
            mean_1E = points_BTNE.float().mean((0, 1, 2))[None].to(points_BTNE.dtype)
            of_hidden = [taken(points_BTNE[:, t], index[t]) for t in range(LARGE)]
            teacher_hidden_VK = self.teacher_head.codes(torch.stack(of_hidden, dim=1).flatten(0, 2))
            mean_1K = self.teacher_head.codes(mean_1E)

        z = self.encoder(*hidden, *whole[LARGE:], seeds_B=batch.seeds_B)
        class_RD, large = z.class_tokens().flatten(0, 1), z.split()[:LARGE]
        hidden_BTHD = torch.stack(
            [taken(x_BTD[:, 1:], i) for x_BTD, i in zip(large, index, strict=True)], dim=1
        )
        points_XE, logits_XK = self.head(torch.cat([class_RD, hidden_BTHD.flatten(0, 2)]))
        student_RK, student_hidden_VK = logits_XK.split([len(class_RD), there_BTH.numel()])

        pairs_RJ = pairs(B, len(whole), device=student_RK.device)
        class_RJ, entropy_U = code_loss(student_RK, teacher_UK, self.center.value_K, pairs_RJ, **temperatures)
        class_loss = class_RJ.sum() / (pairs_RJ >= 0).sum()
        rows_V = torch.arange(there_BTH.numel(), device=there_BTH.device)
        own_V1 = torch.where(there_BTH.flatten(), rows_V, -1)[:, None]
        patch_V1, _ = code_loss(
            student_hidden_VK, teacher_hidden_VK, self.patch_center.value_K, own_V1, **temperatures
        )
        count_BT = there_BTH.sum(-1)
        patch_loss = (patch_V1.view(there_BTH.shape).sum(-1) / count_BT.clamp(min=1)).mean()

        self.center.add(teacher_UK)
        self.patch_center.add(mean_1K)
        entropy = entropy_U.mean()
        metrics = {
            "class_loss": class_loss.detach(), "patch_loss": patch_loss.detach(),
            "teacher_entropy": entropy, "divergence": class_loss.detach() - entropy,
            "hidden": count_BT.float().mean() / N,
        }  # fmt: skip
        healthy = self.health(points_XE[: len(class_RD)], teacher_UE)
        return Output(class_loss + patch_loss, metrics | healthy)

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        self.patch_center.update(self.ranks)
