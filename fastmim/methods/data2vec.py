"""data2vec: behind mask tokens the student predicts what a teacher makes of the whole image.

    T  one crop; the student sees what a mask of blocks leaves, the teacher all of it
    f  the encoder, mask tokens at hidden patches, and one linear layer; the teacher's is an average of it
    y  LN(1/K Sum over the last K blocks of LN(x_k)), of patch tokens, without weight and bias: the target
    M  mean over hidden patches and values of s(e), e the error:
       s = e^2 / (2 beta) if |e| <= beta, else |e| - beta / 2

Source     Baevski et al., arXiv:2202.03555; facebookresearch/data2vec_vision (beit). The outer LN, K = 6,
           beta = 2 and the constant 0.9998 are those of the release command; the paper's formula has the
           inner norm alone (`--variant paper`).
Not built  attention dropout, 0.05 in the release: no fused attention of ours drops.
Masks      `masks` above 1: the student sees as many, each a segment of one packed pass, for one pass of the
           teacher, as in data2vec 2.0 (arXiv:2212.07525).
Shapes     B images, M masks, N patches, H at most hidden, D width, K blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from fastmim_kernels import block_mask
from torch import Tensor, nn

from fastmim.group import Group
from fastmim.methods.base import About, Method, MethodConfig, Output
from fastmim.methods.health import collapse, health
from fastmim.methods.losses import mean_over_ranks
from fastmim.methods.masking import check_ratio, first_hidden, hidden_count, taken
from fastmim.methods.targets import teacher_of
from fastmim.methods.variants import Variant
from fastmim.methods.work import Linear, Stack, Work
from fastmim.models.heads import beit_linear
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.streams import MASK, MORE_MASKS
from fastmim.views import BEIT, Batch, Crop

EPS = 1e-5  # of the norms of the target
VARIANCE_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Data2VecConfig(MethodConfig):
    """data2vec for images (arXiv:2202.03555)."""

    name: ClassVar[str] = "data2vec"
    about: ClassVar[About] = About(
        paper="Baevski et al., arXiv:2202.03555",
        t1="39 %, mask tokens",
        t2="EMA of f, the mean of its last six blocks",
        similarity="smooth l1; `--method.masks 8` for one pass of the teacher",
    )
    encoder: ClassVar = {
        "positions": "relative", "layer_scale": 1e-4, "drop_path": 0.25, "qkv_bias": "qv", "init": "beit",
    }  # fmt: skip
    variants: ClassVar = {
        "paper": Variant(changes={"outer_norm": False}, expected="84.2 % (ViT-B, arXiv:2202.03555)"),
        "eight-masks": Variant(changes={"masks": 8}, expected="not published for this target"),
    }
    mask_ratio: float = 120 / 196
    """Fraction of the patches that blocks hide, at most"""
    masks: int = 1
    """Masks that the student sees of an image, for one pass of the teacher"""
    top_blocks: int = 6
    """K, number of the last blocks whose mean is the target; all of a shallower encoder"""
    of: Literal["block", "mlp"] = "block"
    """What of a block is averaged: the stream behind it, or what its MLP adds"""
    inner_norm: Literal["layer", "instance", "batch", "none"] = "layer"
    """Norm of each block's output: over values, over the patches of an image, over those of the batch"""
    outer_norm: bool = True
    """Whether the mean is normalized once more, over values"""
    beta: float = 2.0
    """Error at which the loss goes from a square to a line"""
    variance_weight: float = 0.0
    """Weight of a hinge that keeps the deviation of predictions above 0.5"""
    ema: float = 0.9998
    """Momentum of the teacher"""

    def __post_init__(self) -> None:
        check_ratio("method.mask-ratio", self.mask_ratio)
        if self.top_blocks < 1 or not 1 <= self.masks <= 1 + MORE_MASKS.size:
            raise ValueError(
                f"method.top-blocks, method.masks: want at least 1, and at most {1 + MORE_MASKS.size} masks, "
                f"got {self.top_blocks} and {self.masks}"
            )
        if self.beta <= 0 or self.variance_weight < 0 or not 0 <= self.ema < 1:
            raise ValueError(
                "method.beta, method.variance-weight, method.ema: want more than 0, 0 or more, and 0 or more "
                f"and below 1, got {self.beta}, {self.variance_weight}, {self.ema}"
            )

    def work(self, model: ViTConfig) -> Work:
        """All tokens of each mask go through the student, all patches of the image through the teacher."""
        N, P, D, M = model.num_patches, model.patch_values, model.width, self.masks
        hidden = hidden_count("method.mask-ratio", model, self.mask_ratio)
        return Work(
            stacks=(
                Stack((1 + N,) * M, D, model.depth),
                Stack((1 + N,), D, model.depth, trained=False),
            ),
            others=(
                Linear(N, P, D, input_gradient=False),
                Linear(N, P, D, trained=False),
                Linear(M * hidden, D, D),
            ),
        )

    def build(self, model: ViTConfig) -> "Data2Vec":
        return Data2Vec(self, model)


class Data2Vec(Method):
    config: Data2VecConfig
    encoder: Encoder

    def __init__(self, config: Data2VecConfig, model: ViTConfig):
        super().__init__()
        self.config, self.model = config, model
        self.num_hidden = hidden_count("method.mask-ratio", model, config.mask_ratio)
        self.crops = (Crop(size=model.size, scale=(0.08, 1.0), color=BEIT),)
        self.encoder = Encoder(model, mask_token=True)
        self.head = beit_linear(model.width, model.width)
        self.teacher = teacher_of(self.encoder)
        self.blocks = range(max(0, model.depth - config.top_blocks), model.depth)

    def averages(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return ((self.teacher, self.encoder),)

    def momentum(self, progress: float) -> float:
        return self.config.ema

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        return Group(decay=False) if name.endswith(("cls_token", "pos_embed")) else Group()

    def masks(self, seeds_B: Tensor) -> list[Tensor]:
        """What the student does not see, once for each mask. Bool `[B, N]` each."""
        streams = [MASK.of(), *(MORE_MASKS.of(i) for i in range(self.config.masks - 1))]
        return [block_mask(seeds_B, self.model.grid, self.num_hidden, stream=stream) for stream in streams]

    def forward(self, batch: Batch) -> Output:
        c, (image_BHWC,) = self.config, batch.crops
        target_BND = self.target(image_BHWC)
        masks = self.masks(batch.seeds_B)
        inputs = [Tokens(image_BHWC, hidden_BN=mask_BN) for mask_BN in masks]
        encoded = self.encoder(*inputs, seeds_B=batch.seeds_B).split()
        chosen = [first_hidden(mask_BN, self.num_hidden) for mask_BN in masks]
        z_BHD = torch.cat(
            [taken(x_BTD[:, 1:], index) for x_BTD, (index, _) in zip(encoded, chosen, strict=True)], dim=1
        )
        target_BHD = torch.cat([taken(target_BND, index) for index, _ in chosen], dim=1)
        there_BH = torch.cat([there for _, there in chosen], dim=1).float()
        pred_BHD = self.head(z_BHD)
        loss_BH = F.smooth_l1_loss(pred_BHD.float(), target_BHD, beta=c.beta, reduction="none").mean(-1)
        loss = mean_over_ranks(loss_BH, there_BH, self.ranks)
        metrics = {"hidden": there_BH.mean() * self.num_hidden / self.model.num_patches}
        if c.variance_weight:
            hinge = deviation_hinge(pred_BHD.float(), there_BH)
            loss, metrics["variance_hinge"] = loss + c.variance_weight * hinge, hinge.detach()
        return Output(loss, metrics | health(pred_BHD.detach(), target_BHD, there_BH))

    @torch.no_grad()
    def target(self, image_BHWC: Tensor) -> Tensor:
        """What the teacher makes of each patch of whole images. `[B, N, D]` fp32."""
        asked = {"outputs" if self.config.of == "block" else "mlps": self.blocks}
        encoded = self.teacher(Tokens(image_BHWC), final_norm=False, **asked)
        found = encoded.blocks if self.config.of == "block" else encoded.mlps
        normed = [self.inner(found[i][:, 1:].float()) for i in self.blocks]
        mean_BND = torch.stack(normed).mean(0)
        if not self.config.outer_norm:
            return mean_BND
        return F.layer_norm(mean_BND, mean_BND.shape[-1:], eps=EPS)

    def inner(self, x_BND: Tensor) -> Tensor:
        """One block's output, normalized as the configuration has it."""
        if self.config.inner_norm == "layer":
            return F.layer_norm(x_BND, x_BND.shape[-1:], eps=EPS)
        if self.config.inner_norm == "instance":
            return F.instance_norm(x_BND.transpose(1, 2), eps=EPS).transpose(1, 2)
        if self.config.inner_norm == "batch":
            return F.batch_norm(x_BND.flatten(0, 1), None, None, training=True, eps=EPS).view_as(x_BND)
        return x_BND

    def diagnose(self, row: Mapping[str, float]) -> str | None:
        return collapse(
            row, "try a higher --method.ema, a lower --optim.blr or more --method.variance-weight"
        )


def deviation_hinge(pred_BHD: Tensor, there_BH: Tensor) -> Tensor:
    """Mean over values of max(0, 0.5 - deviation), of the predictions at hidden patches of this rank."""
    weight_BH1 = there_BH[..., None]
    total = there_BH.sum().clamp(min=1)
    mean_D = (pred_BHD * weight_BH1).sum((0, 1)) / total
    variance_D = ((pred_BHD - mean_D).square() * weight_BH1).sum((0, 1)) / total
    return F.relu(0.5 - (variance_D + VARIANCE_EPS).sqrt()).mean()
