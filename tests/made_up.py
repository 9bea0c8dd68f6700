"""A method that no paper has, in one file, as CONTRIBUTING.md says one is added.

It predicts, from the class token of every crop, the mean color that a frozen module sees in the image.
`register` is what the two lines in METHODS and METHOD_RECIPES would be.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from fastmim.methods.base import Method, MethodConfig, Output
from fastmim.methods.variants import Variant
from fastmim.methods.work import Linear, Stack, Work, head_work
from fastmim.models.heads import Head
from fastmim.models.tokens import Tokens
from fastmim.models.vit import Encoder
from fastmim.views import Crop


@dataclass(frozen=True, kw_only=True)
class MadeUpConfig(MethodConfig):
    """Mean colors (of no paper)."""

    name: ClassVar[str] = "made_up"
    variants: ClassVar = {"tall": Variant(changes={"hidden": 48}, expected="nothing")}
    encoder: ClassVar = {"positions": "learned", "layer_scale": 0.1, "init": "dino"}
    hidden: int = 24
    """Width of the head's hidden layer"""
    tokenizer: Path | None = None
    """Weights of the frozen module; without, it has its own"""

    def files(self):
        return {} if self.tokenizer is None else {"tokenizer": self.tokenizer}

    def fit(self, model, decoder):
        return replace(self, hidden=2 * model.width)

    def work(self, model):
        N, D = model.num_patches, model.width
        embed = Linear(N, model.patch_values, D, input_gradient=False)
        return Work((Stack((1 + N,), D, model.depth),), (embed, *head_work(1, (D, self.hidden, 3))))

    def build(self, model):
        return MadeUp(self, model)


class Frozen(nn.Module):
    """A mean that is made of weights: none of them may be trained, cast, sharded or saved."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) / 255)
        self.training_was = None

    def forward(self, image_BHWC):
        assert self.weight.dtype == torch.float32 and not self.weight.requires_grad and not self.training
        return image_BHWC.float().mean((1, 2)) @ self.weight


class MadeUp(Method):
    def __init__(self, config, model):
        super().__init__()
        self.config, self.model = config, model
        self.crops = (Crop(size=model.size),)
        self.encoder = Encoder(model)
        self.head = Head((model.width, config.hidden, 3))
        self.frozen = {"tokenizer": Frozen()}

    def forward(self, batch):
        (image_BHWC,) = batch.crops
        z = self.encoder(Tokens(image_BHWC), seeds_B=batch.seeds_B)
        target_B3 = self.frozen["tokenizer"].eval().requires_grad_(False)(image_BHWC)
        return Output((self.head(z.tokens_BTD[:, 0]).float() - target_B3).square().mean())


def register():
    from fastmim import recipes
    from fastmim.methods import METHODS

    METHODS["made_up"] = MadeUpConfig
    recipes.METHOD_RECIPES["made_up"] = lambda: replace(
        recipes.mae(), method=MadeUpConfig(), model=replace(recipes.mae().model, **MadeUpConfig.encoder)
    )
