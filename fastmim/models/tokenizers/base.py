"""What a tokenizer is: a number for each square of an image, and a picture of what the numbers stand for."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmim.models.fp32_buffers import FP32Buffers


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Size of a tokenizer; a subclass names its fields, all of which are kept in its file."""

    kind: ClassVar[str]
    codes: int = 8192
    """K, number of codes"""
    stride: int = 8
    """Side of the square that a code stands for, in pixels"""

    def __post_init__(self) -> None:
        for name in ("codes", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: want at least 1, got {getattr(self, name)}")

    def build(self) -> "Tokenizer":
        """Make it, with first weights from torch's global generator."""
        raise NotImplementedError


class Tokenizer(FP32Buffers):
    """Codes of uint8 images of 3 channels, whose sides are multiples of the stride."""

    config: TokenizerConfig
    draws = True  # whether `picture` says what codes stand for

    def grid(self, image_BHWC: Tensor) -> tuple[int, int]:
        """Rows and columns of codes. ValueError for an image that it cannot take."""
        _, height, width, channels = image_BHWC.shape
        stride = self.config.stride
        if height % stride or width % stride or channels != 3:
            raise ValueError(
                f"want images of 3 channels and of multiples of {stride} px, got {channels} channels of "
                f"{height} x {width}"
            )
        return height // stride, width // stride

    def indices(self, image_BHWC: Tensor) -> Tensor:
        """The code of each square, row by row. `[B, H, W, 3]` uint8 to `[B, h * w]` int64."""
        raise NotImplementedError

    def picture(self, index_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the codes stand for, of a tokenizer that `draws`. `[B, h * w]` to `[B, H, W, 3]` uint8."""
        raise NotImplementedError


@torch.no_grad()
def code_statistics(index_BN: Tensor, num_codes: int) -> dict[str, Tensor]:
    """Perplexity of the codes of a batch, exp of the entropy of their shares, and the share that occurs."""
    count_K = torch.zeros(num_codes, device=index_BN.device)
    count_K.scatter_add_(0, index_BN.flatten(), torch.ones_like(index_BN.flatten(), dtype=torch.float32))
    share_K = count_K / count_K.sum()
    entropy = -(share_K * share_K.clamp(min=1e-12).log()).sum()
    return {"perplexity": entropy.exp(), "used_codes": (count_K > 0).float().mean()}


def psnr(image_BHWC: Tensor, other_BHWC: Tensor) -> Tensor:
    """Mean over images of 10 log10(255^2 / mean squared error) of uint8 images; at most 100."""
    error_B = (image_BHWC.float() - other_BHWC.float()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error_B.clamp(min=1e-5))).clamp(max=100).mean()


def as_bytes(image_B3HW: Tensor) -> Tensor:
    """Values from 0 to 1 as a uint8 picture. `[B, H, W, 3]`."""
    return (image_B3HW.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def values_of(config: TokenizerConfig) -> Mapping[str, Any]:
    """The fields of a configuration that make its shapes."""
    return {field.name: getattr(config, field.name) for field in fields(config)}
