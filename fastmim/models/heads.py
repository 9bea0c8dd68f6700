"""Projection and prediction heads of siamese methods, and the batch norm in them.

    head        Linear -> norm -> activation for each hidden width, then Linear
    batch norm  x^ = (x - mean) / sqrt(var + eps)          mean and var over the rows of all ranks
                y  = weight x^ + bias
                dx = weight / sqrt(var + eps) * (dy - mean(dy) - x^ mean(dy x^))

Source  two layers, GELU, no norm: Kong & Zhang, arXiv:2208.04164; batch norm and ReLU: arXiv:2207.13532.
        Batch norm over ranks is that of torch.nn.SyncBatchNorm, which refuses the CPU.
Shapes  rows R are all dimensions before the last: `[B, D]` or `[B, N, D]`; C channels.
Dtypes  output in the input's dtype; statistics, their running averages and all sums in fp32.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmim.models.block import LinearFP32, LinearGELU
from fastmim.models.fp32_buffers import FP32Buffers
from fastmim.models.init import init_linear, normal_linear, truncated_normal
from fastmim.ranks import ALONE, AcrossRanks

Activation = Literal["gelu", "relu"]
Norm = Literal["none", "bn", "ln"]
Init = Literal["mae", "torch"]
HEAD_EPS = 1e-6
MOCO_EPS = 1e-5


class Head(nn.Sequential):
    """`[..., widths[0]]` to `[..., widths[-1]]` through hidden layers of the widths between.

    `init` "mae": Xavier-uniform matrices and zero biases; "torch": nn.Linear's own. With `fp32` its products
    are so in bf16 too: pooled features of different images lie so close together that batch norm, which takes
    their differences, would find little else than rounding.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        activation: Activation = "gelu",
        norm: Norm = "none",
        last_bias: bool = True,
        init: Init = "mae",
        fp32: bool = False,
    ):
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"want two or more widths of at least 1, got {tuple(widths)}")
        for n_in, n_out in pairwise(widths[:-1]):
            self.extend(hidden_layer(n_in, n_out, activation, norm, fp32))
        linear = LinearFP32 if fp32 else nn.Linear
        self.append(linear(widths[-2], widths[-1], bias=last_bias))
        if init == "mae":
            self.apply(init_linear)


def hidden_layer(n_in: int, n_out: int, activation: Activation, norm: Norm, fp32: bool) -> list[nn.Module]:
    if norm == "none" and activation == "gelu" and not fp32:
        return [LinearGELU(n_in, n_out)]  # in one pass
    layers: list[nn.Module] = [LinearFP32(n_in, n_out) if fp32 else nn.Linear(n_in, n_out)]
    if norm != "none":
        layers.append(BatchNorm(n_out) if norm == "bn" else nn.LayerNorm(n_out, eps=HEAD_EPS))
    return [*layers, nn.GELU() if activation == "gelu" else nn.ReLU()]


class NormedHead(nn.Sequential):
    """MoCo v3's head: Linear layers without biases, a batch norm behind each, the last one without affine.

    Hidden layers have ReLU, all Linear layers nn.Linear's own first weights. In fp32 whatever the precision
    of the run, as `Head` says why.

    Source  Chen et al., arXiv:2104.02057; facebookresearch/moco-v3, vits and builder.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        last = len(widths) - 2
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            self.append(LinearFP32(n_in, n_out, bias=False))
            self.append(BatchNorm(n_out, eps=MOCO_EPS, affine=i < last))
            if i < last:
                self.append(nn.ReLU())


def beit_linear(n_in: int, n_out: int) -> nn.Linear:
    """A Linear layer with BEiT's first weights: a normal cut at one deviation, no bias."""
    linear = nn.Linear(n_in, n_out)
    truncated_normal(linear.weight, deviations=1)
    nn.init.zeros_(linear.bias)
    return linear


class BatchNorm(FP32Buffers):
    """Batch norm of `[..., C]` over the rows of all ranks in training, by running averages in evaluation.

    Every rank of `ranks` must come here with as many rows. The gradient of weight and bias is this rank's
    share: ranks average theirs, as of any parameter. Without `affine` there is neither.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    ranks: AcrossRanks  # those whose rows it is over; a method shares its own: `Method.share`

    def __init__(self, channels: int, *, eps: float = HEAD_EPS, momentum: float = 0.1, affine: bool = True):
        super().__init__()
        self.eps, self.momentum, self.ranks = eps, momentum, ALONE
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """ValueError for one row alone: it has no variance."""
        rows_RC = x.flatten(0, -2)
        if not self.training:
            unit_RC = (rows_RC.float() - self.running_mean) * (self.running_var + self.eps).rsqrt()
            return affine(unit_RC, self.weight, self.bias).to(x.dtype).view_as(x)
        world = self.ranks.world
        if len(rows_RC) * world < 2:
            raise ValueError("batch norm: want at least two rows to take a variance of, got one")
        y_RC, mean_C, var_C = NormalizeOverRanks.apply(rows_RC, self.weight, self.bias, self.eps, self.ranks)
        with torch.no_grad():
            unbiased = len(rows_RC) * world / (len(rows_RC) * world - 1)
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C * unbiased, self.momentum)
        return y_RC.view_as(x)


class NormalizeOverRanks(torch.autograd.Function):
    """y, mean and biased variance; only y has a gradient. One collective forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RC: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        eps: float,
        ranks: AcrossRanks,
    ) -> Any:
        x32_RC = x_RC.float()
        var_C, mean_C = torch.var_mean(x32_RC, 0, correction=0)
        if ranks.world > 1:  # of each rank its own mean and variance: sums of squares would cancel
            stats_2C = torch.stack([mean_C, var_C])
            means_WC, vars_WC = ranks.gather(stats_2C[None]).unbind(1)
            between_C, mean_C = torch.var_mean(means_WC, 0, correction=0)
            var_C = vars_WC.mean(0) + between_C
        scale_C = (var_C + eps).rsqrt()
        unit_RC = (x32_RC - mean_C) * scale_C
        ctx.save_for_backward(x_RC, mean_C, scale_C, weight_C)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean_C, var_C)
        return affine(unit_RC, weight_C, bias_C).to(x_RC.dtype), mean_C, var_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RC: Tensor, *_: Tensor) -> Any:
        x_RC, mean_C, scale_C, weight_C = ctx.saved_tensors
        unit_RC, dy32_RC = (x_RC.float() - mean_C) * scale_C, dy_RC.float()
        sums_2C = torch.stack([dy32_RC.sum(0), (dy32_RC * unit_RC).sum(0)])
        dbias_C, dweight_C = sums_2C if weight_C is None else sums_2C.to(weight_C.dtype)
        mean_dy_C, mean_dyx_C = ctx.ranks.mean(sums_2C) / len(x_RC)
        scale_C = scale_C if weight_C is None else scale_C * weight_C
        dx_RC = (dy32_RC - mean_dy_C - unit_RC * mean_dyx_C) * scale_C
        if weight_C is None:
            return dx_RC.to(x_RC.dtype), None, None, None, None
        return dx_RC.to(x_RC.dtype), dweight_C, dbias_C, None, None


def affine(unit_RC: Tensor, weight_C: Tensor | None, bias_C: Tensor | None) -> Tensor:
    """Weight and bias where there are any."""
    return unit_RC if weight_C is None or bias_C is None else unit_RC * weight_C + bias_C


class Codes(nn.Module):
    """Cosines with K codes, each a direction and a length, that of DINO's weight-normed last layer.

    logits = x^ W^T,  W[k] = length[k] direction[k] / |direction[k]|
    """

    def __init__(self, width: int, num_codes: int, *, train_lengths: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_codes, 1), requires_grad=train_lengths)
        self.weight_v = nn.Parameter(nn.Linear(width, num_codes, bias=False).weight.detach())

    def forward(self, x_RE: Tensor) -> Tensor:
        """`[R, E]` to `[R, K]`."""
        direction_KE = F.normalize(self.weight_v.float(), dim=1)
        return F.linear(x_RE, (self.weight_g.float() * direction_KE).to(x_RE.dtype))


class CodeHead(nn.Module):
    """DINO's head: an MLP with GELU, its output on the unit sphere, and K codes there.

    Source  Caron et al., arXiv:2104.14294; facebookresearch/dino: normal first weights of the MLP, and those
            of nn.Linear of the codes, whose lengths are 1 and stay so unless `train_lengths`.
    """

    def __init__(self, widths: Sequence[int], num_codes: int, *, train_lengths: bool = False):
        super().__init__()
        self.mlp = Head(widths, init="torch")
        self.mlp.apply(normal_linear)
        self.codes = Codes(widths[-1], num_codes, train_lengths=train_lengths)

    def forward(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """`[R, D]` to points on the unit sphere, `[R, E]`, and their logits, `[R, K]`."""
        x_RE = self.points(x_RD)
        return x_RE, self.codes(x_RE)

    def points(self, x_RD: Tensor) -> Tensor:
        """`[R, D]` to what is compared with the codes, of norm 1. `[R, E]`."""
        return F.normalize(self.mlp(x_RD).float(), dim=-1).to(x_RD.dtype)
