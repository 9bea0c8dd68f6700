"""First weights of an encoder, by the family of the method that trains it.

          Linear weights                     patch projection           class and mask token   besides
    mae   Xavier uniform, qkv as one matrix  Xavier, its bias as        N(0, 0.02^2)
                                             nn.Conv2d's
    moco  Xavier uniform, q, k, v apart      U(+-sqrt(6 / (P + D))), 0  N(0, (1e-6)^2)
    cae   Xavier uniform                     T(0.02), 0                 T(0.02)
    dino  N(0, 0.02^2)                       as nn.Conv2d's             N(0, 0.02^2)           positions too
    beit  T(0.02) cut at one deviation       the same, 0                the same               / sqrt(2 l)

T is the normal cut off at -2 and 2, which changes next to nothing. `beit` then divides the last matrices of
attention and MLP in block l = 1, 2 ... by sqrt(2 l). Biases of Linear layers are 0, norms 1 and 0, relative
positions 0.

Source  the repositories facebookresearch/mae, facebookresearch/moco-v3, Atten4Vis/CAE, facebookresearch/dino
        and microsoft/unilm/beit.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from fastmim.models.vit import Encoder

Init = Literal["mae", "moco", "cae", "dino", "beit"]
STD = 0.02


def init_linear(module: nn.Module) -> None:
    """MAE's rule for `Module.apply`: Xavier-uniform matrices (fused qkv as one), zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def normal_linear(module: nn.Module) -> None:
    """DINO's rule for `Module.apply`: normal matrices of deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        truncated_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def truncated_normal(weight: Tensor, deviations: float = 2 / STD) -> None:
    """N(0, 0.02^2) cut off at so many deviations; at +-2, a hundred of them, unless told."""
    nn.init.trunc_normal_(weight, std=STD, a=-deviations * STD, b=deviations * STD)


def init_mae(encoder: "Encoder") -> None:
    encoder.blocks.apply(init_linear)  # the projection has its first values from its own constructor
    for token in encoder.tokens():
        nn.init.normal_(token, std=STD)


def init_moco(encoder: "Encoder") -> None:
    encoder.blocks.apply(init_linear)
    for block in encoder.every_block():
        bound = math.sqrt(6 / (2 * encoder.config.width))
        nn.init.uniform_(block.attn.qkv.weight, -bound, bound)
    projection = encoder.patch_embed.proj
    bound = math.sqrt(6 / (encoder.config.patch_values + encoder.config.width))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    for token in encoder.tokens():
        nn.init.normal_(token, std=1e-6)


def init_cae(encoder: "Encoder") -> None:
    encoder.blocks.apply(init_linear)
    truncated_normal(encoder.patch_embed.proj.weight)
    nn.init.zeros_(encoder.patch_embed.proj.bias)
    for token in encoder.tokens():
        truncated_normal(token)


def init_dino(encoder: "Encoder") -> None:
    encoder.blocks.apply(normal_linear)
    projection = encoder.patch_embed.proj
    bound = encoder.config.patch_values**-0.5
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.uniform_(projection.bias, -bound, bound)
    for token in (*encoder.tokens(), *encoder.learned_positions()):
        truncated_normal(token)


def init_beit(encoder: "Encoder") -> None:
    for module in encoder.blocks.modules():
        if isinstance(module, nn.Linear):
            truncated_normal(module.weight, deviations=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    truncated_normal(encoder.patch_embed.proj.weight, deviations=1)
    nn.init.zeros_(encoder.patch_embed.proj.bias)
    for token in (*encoder.tokens(), *encoder.learned_positions()):
        truncated_normal(token, deviations=1)
    for layer, block in enumerate(encoder.every_block(), start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            weight.data.div_(math.sqrt(2 * layer))


INITS: dict[Init, Callable[["Encoder"], None]] = {
    "mae": init_mae,  # arXiv:2111.06377
    "moco": init_moco,  # arXiv:2104.02057
    "cae": init_cae,  # arXiv:2202.03026
    "dino": init_dino,  # arXiv:2104.14294
    "beit": init_beit,  # arXiv:2106.08254
}
