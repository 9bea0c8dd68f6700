"""What DINO and iBOT share: crops of two sizes, a head of K codes, temperatures, and a teacher's center.

    p = softmax((g_t - c) / T_t),  q = softmax(g_s / T_s),  H(p, q) = -Sum_k p[k] log q[k]
    class loss   mean of H over the pairs of a teacher's large crop and another crop of the same image

c, the center, is the running mean of the teacher's logits: with it no code serves all images, and with a low
T_t not all codes alike.

Source     DINO: arXiv:2104.14294; facebookresearch/dino. iBOT: arXiv:2111.07832; bytedance/ibot.
Schedules  T_t by epoch, the teacher's momentum and, in the recipe, learning rate and weight decay by step.
Freeze     the codes keep their first directions for some epochs; their lengths stay 1 (`norm_last_layer`).
Shapes     B images of this rank, S = 2 + L crops, K codes, E values of a point that is compared with them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from fastmim.group import Group
from fastmim.methods.base import Method, MethodConfig
from fastmim.methods.health import collapse, health
from fastmim.methods.targets import Center, cosine_momentum, teacher_of
from fastmim.methods.work import Linear, Stack, Work, head_work
from fastmim.models.heads import CodeHead
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.views import BYOL_FIRST, BYOL_SECOND, DINO_SMALL, Crop

LARGE = 2  # crops that the teacher sees
SHARE_OF_SMALL = 96 / 224  # side of a small crop, of a large one
ALIKE = 0.05  # nats: teachers whose entropy is as near to 0, or to log K, have collapsed


@dataclass(frozen=True, kw_only=True)
class CodesConfig(MethodConfig):
    """What DINO and iBOT have in common; the defaults are DINO's."""

    encoder: ClassVar[Mapping] = {"positions": "learned", "drop_path": 0.1, "init": "dino"}
    # in some hundred steps a teacher as slow as the paper's stays behind; the rate of MAE makes codes alike
    scales: ClassVar[Mapping] = {"sample": {"method.ema": 0.99, "optim.lr": 5e-4}}
    whole_scale: ClassVar[tuple[float, float]] = (0.4, 1.0)  # area of a large crop beside small ones
    local_crops: int = 8
    """Small crops beside the two large ones, for the student alone; 0: there are none"""
    local_size: int = 96
    """Side of a small crop, in pixels"""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Area of a small crop, of the image's"""
    global_scale: tuple[float, float] | None = None
    """Area of a large crop, of the image's; by default the paper's, and 0.14 to 1 without small crops"""
    out: int = 65536
    """K, number of codes"""
    hidden: int = 2048
    """Width of the two hidden layers of the head"""
    bottleneck: int = 256
    """Width of what is compared with the codes"""
    norm_last_layer: bool = True
    """Keep the lengths of the codes at 1"""
    freeze_last_layer: int = 1
    """Epochs in which the codes stay as they are"""
    student_temperature: float = 0.1
    """T_s"""
    teacher_temperature: float = 0.04
    """T_t, after its warm-up"""
    warmup_temperature: float = 0.04
    """T_t of the first epoch"""
    warmup_epochs: int = 0
    """Epochs from the first T_t to the last, in equal steps"""
    ema: float = 0.996
    """Momentum of the teacher at the start; 1 at the end, along half a cosine"""
    center_momentum: float = 0.9
    """Momentum of the center"""

    def __post_init__(self) -> None:
        sizes = ("out", "hidden", "bottleneck", "local_size")
        counts = ("local_crops", "freeze_last_layer", "warmup_epochs")
        temperatures = ("student_temperature", "teacher_temperature", "warmup_temperature")
        for names, wanted, is_right in (
            (sizes, "at least 1", lambda x: x >= 1),
            (counts, "0 or more", lambda x: x >= 0),
            (temperatures, "more than 0", lambda x: 0 < x < math.inf),
            (("ema", "center_momentum"), "0 or more and below 1", lambda x: 0 <= x < 1),
        ):
            for name in names:
                if not is_right(getattr(self, name)):
                    flag = name.replace("_", "-")
                    raise ValueError(f"method.{flag}: want {wanted}, got {getattr(self, name)}")

    @property
    def large_scale(self) -> tuple[float, float]:
        """Area of a large crop, of the image's."""
        if self.global_scale is not None:
            return self.global_scale
        return self.whole_scale if self.local_crops else (0.14, 1.0)

    def temperature(self, epoch: int) -> float:
        """T_t of an epoch, the first being 0."""
        if epoch >= self.warmup_epochs:
            return self.teacher_temperature
        step = (self.teacher_temperature - self.warmup_temperature) / max(self.warmup_epochs - 1, 1)
        return self.warmup_temperature + epoch * step

    def for_image(self, model: ViTConfig) -> Self:
        side = round(min(model.size) * SHARE_OF_SMALL / model.patch) * model.patch
        return replace(self, local_size=max(side, model.patch))

    def fit(self, model: ViTConfig, decoder: DecoderConfig) -> Self:
        sized = self.for_image(model)
        return replace(sized, hidden=4 * model.width, bottleneck=model.width, out=16 * model.width)

    def check_crops(self, model: ViTConfig) -> None:
        """ValueError for small crops of no whole patches, or larger than the table of positions."""
        if self.local_crops and (self.local_size % model.patch or self.local_size > min(model.size)):
            raise ValueError(
                f"method.local-size: want a multiple of the patch, {model.patch}, and at most the "
                f"{min(model.size)} px of the image, of which there are positions, got {self.local_size}"
            )

    def head_rows(self, model: ViTConfig) -> int:
        """Tokens of the large crops that go through the head: class tokens, unless something else is said."""
        return LARGE

    def work(self, model: ViTConfig) -> Work:
        """The student on all crops, the teacher on the large ones and without a gradient."""
        N, P, D, L = model.num_patches, model.patch_values, model.width, self.local_crops
        small = (self.local_size // model.patch) ** 2
        widths = D, self.hidden, self.hidden, self.bottleneck, self.out
        return Work(
            stacks=(
                Stack((1 + N,) * LARGE + (1 + small,) * L, D, model.depth),
                Stack((1 + N,) * LARGE, D, model.depth, trained=False),
            ),
            others=(
                Linear(LARGE * N + L * small, P, D, input_gradient=False),
                Linear(LARGE * N, P, D, trained=False),
                *head_work(self.head_rows(model) + L, widths),
                *head_work(self.head_rows(model), widths, trained=False),
            ),
        )

    def crops(self, model: ViTConfig) -> tuple[Crop, ...]:
        """Two large crops and the small ones, each of a box and colors of its own."""
        large = Crop(size=model.size, scale=self.large_scale)
        small = Crop(size=(self.local_size,) * 2, scale=self.local_scale, color=DINO_SMALL)
        return (
            replace(large, color=BYOL_FIRST, box=0, draw=0),
            replace(large, color=BYOL_SECOND, box=1, draw=1),
            *(replace(small, box=i, draw=i) for i in range(LARGE, LARGE + self.local_crops)),
        )


class CodesMethod(Method):
    """Student and teacher, each an encoder and a head of codes, and the center of the class tokens."""

    config: CodesConfig
    encoder: Encoder

    def __init__(self, config: CodesConfig, model: ViTConfig, *, mask_token: bool):
        super().__init__()
        config.check_crops(model)
        self.config, self.model = config, model
        self.crops = config.crops(model)
        self.encoder = Encoder(model, mask_token=mask_token)
        self.head = CodeHead(
            (model.width, config.hidden, config.hidden, config.bottleneck), config.out,
            train_lengths=not config.norm_last_layer,
        )  # fmt: skip
        self.teacher, self.teacher_head = teacher_of(self.encoder), teacher_of(self.head)
        self.center = Center(config.out, config.center_momentum)

    def averages(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return (self.teacher, self.encoder), (self.teacher_head, self.head)

    def momentum(self, progress: float) -> float:
        return cosine_momentum(self.config.ema, progress)

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        return Group(frozen_epochs=self.config.freeze_last_layer if name.startswith("head.codes.") else 0)

    def health(self, student_RE: Tensor, teacher_UE: Tensor) -> dict[str, Tensor]:
        """Whether the points of class tokens tell images apart, on large crops."""
        width = student_RE.shape[-1]
        q_BTE = student_RE.detach().view(-1, LARGE + self.config.local_crops, width)[:, :LARGE]
        return health(q_BTE, teacher_UE.view(-1, LARGE, width))

    def after_step(self, progress: float) -> None:
        self.center.update(self.ranks)

    def diagnose(self, row: Mapping[str, float]) -> str | None:
        remedies = "try a lower --method.teacher-temperature, a higher --method.ema or a lower --optim.blr"
        entropy, chance = row.get("teacher_entropy"), math.log(self.config.out)
        if entropy is not None and not ALIKE < entropy < chance - ALIKE:
            found = "one code for all images" if entropy <= ALIKE else "all codes alike"
            return f"the teacher has {found}: teacher_entropy {entropy:.3f} of {chance:.3f}; {remedies}"
        return collapse(row, remedies)


def pairs(num_images: int, num_crops: int, *, device: torch.device) -> Tensor:
    """The teacher's rows that each crop of each image is compared with, -1 for itself. `[B S, 2]` int64."""
    image_B11 = torch.arange(num_images, device=device)[:, None, None]
    teacher_12 = torch.arange(LARGE, device=device)
    crop_S1 = torch.arange(num_crops, device=device)[:, None]
    rows_BS2 = torch.where(crop_S1 == teacher_12, -1, image_B11 * LARGE + teacher_12)
    return rows_BS2.flatten(0, 1)
