"""Tokenizers of normalized pixels: the nearest of K centroids, and random projections.

    p      the s * s * 3 values of a square, minus their mean, over their deviation (unbiased; eps 1e-6)
    kmeans index = argmin_k |p - c_k|^2
    random index = argmax_k <u_k, A p / |A p|>,  A Xavier-uniform, u_k random on the unit sphere, both frozen

Source  the normalization: MAE, arXiv:2111.06377. Random projections: Chiu et al., arXiv:2202.01855 (BEST-RQ).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.models.tokenizers.base import Tokenizer, TokenizerConfig

EPS = 1e-6
PROJECTED = 16  # values of a projection
RANDOM_SEED = 0  # of the projections: the same in every run
CONTRAST = 0.2  # deviation of a picture of normalized pixels, of the range from black to white
ROWS = 16384  # squares that are compared at once


def normalized_squares(image_BHWC: Tensor, stride: int) -> Tensor:
    """Pixels of each square, normalized by their own mean and deviation. `[B, N, s * s * 3]` fp32."""
    B, H, W, C = image_BHWC.shape
    x = image_BHWC.view(B, H // stride, stride, W // stride, stride, C).transpose(2, 3)
    x_BNP = x.reshape(B, -1, stride * stride * C).float() / 255
    var_BN1, mean_BN1 = torch.var_mean(x_BNP, -1, keepdim=True)
    return (x_BNP - mean_BN1) * (var_BN1 + EPS).rsqrt()


def nearest(x_RP: Tensor, centroid_KP: Tensor) -> Tensor:
    """Index of the centroid at the smallest distance to each row, the first of equals. `[R]` int64."""
    half_K = centroid_KP.square().sum(1) / 2
    return torch.cat([(half_K - x @ centroid_KP.T).argmin(1) for x in x_RP.split(ROWS)])


@dataclass(frozen=True, kw_only=True)
class KMeansConfig(TokenizerConfig):
    """Nearest of K centroids of normalized pixels."""

    kind: ClassVar[str] = "kmeans"

    def build(self) -> "KMeans":
        return KMeans(self)


class KMeans(Tokenizer):
    """The centroids are a buffer: they are fitted, not trained."""

    centroid_KP: Tensor

    def __init__(self, config: KMeansConfig):
        super().__init__()
        self.config = config
        self.register_buffer("centroid_KP", torch.randn(config.codes, config.stride**2 * 3))

    def indices(self, image_BHWC: Tensor) -> Tensor:
        rows, columns = self.grid(image_BHWC)
        x_BNP = normalized_squares(image_BHWC, self.config.stride)
        return nearest(x_BNP.flatten(0, 1), self.centroid_KP).view(-1, rows * columns)

    def picture(self, index_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        (rows, columns), s = grid, self.config.stride
        x = 0.5 + CONTRAST * self.centroid_KP[index_BN]
        x = x.view(-1, rows, columns, s, s, 3).transpose(2, 3).reshape(-1, rows * s, columns * s, 3)
        return (x.clamp(0, 1) * 255).round().byte()


@dataclass(frozen=True, kw_only=True)
class RandomConfig(TokenizerConfig):
    """Codes of random projections: no training, and the same in every run."""

    kind: ClassVar[str] = "random"

    def build(self) -> "RandomProjections":
        return RandomProjections(self)


class RandomProjections(Tokenizer):
    draws = False
    projection_PE: Tensor
    code_KE: Tensor

    def __init__(self, config: RandomConfig):
        super().__init__()
        self.config = config
        rng = torch.Generator().manual_seed(RANDOM_SEED)
        values = config.stride**2 * 3
        bound = math.sqrt(6 / (values + PROJECTED))
        projection_PE = (torch.rand(values, PROJECTED, generator=rng) * 2 - 1) * bound
        code_KE = torch.randn(config.codes, PROJECTED, generator=rng)
        self.register_buffer("projection_PE", projection_PE)
        self.register_buffer("code_KE", F.normalize(code_KE, dim=1))

    def indices(self, image_BHWC: Tensor) -> Tensor:
        rows, columns = self.grid(image_BHWC)
        x_RP = normalized_squares(image_BHWC, self.config.stride).flatten(0, 1)
        # the length of a projection changes no order
        found = [(x @ self.projection_PE @ self.code_KE.T).argmax(1) for x in x_RP.split(ROWS)]
        return torch.cat(found).view(-1, rows * columns)
