"""timm's VisionTransformer, and any model made of its blocks.

Source  timm/models/vision_transformer.py and timm/layers of timm 1.0, Apache-2.0; `Block.forward` took the
        tokens alone, then a mask, then is_causal.
Limits  one add of two: the sum behind the MLP meets the norm of the next block, which is another module's.
        Attention with a mask goes the class's own way.
"""

from collections import Counter
from typing import Any

from torch import Tensor, nn

from fastmim_kernels.attention import attention
from fastmim_kernels.patch_parts import add_norm, find_block, find_mlp
from fastmim_kernels.patch_swap import Finding, Swapped, arguments, hooked, is_a

TAKES = ((), ("attn_mask",), ("attn_mask", "is_causal"))  # beside the tokens


class FusedBlock(Swapped):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        branch = self.attn(self.norm1(x), *args, **kwargs)
        normed, x = add_norm(self.norm2, branch, x, self.ls1, self.drop_path1)
        return x + self.drop_path2(self.ls2(self.mlp(normed)))


class FusedAttention(Swapped):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if any(value is not None and value is not False for value in (*args, *kwargs.values())):
            return super().forward(x, *args, **kwargs)
        if self.attn_drop.p and self.training:
            raise ValueError(
                "attention dropout was switched on since fastmim_kernels.apply: revert(model) first"
            )
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return self.proj_drop(self.proj(attention(q, k, v).flatten(2)))


def find_timm(name: str, module: Any, parents: Counter[int]) -> Finding | None:
    if is_a(module, "timm", "Mlp"):
        return find_mlp(name, module, parents)
    if is_a(module, "timm", "Attention"):
        return find_attention(name, module)
    if not is_a(module, "timm.models.vision_transformer", "Block"):
        return None
    parts = {child for child, _ in module.named_children()}
    wanted = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
    if parts != wanted or arguments(module)[1:] not in TAKES:
        return Finding(
            name, type(module).__name__, "add_layer_norm", obstacle="a block of another version of timm"
        )
    return find_block(name, module, FusedBlock, module.norm2, module.mlp, module.ls1, module.drop_path1)


def find_attention(name: str, module: Any) -> Finding:
    extras = [getattr(module, part, None) for part in ("q_norm", "k_norm", "norm", "gate")]
    if arguments(module)[1:] not in TAKES or not hasattr(module, "attn_drop"):
        obstacle: str | None = "attention of another version of timm"
    elif any(extra is not None and not isinstance(extra, nn.Identity) for extra in extras):
        obstacle = "it normalises or gates queries, keys or values"
    elif module.attn_drop.p:
        obstacle = "attention dropout: the op has none"
    elif hooked(module.attn_drop, *extras):
        obstacle = "hooks on its dropout or norms would no longer fire"
    else:
        obstacle = None
    swaps = ((module, FusedAttention),) if obstacle is None else ()
    return Finding(name, type(module).__name__, "attention", swaps, obstacle)
