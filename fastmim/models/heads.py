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

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmim.models.vit import LinearFP32, LinearGELU, init_linear

Activation = Literal["gelu", "relu"]
Norm = Literal["none", "bn", "ln"]
Init = Literal["mae", "torch"]
HEAD_EPS = 1e-6


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


class BatchNorm(nn.Module):
    """Batch norm of `[..., C]` over the rows of all ranks in training, by running averages in evaluation.

    Over the default process group, if there is one; every rank must come here with as many rows. The gradient
    of weight and bias is this rank's share: ranks average theirs, as of any parameter.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = HEAD_EPS, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchNorm":
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self  # in bf16 a step of the averages could be lost

    def forward(self, x: Tensor) -> Tensor:
        """ValueError for one row alone: it has no variance."""
        rows_RC = x.flatten(0, -2)
        if not self.training:
            unit_RC = (rows_RC.float() - self.running_mean) * (self.running_var + self.eps).rsqrt()
            return (unit_RC * self.weight + self.bias).to(x.dtype).view_as(x)
        world = dist.get_world_size() if dist.is_initialized() else 1
        if len(rows_RC) * world < 2:
            raise ValueError("batch norm: want at least two rows to take a variance of, got one")
        y_RC, mean_C, var_C = NormalizeOverRanks.apply(rows_RC, self.weight, self.bias, self.eps, world)
        with torch.no_grad():
            unbiased = len(rows_RC) * world / (len(rows_RC) * world - 1)
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C * unbiased, self.momentum)
        return y_RC.view_as(x)


class NormalizeOverRanks(torch.autograd.Function):
    """y, mean and biased variance; only y has a gradient. One collective forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, world: int) -> Any:
        x32_RC = x_RC.float()
        var_C, mean_C = torch.var_mean(x32_RC, 0, correction=0)
        if world > 1:  # of each rank its own mean and variance: sums of squares would cancel
            stats_2C = torch.stack([mean_C, var_C])
            every_W2C = [torch.empty_like(stats_2C) for _ in range(world)]
            dist.all_gather(every_W2C, stats_2C)
            means_WC, vars_WC = torch.stack(every_W2C).unbind(1)
            between_C, mean_C = torch.var_mean(means_WC, 0, correction=0)
            var_C = vars_WC.mean(0) + between_C
        scale_C = (var_C + eps).rsqrt()
        unit_RC = (x32_RC - mean_C) * scale_C
        ctx.save_for_backward(x_RC, mean_C, scale_C, weight_C)
        ctx.world = world
        ctx.mark_non_differentiable(mean_C, var_C)
        return (unit_RC * weight_C + bias_C).to(x_RC.dtype), mean_C, var_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RC: Tensor, *_: Tensor) -> Any:
        x_RC, mean_C, scale_C, weight_C = ctx.saved_tensors
        unit_RC, dy32_RC = (x_RC.float() - mean_C) * scale_C, dy_RC.float()
        sums_2C = torch.stack([dy32_RC.sum(0), (dy32_RC * unit_RC).sum(0)])
        dbias_C, dweight_C = sums_2C.to(weight_C.dtype)
        if ctx.world > 1:
            sums_2C = sums_2C.clone()
            dist.all_reduce(sums_2C)
        mean_dy_C, mean_dyx_C = sums_2C / (len(x_RC) * ctx.world)
        dx_RC = (dy32_RC - mean_dy_C - unit_RC * mean_dyx_C) * (scale_C * weight_C)
        return dx_RC.to(x_RC.dtype), dweight_C, dbias_C, None, None
