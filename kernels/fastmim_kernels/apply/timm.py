"""Blocks and attention as timm's VisionTransformer has them, in any model: known by their parts, then tried.

    block      x + drop_path(scale(attn(norm1(x)))), then the same of mlp(norm2(x)): modules or gamma_1 and
               gamma_2 for LayerScale, one drop path or two
    attention  qkv, heads, softmax, proj: these two linear layers hold all of its weights

Source  timm/models/vision_transformer.py and timm/layers of timm 1.0, Apache-2.0.
Limits  one add of two: the sum behind the MLP meets the norm of the next block, which is another module's.
        Attention with a mask goes the class's own way. A part, weight or setting that is not known by name
        may change what no trial happens upon: with one the module is left.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fastmim_kernels.apply.parts import add_norm, find_block
from fastmim_kernels.apply.swap import Finding, Swapped, arguments, demand_plain, hooked
from fastmim_kernels.apply.trial import OPTIONS, tokens
from fastmim_kernels.attention import attention

PARTS = {"norm1", "attn", "norm2", "mlp"}
FACTORS = {"ls1", "ls2", "drop_path1", "drop_path2"}
SETTINGS = {  # numbers that say nothing of windows, grids, positions
    "dim", "num_heads", "head_dim", "attn_dim", "scale", "fused_attn", "init_values",
    "gamma_1", "gamma_2",
}  # fmt: skip


class FusedBlock(Swapped):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        demand_plain(x)
        branch = self.attn(self.norm1(x), *args, **kwargs)
        normed, x = add_norm(self.norm2, branch, x, self.ls1, self.drop_path1)
        return x + self.drop_path2(self.ls2(self.mlp(normed)))


class FusedLooseBlock(Swapped):
    """One with fewer modules: gammas, one drop path for both branches, or none."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        demand_plain(x)
        (scale, drop_path), (scale2, drop_path2) = factors(self)
        branch = self.attn(self.norm1(x), *args, **kwargs)
        normed, x = add_norm(self.norm2, branch, x, scale, drop_path)
        y = self.mlp(normed)
        if scale2 is not None:
            y = scale2(y) if isinstance(scale2, nn.Module) else scale2 * y
        return x + (y if drop_path2 is None else drop_path2(y))


class FusedAttention(Swapped):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        demand_plain(x)
        if any(value is not None and value is not False for value in (*args, *kwargs.values())):
            return super().forward(x, *args, **kwargs)
        if self.training and getattr(getattr(self, "attn_drop", None), "p", 0):
            raise ValueError(
                "attention dropout was switched on since fastmim_kernels.apply: revert(model) first"
            )
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        out = self.proj(attention(q, k, v).flatten(2))
        return self.proj_drop(out) if hasattr(self, "proj_drop") else out


def factors(block: Any) -> tuple[tuple[Any, Any], ...]:
    """LayerScale and drop path of its two branches."""
    return tuple(
        (
            getattr(block, f"ls{i}", getattr(block, f"gamma_{i}", None)),
            getattr(block, f"drop_path{i}", getattr(block, "drop_path", None)),
        )
        for i in (1, 2)
    )


def find_timm(name: str, module: Any) -> Finding | None:
    children = {child for child, _ in module.named_children()}
    if children >= PARTS:
        return find_vit_block(name, module, children)
    if children >= {"qkv", "proj"} and hasattr(module, "num_heads"):
        return find_attention(name, module)
    return None


def find_vit_block(name: str, block: Any, children: set[str]) -> Finding:
    strange = {*children} - PARTS - FACTORS - {"drop_path"}
    obstacle = unknown(block, strange) or unknown_arguments(block)
    if obstacle is None and (
        own := {n for n, _ in block.named_parameters(recurse=False)} - {"gamma_1", "gamma_2"}
    ):
        obstacle = f"it has weights of its own: {listed(own)}"
    takes = arguments(block)[1:]
    if obstacle is None and takes != arguments(block.attn)[1:]:
        obstacle = f"its attention takes other arguments than {listed(takes) or 'the tokens'}"
    if obstacle is not None:
        return Finding(name, type(block).__name__, "add_layer_norm", obstacle=obstacle)
    mixin = FusedBlock if children >= FACTORS else FusedLooseBlock
    return find_block(
        name, block, mixin, block.norm2, block.mlp, *factors(block)[0], lambda width: tokens(width, takes)
    )


def find_attention(name: str, module: Any) -> Finding:
    extras = [getattr(module, part, None) for part in ("q_norm", "k_norm", "norm", "gate")]
    drop = getattr(module, "attn_drop", None)
    width: Any = getattr(module.qkv, "in_features", getattr(module.qkv, "in_channels", None))
    other = {n for n, _ in module.named_parameters() if n.partition(".")[0] not in ("qkv", "proj")}
    children = {child for child, _ in module.named_children()}
    if any(extra is not None and not isinstance(extra, nn.Identity) for extra in extras):
        obstacle: str | None = "it normalizes or gates queries, keys or values"
    elif other:
        obstacle = f"it has weights beside qkv and proj: {listed(other)}"
    elif drop is not None and not isinstance(drop, nn.Dropout | nn.Identity):
        obstacle = f"its attn_drop is a {type(drop).__name__}, not Dropout"
    elif getattr(drop, "p", 0):
        obstacle = "attention dropout: the op has none"
    elif hooked(drop, *extras):
        obstacle = "hooks on its dropout or norms would no longer fire"
    elif width is None:
        obstacle = f"its qkv is a {type(module.qkv).__name__} of no known width"
    else:
        known = {"qkv", "proj", "attn_drop", "proj_drop", "q_norm", "k_norm", "norm", "gate"}
        obstacle = unknown(module, children - known) or unknown_arguments(module)
    if obstacle is not None:
        return Finding(name, type(module).__name__, "attention", obstacle=obstacle)
    calls = tokens(width, arguments(module)[1:])
    return Finding(name, type(module).__name__, "attention", ((module, FusedAttention),), calls=calls)


def unknown(module: nn.Module, children: set[str]) -> str | None:
    """Parts and settings that may make its forward another one."""
    internals = vars(nn.Module())
    held = {k for k, v in vars(module).items() if k not in internals and v is not None and v is not False}
    if strange := children | (held - SETTINGS):
        return f"it has what may change its forward: {listed(strange)}"
    return None


def unknown_arguments(module: nn.Module) -> str | None:
    strange = set(arguments(module)[1:]) - set(OPTIONS)
    return f"forward wants {listed(strange)}" if strange else None


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
