"""A method the engine has never heard of: two crops of two sizes, and EMA teachers of encoder and head."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fastmim.methods.base import Method, MethodConfig, Output
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder
from fastmim.views import Crop


@dataclass(frozen=True, kw_only=True)
class SiameseConfig(MethodConfig):
    """What iBOT, DINO and MoCo v3 ask of the engine."""

    name: ClassVar[str] = "siamese"

    def build(self, model):
        return Siamese(model)


class SiameseEncoder(Encoder):
    """With a mask token, which no file of timm's has."""

    def __init__(self, model):
        super().__init__(model)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, model.width))

    def forward(self, *inputs):
        z = super().forward(*inputs)
        return z._replace(tokens_BTD=z.tokens_BTD + self.mask_token)


class Siamese(Method):
    def __init__(self, model):
        super().__init__()
        self.crops = (Crop(size=(16, 16), box=0), Crop(size=(8, 8), box=1, scale=(0.05, 0.3)))
        self.encoder, self.teacher = SiameseEncoder(model), SiameseEncoder(model)
        self.head, self.teacher_head = (nn.Linear(model.width, 5) for _ in range(2))
        self.norm_of_head = nn.BatchNorm1d(5, affine=False)
        for teacher, student in self.averages():
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)
        self.asked, self.progress = [], []

    def forward(self, batch):
        large, small = batch.crops
        assert large.shape[1:] == (16, 16, 3)
        assert small.shape[1:] == (8, 8, 3)
        first = torch.arange(4).expand(len(large), 4)
        with torch.no_grad():
            target = self.teacher_head(self.teacher(Tokens(large)).tokens_BTD[:, 0]).float()
        token = self.encoder(Tokens(large, first)).tokens_BTD[:, 0]
        online = self.head(token).float()
        assert self.ranks.gather(online).shape[0] == self.ranks.world * len(online)
        loss = (online - target - 0.3).square().mean() + token.float().square().mean()
        self.norm_of_head(online.detach())
        return Output(loss, {"target": target.mean()})

    def averages(self):
        return (self.teacher, self.encoder), (self.teacher_head, self.head)

    def momentum(self, progress):
        self.asked.append(progress)
        return 1 - 0.1 * (1 + math.cos(math.pi * progress)) / 2  # 0.9 to 1, as BYOL

    def after_step(self, progress):
        assert progress == self.asked[-1]  # the teacher has moved
        self.progress.append(progress)

    def diagnose(self, row):
        return f"target is {row['target']:.2f} at step {row['step']}; try --optim.lr 0"
