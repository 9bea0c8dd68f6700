"""MoCo v3: the class token of one crop finds that of the other among those of all images of the batch.

    T  two crops of one image, colored at random, whole
    f  encoder and projector; q = predictor(f(x)), k = an average of f on the other crop
    M  L(q1, k2) + L(q2, k1),  L(q, k) = 2 tau (log Sum_j exp(cos(q_i, k_j) / tau) - cos(q_i, k_i) / tau)
       over the keys j of all images on all ranks

Source   Chen, Xie & He, arXiv:2104.02057; facebookresearch/moco-v3.
Frozen   the patch projection stays as it is drawn (`stop_grad_conv1`): trained, ViTs had dips in accuracy.
Average  As released it moves before the keys are made, with the weights of that very forward pass: so does
         one that moves after the step before. Its batch norms keep running statistics of their own.
Norm     of batches over all ranks, each crop by itself; heads in fp32.
Decay    of everything, biases and norms too: one group of AdamW.
Shapes   B images of this rank, E values of a key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from fastmim.group import Group
from fastmim.methods.base import About, Method, MethodConfig, Output
from fastmim.methods.contrast import Keys, compare_tokens
from fastmim.methods.health import collapse, health
from fastmim.methods.targets import cosine_momentum, teacher_of
from fastmim.methods.work import Linear, Stack, Work, head_work
from fastmim.models.heads import NormedHead
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder, ViTConfig
from fastmim.views import BYOL_FIRST, BYOL_SECOND, Batch, Crop

CROPS = 2


@dataclass(frozen=True, kw_only=True)
class MoCoV3Config(MethodConfig):
    """MoCo v3 (arXiv:2104.02057)."""

    name: ClassVar[str] = "mocov3"
    about: ClassVar[About] = About(
        paper="Chen et al., arXiv:2104.02057",
        t1="a crop",
        t2="EMA of f on another",
        similarity="InfoNCE of class tokens, both ways",
    )
    couples_batch: ClassVar[bool] = True
    encoder: ClassVar = {"init": "moco"}
    temperature: float = 0.2
    """tau"""
    hidden: int = 4096
    """Width of the hidden layers of both heads"""
    out: int = 256
    """Width of what is compared"""
    freeze_patches: bool = True
    """Keep the patch projection as it is drawn"""
    ema: float = 0.99
    """Momentum of the second network at the start; 1 at the end, along half a cosine"""

    def __post_init__(self) -> None:
        if self.temperature <= 0 or min(self.hidden, self.out) < 1 or not 0 <= self.ema < 1:
            raise ValueError(
                "method.temperature, method.hidden, method.out, method.ema: want more than 0, at least 1 "
                "twice, and 0 or more and below 1, got "
                f"{self.temperature}, {self.hidden}, {self.out}, {self.ema}"
            )

    def check_batch(self, micro_batch: int, ranks: int) -> None:
        if micro_batch * ranks < 2:
            raise ValueError("method mocov3: want at least two images to compare, and to norm over, got one")

    def fit(self, model: ViTConfig, decoder: DecoderConfig) -> Self:
        return replace(self, hidden=4 * model.width, out=model.width)

    def work(self, model: ViTConfig) -> Work:
        """Both crops through both networks; keys are of one image each, which is nothing."""
        N, P, D = model.num_patches, model.patch_values, model.width
        projector = D, self.hidden, self.hidden, self.out
        predictor = self.out, self.hidden, self.out
        return Work(
            stacks=(
                Stack((1 + N,) * CROPS, D, model.depth),
                Stack((1 + N,) * CROPS, D, model.depth, trained=False),
            ),
            others=(
                Linear(CROPS * N, P, D, input_gradient=False, trained=not self.freeze_patches),
                Linear(CROPS * N, P, D, trained=False),
                *head_work(CROPS, projector),
                *head_work(CROPS, predictor),
                *head_work(CROPS, projector, trained=False),
            ),
        )

    def build(self, model: ViTConfig) -> "MoCoV3":
        return MoCoV3(self, model)


class MoCoV3(Method):
    config: MoCoV3Config
    encoder: Encoder

    def __init__(self, config: MoCoV3Config, model: ViTConfig):
        super().__init__()
        self.config, self.model = config, model
        crop = Crop(size=model.size, scale=(0.08, 1.0))
        self.crops = (
            replace(crop, color=BYOL_FIRST, box=0, draw=0),
            replace(crop, color=BYOL_SECOND, box=1, draw=1),
        )
        self.encoder = Encoder(model)
        if config.freeze_patches:
            self.encoder.patch_embed.proj.requires_grad_(False)
        self.projector = NormedHead((model.width, config.hidden, config.hidden, config.out))
        self.predictor = NormedHead((config.out, config.hidden, config.out))
        self.key_encoder, self.key_projector = teacher_of(self.encoder), teacher_of(self.projector)

    def averages(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return (self.key_encoder, self.encoder), (self.key_projector, self.projector)

    def momentum(self, progress: float) -> float:
        return cosine_momentum(self.config.ema, progress)

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        return Group(decay=True)

    def forward(self, batch: Batch) -> Output:
        c, crops = self.config, [Tokens(image_BHWC) for image_BHWC in batch.crops]
        with torch.no_grad():
            second_B2D = self.key_encoder(*crops).class_tokens()
            k_B2E = each_crop(self.key_projector, second_B2D).flip(1)  # of the other crop
        first_B2D = self.encoder(*crops, seeds_B=batch.seeds_B).class_tokens()
        q_B2E = each_crop(self.predictor, each_crop(self.projector, first_B2D))
        loss, expected = compare_tokens(
            q_B2E, Keys(k_B2E), self.ranks, None,
            distance="info_nce", negatives="batch", temperature=c.temperature, scale=2 * c.temperature,
        )  # fmt: skip
        both = {name: CROPS * value for name, value in expected.items()}  # a sum of directions, no mean
        return Output(CROPS * loss, both | health(q_B2E.detach(), k_B2E))

    def diagnose(self, row: Mapping[str, float]) -> str | None:
        return collapse(row, "try a lower --optim.blr, a higher --method.ema or a larger --batch")


def each_crop(head: nn.Module, x_BSD: Tensor) -> Tensor:
    """A head with batch norm on the rows of each crop by themselves. `[B, S, D]` to `[B, S, E]`."""
    return torch.stack([head(x_BD) for x_BD in x_BSD.unbind(1)], dim=1)
