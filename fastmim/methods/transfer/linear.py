"""The linear probe: a frozen encoder, and a linear classifier trained on each of its two features.

    T  a crop of 8 to 100 % of the image's area, drawn once, and a flip; nothing else
    f  the encoder of a checkpoint in evaluation, without a gradient
    M  cross entropy of softmax(W BN(feature) + b), for the class token behind the final norm and for the mean
       of the patches there: two classifiers that do not know of each other, their losses added

BN is batch norm without scale and shift: of the batch of all ranks in training, of running means in
evaluation. W is drawn with a deviation of 0.01, b is 0.

Source  arXiv:2111.06377, A.1; facebookresearch/mae, main_linprobe.py, which has the class token alone and a
        crop without the ten tries of torchvision's. `mocov3`: arXiv:2104.02057, main_lincls.py, which has no
        batch norm and SGD.
Shapes  B images, D width, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.methods.base import About, Method, MethodConfig, Output
from fastmim.methods.supervised import judged
from fastmim.methods.variants import Variant
from fastmim.methods.work import Linear, Stack, Work
from fastmim.models.heads import BatchNorm
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.views import Batch, Crop

HEAD_STD = 0.01
BN_EPS = 1e-6
FEATURES = ("cls", "mean")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(MethodConfig):
    """Linear probe of --init-from (arXiv:2111.06377, A.1)."""

    name: ClassVar[str] = "linear"
    about: ClassVar[About] = About(
        paper="linear probe, arXiv:2111.06377, A.1",
        t1="a crop",
        t2="the label",
        similarity="cross entropy of frozen features",
        needs="labels, and weights",
    )
    labeled: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = True  # by its batch norm
    transfers: ClassVar[bool] = True
    variants: ClassVar = {
        "mocov3": Variant(
            changes={"norm": False},
            run={
                "optim.name": "sgd", "optim.lr": 12.0, "batch": 1024, "optim.warmup_epochs": 0.0,
            },
            expected="76.5 % (ViT-B after 300 epochs of MoCo v3, arXiv:2104.02057, Table 4)",
        ),
    }  # fmt: skip
    scales: ClassVar = {"cifar10": {"method.classes": 10}, "sample": {"method.classes": 12}}
    classes: int = 1000
    """Number of classes; more than the data has are never right"""
    norm: bool = True
    """Batch norm of the features, without scale and shift"""

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"method.classes: want at least 2, got {self.classes}")

    def check_batch(self, micro_batch: int, ranks: int) -> None:
        if self.norm and micro_batch * ranks < 2:
            raise ValueError("method.norm: want at least 2 images for batch norm, got 1")

    def check_classes(self, classes: int) -> None:
        if classes > self.classes:
            raise ValueError(f"method.classes: want at least the {classes} of the data, got {self.classes}")

    def work(self, model: ViTConfig) -> Work:
        """All patches go through the encoder, forward alone, two features through their heads."""
        N, P, D = model.num_patches, model.patch_values, model.width
        return Work(
            (Stack((1 + N,), D, model.depth, trained=False),),
            (Linear(N, P, D, trained=False), Linear(2, D, self.classes, input_gradient=False)),
        )

    def build(self, model: ViTConfig) -> "LinearProbe":
        return LinearProbe(self, model)


class Classifier(nn.Module):
    """Batch norm without scale and shift, if there is one, and a linear map."""

    def __init__(self, width: int, config: LinearConfig):
        super().__init__()
        self.norm = BatchNorm(width, eps=BN_EPS, affine=False) if config.norm else nn.Identity()
        self.linear = nn.Linear(width, config.classes)
        nn.init.trunc_normal_(self.linear.weight, std=HEAD_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.linear(self.norm(x_BD).to(self.linear.weight.dtype)).float()


class LinearProbe(Method):
    config: LinearConfig
    frozen: Mapping[str, nn.Module]

    def __init__(self, config: LinearConfig, model: ViTConfig):
        super().__init__()
        self.config, self.model = config, model
        self.crops = (Crop(size=model.size, scale=(0.08, 1.0), clamp=True),)
        self.frozen = {"encoder": Encoder(model)}
        self.heads = nn.ModuleDict({name: Classifier(model.width, config) for name in FEATURES})

    @property
    def start(self) -> nn.Module:
        return self.frozen["encoder"]

    def forward(self, batch: Batch) -> Output:
        if batch.labels_B is None:
            raise ValueError("want a batch with labels, got one without")
        features = self.features(batch.crops[0])
        logits = {name: head(features[name]) for name, head in self.heads.items()}
        if not self.training:
            parts = [judged(logits[name], batch.labels_B, f"{name}/") for name in FEATURES]
            return Output(parts[0].loss + parts[1].loss, parts[0].metrics | parts[1].metrics)
        losses = {name: F.cross_entropy(logits[name], batch.labels_B) for name in FEATURES}
        right = {
            f"{name}_accuracy": (logits[name].detach().argmax(1) == batch.labels_B).float().mean()
            for name in FEATURES
        }
        return Output(losses["cls"] + losses["mean"], right)

    @torch.no_grad()
    def features(self, image_BHWC: Tensor) -> dict[str, Tensor]:
        """Both features of uint8 images, fp32 `[B, D]`."""
        dtype = next(self.heads.parameters()).dtype
        encoder = self.frozen["encoder"].to(dtype).eval()
        z_BTD = encoder(Tokens(image_BHWC)).tokens_BTD.float()
        return {"cls": z_BTD[:, 0], "mean": z_BTD[:, 1:].mean(1)}
