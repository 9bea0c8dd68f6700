"""The two parts that all patched families share: bias + GELU in an MLP, residual + LayerNorm in a block.

    MLP     act(fc1(x))                  ->  fc1 returns bias_gelu(x W^T, bias), act passes it on
    block   y = norm(r + keep * g * x)   ->  norm returns both y and the sum, from x, r, g and keep

Dtypes  Each op runs on what the unpatched code would have computed: x W^T in the dtype of the linear layer,
        the sum in the widest dtype of what is added. Under autocast the branch stays in half precision and
        normed comes in it: LayerNorm's fp32, rounded as the linear layers that read it round it themselves.
Hooks   Each weight is used inside the module that owns it, so hooks that gather weights (FSDP, ZeRO-3) fire.
        LayerScale and drop path are called on ones, which gives their factor: the same draw of the same
        generator. What a hook sees is another thing: fc1's value is after the GELU, norm's is a pair.
Limits  exact GELU, fc1 with bias; LayerNorm over the last dim, with weight and bias, width <= 8192.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim_kernels.add_layer_norm import add_layer_norm
from fastmim_kernels.apply.swap import (
    Finding,
    Swapped,
    demand_float,
    demand_plain,
    hooked,
    is_a,
    strange_dtype,
)
from fastmim_kernels.apply.trial import Calls, tokens
from fastmim_kernels.bias_gelu import bias_gelu
from fastmim_kernels.norm_pix_loss import MAX_D

# What reads the normed tokens with linear layers only, which round them under autocast anyway
LINEAR_READERS = (
    "Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked",
    "ViTMLP", "ViTMAEMLP", "BeitMLP", "Dinov2MLP", "Dinov2SwiGLUFFN",
)  # fmt: skip

SCALES, DROPS = ("LayerScale", "Dinov2LayerScale"), ("DropPath", "Dinov2DropPath", "BeitDropPath")


def exchanged(module: object) -> ValueError:
    return ValueError(
        f"a {type(module).__name__} was put in place of a patched module: fastmim_kernels.revert(model) "
        "before modules are exchanged, apply afterwards"
    )


# --- bias + GELU -----------------------------------------------------------------------------------


class LinearGelu(Swapped):
    """A linear layer and the exact GELU behind it."""

    def forward(self, x: Tensor) -> Tensor:
        demand_plain(x)
        product = F.linear(x, self.weight)
        demand_float(product)
        return bias_gelu(product.contiguous(), self.bias)


class PassedOn(Swapped):
    """The GELU whose work the layer before it has done."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedMlp(Swapped):
    """Its forward is unchanged; it looks after the two parts that only make sense together."""

    def forward(self, *args, **kwargs):
        demand_plain(*args)
        first, act = (getattr(self, name) for name in mlp_parts(self))
        if not (isinstance(first, LinearGelu) and isinstance(act, PassedOn)):
            raise exchanged(act if isinstance(first, LinearGelu) else first)
        return super().forward(*args, **kwargs)


def mlp_parts(mlp: object) -> tuple[str, str]:
    """Names of its first linear layer and of the activation behind it."""
    pairs = (
        ("fc1", "act"), ("fc1", "activation_fn"), ("fc1", "activation"), ("dense", "intermediate_act_fn"),
        ("dense1", "intermediate_act_fn"), ("up_proj", "act_fn"),
    )  # fmt: skip
    return next((pair for pair in pairs if all(hasattr(mlp, name) for name in pair)), pairs[0])


def exact_gelu(act: Any) -> bool:
    if is_a(act, "torch.nn.modules.activation", "GELU"):
        return act.approximate == "none"
    if is_a(act, "transformers.activations", "GELUActivation"):
        return act.act is F.gelu
    return is_a(act, "timm", "GELU")


def find_mlp(name: str, mlp: Any, parents: Counter[int], named: bool) -> Finding | None:
    """`parents` counts the modules that hold each module, by id; `named`: its class is called as MLPs are."""
    first: Any
    act: Any
    first, act = (getattr(mlp, part, None) for part in mlp_parts(mlp))
    if act is None or not (hasattr(first, "in_features") or (named and isinstance(first, nn.Module))):
        return None
    if "forward" in vars(mlp):
        obstacle: str | None = "its forward is not that of its class"
    elif not is_a(first, "torch.nn.modules.linear", "Linear"):
        obstacle = f"its first layer is a {type(first).__name__} whose forward is not Linear's"
    elif first.bias is None:
        obstacle = "its first layer has no bias"
    elif not exact_gelu(act):
        obstacle = f"its activation is {act}, not the exact GELU"
    elif hooked(first, act):
        obstacle = "hooks on its first layer or activation would see other values"
    elif parents[id(first)] > 1 or parents[id(act)] > 1:
        obstacle = "its first layer or activation serves another module too"
    else:
        obstacle = strange_dtype(first)
    if obstacle is not None:
        return Finding(name, type(mlp).__name__, "bias_gelu", obstacle=obstacle)
    swaps = (mlp, FusedMlp), (first, LinearGelu), (act, PassedOn)
    return Finding(name, type(mlp).__name__, "bias_gelu", swaps, calls=tokens(first.in_features))


# --- residual + LayerNorm ----------------------------------------------------------------------------


class AddNorm(Swapped):
    """LayerNorm of `residual + keep * scale * x`, and that sum. Called with x alone it is what it was."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return super().forward(x)
        demand_plain(x)
        dtype = torch.promote_types(branch_dtype(x, scale), residual.dtype)
        device = x.device.type
        if not (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == x.dtype):
            x = x.to(dtype)
        residual, shape = residual.to(dtype), x.shape
        demand_float(residual)
        if x.ndim > 3:  # an image of tokens
            x, residual = x.flatten(1, -2), residual.flatten(1, -2)
        if residual.stride(-1) != 1:  # a convolution's tokens with their positions, without a class token
            residual = residual.contiguous()
        out = add_layer_norm(x, residual, self.weight, self.bias, eps=self.eps, scale=scale, keep=keep)
        return out if len(shape) <= 3 else (out[0].view(shape), out[1].view(shape))


def branch_dtype(x: Tensor, scale: Tensor | None) -> torch.dtype:
    return x.dtype if scale is None else torch.promote_types(x.dtype, scale.dtype)


def add_norm(
    norm: nn.Module,
    x: Tensor,
    residual: Tensor,
    scale: nn.Module | Tensor | None = None,
    drop_path: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """`normed, sum` of `residual + drop_path(scale(x))`, by a norm that was patched for it."""
    if not isinstance(norm, AddNorm):
        raise exchanged(norm)
    for module in (scale, drop_path):
        if isinstance(module, nn.Module) and not named_factor(module):
            raise exchanged(module)
    if isinstance(scale, nn.Module):
        gamma = next(scale.parameters(), None)
        scale = None if gamma is None else scale(torch.ones(x.shape[-1], dtype=gamma.dtype, device=x.device))
    keep = None
    if isinstance(drop_path, nn.Module) and drop_path.training and getattr(drop_path, "drop_prob", None):
        ones = torch.ones(len(x), *[1] * (x.ndim - 1), dtype=branch_dtype(x, scale), device=x.device)
        keep = drop_path(ones).float().flatten()
    return norm(x, residual, scale, keep)


def named_factor(module: nn.Module) -> bool:
    """By name alone, since it is asked in every forward. FSDPLayerScale is a LayerScale."""
    return any(cls.__name__ in ("Identity", *SCALES, *DROPS) for cls in type(module).__mro__)


def factor_obstacle(scale: object, drop_path: object) -> str | None:
    """Why the branch's factors are not those of the op."""
    for module, names in (scale, SCALES), (drop_path, DROPS):
        known = is_a(module, "timm", *names) or is_a(module, "transformers.models", *names)
        if isinstance(module, nn.Module) and not known and not is_a(module, "torch.nn", "Identity"):
            return f"its {type(module).__name__} is neither LayerScale nor drop path"
    return None


def reads_linearly(mlp: object) -> bool:
    """Whether nothing but linear layers reads what it is given: by its class, or by its parts."""
    if is_a(mlp, "timm", *LINEAR_READERS) or is_a(mlp, "transformers.models", *LINEAR_READERS):
        return True
    parts = {name for name, _ in mlp.named_children()} if isinstance(mlp, nn.Module) else set()
    return {"fc1", "act", "fc2"} <= parts <= {"fc1", "act", "drop", "drop1", "norm", "fc2", "drop2"}


def find_block(
    name: str,
    block: nn.Module,
    mixin: type,
    norm: Any,
    mlp: object,
    scale: object,
    drop_path: object,
    calls: Callable[[int], Calls],
) -> Finding:
    """`calls` makes of the width what the block is tried with."""
    if not (is_a(norm, "torch.nn.modules.normalization", "LayerNorm") or is_a(norm, "timm", "LayerNorm")):
        obstacle: str | None = f"its second norm is a {type(norm).__name__} whose forward is not LayerNorm's"
    elif getattr(norm, "_fast_norm", False):
        obstacle = "timm's fast norm computes in the dtype of autocast"
    elif norm.weight is None or norm.bias is None:
        obstacle = "its second norm has no weight or no bias"
    elif len(norm.normalized_shape) != 1 or norm.normalized_shape[0] > MAX_D:
        obstacle = f"want one dim of at most {MAX_D} normalized, got {norm.normalized_shape}"
    elif not reads_linearly(mlp):
        obstacle = f"its {type(mlp).__name__} may read more of the normed tokens than a linear layer does"
    elif (strange := factor_obstacle(scale, drop_path)) is not None:
        obstacle = strange
    elif hooked(norm, scale, drop_path):
        obstacle = "hooks on its second norm, LayerScale or drop path would see other values"
    else:
        obstacle = strange_dtype(norm, *(m for m in (scale,) if isinstance(m, nn.Module)))
    what = type(block).__name__
    if obstacle is not None:
        return Finding(name, what, "add_layer_norm", obstacle=obstacle)
    swaps, width = ((block, mixin), (norm, AddNorm)), norm.normalized_shape[0]
    return Finding(name, what, "add_layer_norm", swaps, calls=calls(width))
