"""Supervised training from scratch: the baseline of the tables, with fine-tuning's augmentation.

    T  RandAugment, random erasing, Mixup or CutMix of one crop
    f  the encoder on all patches; feature = LayerNorm(mean of the patches behind the last block), or the
       class token behind the final norm
    M  cross entropy between softmax(head(feature)) and the smoothed, mixed labels

Source  "random init" of arXiv:2208.04164, Table 1: the settings of fine-tuning for 100 epochs. Its 300 epochs
        equal MAE's own baseline from scratch (arXiv:2111.06377, A.2) but for averaged weights. Positions are
        learned, and first weights as timm's, as in models_vit of facebookresearch/mae.
Keys    fc_norm and head beside the encoder: with global_pool="avg", timm's ViT loads model.safetensors.
Decay   none for class token and positions, besides MAE's 1-D rule.
Limits  in evaluation the loss is without smoothing, and metrics are sums over images: `judged`.
Shapes  B images, N patches, D width, K classes.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.group import Group
from fastmim.methods.base import About, Method, MethodConfig, Output
from fastmim.methods.mixing import Mixing, erased, mixed, smoothed
from fastmim.methods.variants import Variant
from fastmim.methods.work import Linear, Stack, Work
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.views import Batch, Crop, RandAugment

HEAD_STD = 2e-5
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(MethodConfig):
    """Labels from scratch, with the augmentation of fine-tuning (arXiv:2111.06377)."""

    name: ClassVar[str] = "supervised"
    about: ClassVar[About] = About(
        paper="the tables' baseline, arXiv:2208.04164",
        t1="a crop after RandAugment, erasing, Mixup or CutMix",
        t2="the label",
        similarity="cross entropy",
        needs="labels",
    )
    labeled: ClassVar[bool] = True
    encoder: ClassVar = {"positions": "learned", "init": "dino", "drop_path": 0.1, "final_norm": False}
    variants: ClassVar = {
        "300-epochs": Variant(
            changes={},
            run={
                "optim.blr": 1e-4, "optim.weight_decay": 0.3, "optim.betas": (0.9, 0.95), "batch": 4096,
                "optim.warmup_epochs": 20.0, "optim.layer_decay": 1.0, "optim.min_lr": 0.0, "epochs": 300.0,
            },
            expected="82.1 % (ViT-B, arXiv:2208.04164, Table 1)",
        ),
    }  # fmt: skip
    scales: ClassVar = {"cifar10": {"method.classes": 10}, "sample": {"method.classes": 12}}
    classes: int = 1000
    """Number of classes; more than the data has are never right"""
    pool: Literal["mean", "cls"] = "mean"
    """What is classified: a norm of the mean of the patches, or the class token behind --model.final-norm"""
    rand_augment: float = 9.0
    """Magnitude of RandAugment's two operations, of 10; 0: none"""
    erase: float = 0.25
    """Probability that a box is erased"""
    mixup: float = 0.8
    """Alpha of Mixup's Beta distribution; 0: no Mixup"""
    cutmix: float = 1.0
    """Alpha of CutMix's Beta distribution; 0: no CutMix"""
    mix_probability: float = 1.0
    """Probability that a block is mixed"""
    mix_switch: float = 0.5
    """Probability of CutMix, where there is Mixup too"""
    mix_block: int = 32
    """Images mixed with one lambda, as a GPU's batch of MAE's fine-tuning; the micro-batch, if smaller"""
    smoothing: float = 0.1
    """Share of a label that all classes get alike"""

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"method.classes: want at least 2, got {self.classes}")
        for name in ("erase", "mix_probability", "mix_switch", "smoothing", "mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"method.{name.replace('_', '-')}: want a number from 0 to 1, got {value}")
        if not 0 <= self.rand_augment <= 10:
            raise ValueError(f"method.rand-augment: want a magnitude from 0 to 10, got {self.rand_augment}")
        if self.mix_block < 2 or self.mix_block % 2:
            raise ValueError(f"method.mix-block: want an even number of images, got {self.mix_block}")

    @property
    def mixing(self) -> Mixing:
        return Mixing(self.mixup, self.cutmix, self.mix_probability, self.mix_switch)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    def check_batch(self, micro_batch: int, ranks: int) -> None:
        block = min(self.mix_block, micro_batch)
        if self.mixes and (micro_batch % block or block % 2):
            raise ValueError(
                f"method.mix-block: want a micro-batch that is a multiple of {self.mix_block} images, or a "
                f"smaller even one, got {micro_batch}; without --method.mixup and --method.cutmix any serves"
            )

    def check_classes(self, classes: int) -> None:
        if classes > self.classes:
            raise ValueError(f"method.classes: want at least the {classes} of the data, got {self.classes}")

    def work(self, model: ViTConfig) -> Work:
        """All patches go through the encoder, one feature through the head."""
        N, P, D = model.num_patches, model.patch_values, model.width
        return Work(
            (Stack((1 + N,), D, model.depth),),
            (Linear(N, P, D, input_gradient=False), Linear(1, D, self.classes)),
        )

    def build(self, model: ViTConfig) -> "Supervised":
        if model.final_norm == (self.pool == "mean"):
            raise ValueError(
                f"model.final-norm: want {'none' if model.final_norm else 'one'} with --method.pool "
                f"{self.pool}, got {'one' if model.final_norm else 'none'}"
            )
        return Supervised(self, model)


def judged(logits_BK: Tensor, labels_B: Tensor, name: str = "") -> Output:
    """Sums over the images that have a label, not -1: how many they are, right at once, among the first five.

    The loss is without smoothing.
    """
    there_B = labels_B >= 0
    label_B1 = labels_B.clamp(min=0)[:, None]
    first = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == label_B1
    loss_B = F.cross_entropy(logits_BK, label_B1[:, 0], reduction="none")
    sums = {
        f"{name}top1": (first[:, 0] & there_B).sum(),
        f"{name}top5": (first.any(1) & there_B).sum(),
        f"{name}loss": (loss_B * there_B).sum(),
    }
    return Output(sums[f"{name}loss"], {"images": there_B.sum(), **sums})


class Supervised(Method):
    config: SupervisedConfig
    encoder: Encoder

    def __init__(self, config: SupervisedConfig, model: ViTConfig):
        super().__init__()
        self.config, self.model = config, model
        how = RandAugment(magnitude=config.rand_augment) if config.rand_augment else None
        self.crops = (Crop(size=model.size, scale=(0.08, 1.0), rand_augment=how),)
        self.encoder = Encoder(model)
        self.fc_norm = nn.LayerNorm(model.width, eps=NORM_EPS) if config.pool == "mean" else nn.Identity()
        self.head = nn.Linear(model.width, config.classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        return Group(decay=False) if name.endswith(("cls_token", "pos_embed")) else Group()

    def forward(self, batch: Batch) -> Output:
        if batch.labels_B is None:
            raise ValueError("want a batch with labels, got one without")
        if not self.training:
            return judged(self.logits(batch.crops[0]).float(), batch.labels_B)
        image_BHWC, target_BK = self.shown(batch, batch.labels_B)
        logits_BK = self.logits(image_BHWC, batch.seeds_B).float()
        loss = -(target_BK * F.log_softmax(logits_BK, dim=1)).sum(1).mean()
        right = (logits_BK.detach().argmax(1) == target_BK.argmax(1)).float().mean()
        return Output(loss, {"accuracy": right})

    def logits(self, image_BHWC: Tensor, seeds_B: Tensor | None = None) -> Tensor:
        """`[B, K]` of images: uint8, or floats from 0 to 1."""
        x_BTD = self.encoder(Tokens(image_BHWC), seeds_B=seeds_B).tokens_BTD
        feature_BD = x_BTD[:, 1:].mean(1) if self.config.pool == "mean" else x_BTD[:, 0]
        return self.head(self.fc_norm(feature_BD))

    def shown(self, batch: Batch, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """The images of a batch, erased and mixed, and their targets. `[B, H, W, C]` and `[B, K]`, fp32."""
        c, (image_BHWC,), seeds_B = self.config, batch.crops, batch.seeds_B
        target_BK = smoothed(labels_B, c.classes, c.smoothing)
        if c.erase or c.mixes:
            image_BHWC = image_BHWC.float() / 255
        if c.erase:
            image_BHWC = erased(image_BHWC, seeds_B, c.erase, self.model.pixel_mean, self.model.pixel_std)
        if c.mixes:
            block = min(c.mix_block, len(image_BHWC))
            image_BHWC, target_BK = mixed(image_BHWC, target_BK, seeds_B, c.mixing, block)
        return image_BHWC, target_BK
