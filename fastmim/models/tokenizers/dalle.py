"""The large discrete VAE, that of DALL-E: bottleneck blocks with a small gain, 1 x 1 around the codes.

    block  id(x) + g res(x),  g = 1 / n^2, n all blocks of a side; in the encoder ReLU and 3 x 3 three times
           and 1 x 1, in the decoder 1 x 1 first; hidden width a quarter; id a 1 x 1 where widths differ
    x'     = 0.8 x + 0.1, x in [0, 1];  -log p(x') = log 2b + log x'(1 - x') + |logit x' - mu| / b

Source  Ramesh et al., arXiv:2102.12092; openai/DALL-E, dall_e/encoder.py and decoder.py.
Keys    of its encoder and its decoder: blocks.input.w, blocks.group_1.block_1.res_path.conv_1.w ...
Shapes  B images, K codes, h * w = H / 8 * W / 8; the decoder says mu and ln b of each color: 6 maps.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.models.tokenizers.base import TokenizerConfig, as_bytes
from fastmim.models.tokenizers.dvae import CodedVAE

GROUPS = (1, 2, 4, 8)  # widths of the four groups, in units of `hidden`
STRIDE = 2 ** (len(GROUPS) - 1)
MARGIN = 0.1  # of the values at each end of (0, 1), where the logit is steep


@dataclass(frozen=True, kw_only=True)
class DALLEConfig(TokenizerConfig):
    """The discrete VAE of DALL-E."""

    kind: ClassVar[str] = "dvae_large"
    hidden: int = 256
    """Channels of the first group; the others have 2, 4 and 8 times as many"""
    blocks_per_group: int = 2
    """Residual blocks of a group"""
    first_width: int = 128
    """Channels of the decoder behind the codes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride != STRIDE:
            raise ValueError(f"stride: want {STRIDE}, as four groups make it, got {self.stride}")
        if self.hidden < 4 or min(self.blocks_per_group, self.first_width) < 1:
            raise ValueError(
                "hidden, blocks-per-group, first-width: want at least 4, 1 and 1, got "
                f"{self.hidden}, {self.blocks_per_group}, {self.first_width}"
            )

    def build(self) -> "DALLE":
        return DALLE(self)


class Convolution(nn.Module):
    """Weights by the names w and b, normal with variance 1 / fan-in, biases 0."""

    def __init__(self, n_in: int, n_out: int, side: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, side, side) / math.sqrt(n_in * side**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=(self.w.shape[-1] - 1) // 2)


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, gain: float, sides: tuple[int, ...]):
        super().__init__()
        self.gain, hidden = gain, n_out // 4
        self.id_path = Convolution(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths, layers = (n_in, hidden, hidden, hidden, n_out), OrderedDict[str, nn.Module]()
        for i, side in enumerate(sides):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Convolution(widths[i], widths[i + 1], side)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


def group(
    n_in: int, n_out: int, count: int, gain: float, sides: tuple[int, ...]
) -> OrderedDict[str, nn.Module]:
    blocks = OrderedDict[str, nn.Module]()
    for i in range(count):
        blocks[f"block_{i + 1}"] = Block(n_out if i else n_in, n_out, gain, sides)
    return blocks


class Side(nn.Module):
    """Encoder or decoder: a first convolution, four groups with a change of size behind three, a last one."""

    def __init__(
        self,
        first: Convolution,
        widths: list[int],
        count: int,
        sides: tuple[int, ...],
        resize: tuple[str, nn.Module],
        num_out: int,
    ):
        super().__init__()
        gain, n_in = 1 / (len(widths) * count) ** 2, first.w.shape[0]
        parts = OrderedDict[str, nn.Module](input=first)
        for g, width in enumerate(widths):
            blocks = group(n_in, width, count, gain, sides)
            if g < len(widths) - 1:
                blocks[resize[0]] = resize[1]
            parts[f"group_{g + 1}"] = nn.Sequential(blocks)
            n_in = width
        last = OrderedDict[str, nn.Module](relu=nn.ReLU(), conv=Convolution(n_in, num_out, 1))
        parts["output"] = nn.Sequential(last)
        self.blocks = nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class DALLE(CodedVAE):
    config: DALLEConfig

    def __init__(self, config: DALLEConfig):
        super().__init__()
        self.config, c = config, config
        widths = [factor * c.hidden for factor in GROUPS]
        self.encoder = Side(
            Convolution(3, c.hidden, 7), widths, c.blocks_per_group, (3, 3, 3, 1), ("pool", nn.MaxPool2d(2)),
            c.codes,
        )  # fmt: skip
        self.decoder = Side(
            Convolution(c.codes, c.first_width, 1), widths[::-1], c.blocks_per_group, (1, 3, 3, 3),
            ("upsample", nn.Upsample(scale_factor=2, mode="nearest")), 6,
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def scaled(self, image_BHWC: Tensor) -> Tensor:
        return (1 - 2 * MARGIN) * image_BHWC.permute(0, 3, 1, 2).float() / 255 + MARGIN

    def logits(self, x_B3HW: Tensor) -> Tensor:
        return self.encoder(x_B3HW.to(self.dtype)).permute(0, 2, 3, 1).float()

    def decode(self, y_BhwK: Tensor) -> Tensor:
        return self.decoder(y_BhwK.to(self.dtype).permute(0, 3, 1, 2))

    def loss(self, decoded: Tensor, x_B3HW: Tensor) -> Tensor:
        mu, log_b = decoded.float().chunk(2, dim=1)
        return logit_laplace(x_B3HW, mu, log_b).mean()

    def shown(self, decoded: Tensor) -> Tensor:
        mu, _ = decoded.float().chunk(2, dim=1)
        return as_bytes((mu.sigmoid() - MARGIN) / (1 - 2 * MARGIN))


def logit_laplace(x: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """-log of the density of x in (0, 1) if logit x is Laplace-distributed around mu with scale b."""
    return math.log(2) + log_b + (x * (1 - x)).log() + (x.logit() - mu).abs() * (-log_b).exp()
