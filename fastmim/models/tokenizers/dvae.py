"""The small discrete VAE: strided convolutions to K logits, codes mixed or chosen, and back.

    logits = W1x1 f(x),  x in [-1, 1];   x^ = g(Sum_k y_k e_k)       y one-hot, or a relaxed sample of it

Source  lucidrains/DALLE-pytorch; microsoft/unilm/beit, modeling_discrete_vae.py: 4 x 4 convolutions of stride
        2 with ReLU, residual blocks 3 x 3, 3 x 3, 1 x 1, codes of 512 values, transposed convolutions back.
Shapes  B images, K codes, E values of a code, C channels inside, h * w codes; sides shrink by 2 a stage.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.models.tokenizers.base import Tokenizer, TokenizerConfig, as_bytes


@dataclass(frozen=True, kw_only=True)
class ConvConfig(TokenizerConfig):
    """What tokenizers of strided convolutions have in common."""

    hidden: int = 256
    """Channels inside"""
    code_width: int = 512
    """Values of a code"""
    blocks: int = 2
    """Residual blocks on each side of the codes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 2 or self.stride & (self.stride - 1):
            raise ValueError(f"stride: want a power of 2 above 1, got {self.stride}")
        if min(self.hidden, self.code_width) < 1 or self.blocks < 0:
            raise ValueError(
                f"hidden, code-width, blocks: want at least 1 twice, and 0 or more, got "
                f"{self.hidden}, {self.code_width}, {self.blocks}"
            )

    @property
    def stages(self) -> int:
        """Convolutions of stride 2."""
        return int(math.log2(self.stride))


@dataclass(frozen=True, kw_only=True)
class DVAEConfig(ConvConfig):
    """The small discrete VAE."""

    kind: ClassVar[str] = "dvae"

    def build(self) -> "DVAE":
        return DVAE(self)


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def conv_encoder(c: ConvConfig, n_out: int) -> nn.Sequential:
    """Images to so many values of each square."""
    layers: list[nn.Module] = []
    for stage in range(c.stages):
        layers += [nn.Conv2d(c.hidden if stage else 3, c.hidden, 4, stride=2, padding=1), nn.ReLU()]
    layers += (Residual(c.hidden) for _ in range(c.blocks))
    return nn.Sequential(*layers, nn.Conv2d(c.hidden, n_out, 1))


def conv_decoder(c: ConvConfig) -> nn.Sequential:
    """The values of codes to images."""
    layers: list[nn.Module] = [nn.Conv2d(c.code_width, c.hidden, 1)]
    layers += (Residual(c.hidden) for _ in range(c.blocks))
    for _ in range(c.stages):
        layers += [nn.ConvTranspose2d(c.hidden, c.hidden, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(c.hidden, 3, 1))


class Codebook(nn.Module):
    """The values of K codes, mixed by their shares. A module of its own, for ZeRO 3 gathers by modules."""

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codes, width))

    def forward(self, y_BhwK: Tensor) -> Tensor:
        return y_BhwK.to(self.weight.dtype) @ self.weight


class CodedVAE(Tokenizer):
    """What the discrete VAEs share: logits of an image, an image of mixed codes."""

    def scaled(self, image_BHWC: Tensor) -> Tensor:
        """The image as the network sees it, `[B, 3, H, W]` fp32."""
        raise NotImplementedError

    def logits(self, x_B3HW: Tensor) -> Tensor:
        """`[B, 3, H, W]` to fp32 `[B, h, w, K]`."""
        raise NotImplementedError

    def decode(self, y_BhwK: Tensor) -> Tensor:
        """Shares of codes, `[B, h, w, K]`, to what the network says of the pixels, `[B, O, H, W]`."""
        raise NotImplementedError

    def loss(self, decoded: Tensor, x_B3HW: Tensor) -> Tensor:
        """How far the pixels are from what was said of them: a mean over pixels and channels, fp32."""
        raise NotImplementedError

    def shown(self, decoded: Tensor) -> Tensor:
        """What was said of the pixels as a picture. `[B, H, W, 3]` uint8."""
        raise NotImplementedError

    def indices(self, image_BHWC: Tensor) -> Tensor:
        self.grid(image_BHWC)
        return self.logits(self.scaled(image_BHWC)).argmax(-1).flatten(1)

    def picture(self, index_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        one_hot = F.one_hot(index_BN.view(-1, *grid), self.config.codes)
        return self.shown(self.decode(one_hot.to(next(self.parameters()).dtype)))


class DVAE(CodedVAE):
    config: DVAEConfig

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config, c = config, config
        self.encoder, self.decoder = conv_encoder(c, c.codes), conv_decoder(c)
        self.codebook = Codebook(c.codes, c.code_width)

    def scaled(self, image_BHWC: Tensor) -> Tensor:
        return image_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1

    def logits(self, x_B3HW: Tensor) -> Tensor:
        return self.encoder(x_B3HW.to(self.codebook.weight.dtype)).permute(0, 2, 3, 1).float()

    def decode(self, y_BhwK: Tensor) -> Tensor:
        return self.decoder(self.codebook(y_BhwK).permute(0, 3, 1, 2))

    def loss(self, decoded: Tensor, x_B3HW: Tensor) -> Tensor:
        return F.mse_loss(decoded.float(), x_B3HW)

    def shown(self, decoded: Tensor) -> Tensor:
        return as_bytes((decoded.float() + 1) / 2)
