"""Vector quantization: the code nearest to what the encoder says, passed straight through to the decoder.

    z = f(x),  k = argmax_k <z / |z|, e_k>,  x^ = g(z + sg(e_k - z));   e_k: unit codes

Codes are moved, not trained: each towards the mean of the vectors that took it, by a running average
(decay 0.99); one that nobody took for long is put where a vector of the batch is.

Source  van den Oord et al., arXiv:1711.00937; unit codes of 32 values: BEiT v2, arXiv:2208.06366.
Shapes  B images, K codes, E values of a code, R = B h w vectors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.models.tokenizers.base import Tokenizer, as_bytes
from fastmim.models.tokenizers.dvae import ConvConfig, conv_decoder, conv_encoder


@dataclass(frozen=True, kw_only=True)
class VQConfig(ConvConfig):
    """Nearest unit code of a convolutional encoder's output."""

    kind: ClassVar[str] = "vq"
    code_width: int = 32
    """Values of a code"""

    def build(self) -> "VQ":
        return VQ(self)


class VQ(Tokenizer):
    config: VQConfig
    code_KE: Tensor

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config, c = config, config
        self.encoder, self.decoder = conv_encoder(c, c.code_width), conv_decoder(c)
        self.register_buffer("code_KE", F.normalize(torch.randn(c.codes, c.code_width), dim=1))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def scaled(self, image_BHWC: Tensor) -> Tensor:
        return image_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1

    def vectors(self, x_B3HW: Tensor) -> Tensor:
        """What the encoder says of each square, of norm 1. `[B, h, w, E]` fp32."""
        z = self.encoder(x_B3HW.to(self.dtype))
        return F.normalize(z.permute(0, 2, 3, 1).float(), dim=-1)

    def nearest(self, z_RE: Tensor) -> Tensor:
        return (z_RE @ self.code_KE.T).argmax(1)

    def decode(self, e_BhwE: Tensor) -> Tensor:
        return self.decoder(e_BhwE.permute(0, 3, 1, 2).to(self.dtype))

    def shown(self, decoded: Tensor) -> Tensor:
        return as_bytes((decoded.float() + 1) / 2)

    def indices(self, image_BHWC: Tensor) -> Tensor:
        rows, columns = self.grid(image_BHWC)
        return self.nearest(self.vectors(self.scaled(image_BHWC)).flatten(0, 2)).view(-1, rows * columns)

    def picture(self, index_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.shown(self.decode(self.code_KE[index_BN].unflatten(1, grid)))
