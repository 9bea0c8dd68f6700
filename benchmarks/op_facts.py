"""One op of a training step, and the facts of it: its group, bytes, FLOP and launches.

Bytes     what an op's inputs and outputs hold, each once: the least traffic. Where an op reads a part of a
          tensor only (a gather), that part.
FLOP      of products as they run, 2 M N K, and not those of the method's paper (`flops.py`); of attention
          4 n^2 d a head forward and twice that backward; of InfoNCE two products. All else has none.
Launches  kernels and fills as CUDA gets them: 1 an op, but for those of `launches`.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

Stage = Literal["forward", "backward", "update"]
SHARE = 64  # rows summed by one program of a fused backward: partial sums are rows / SHARE long
SEMAPHORES = 1024  # torch's reduction over so many rows takes several blocks, and a fill for their semaphores
MANY = 1 << 16  # values; fewer are reduced by one block
PADDING = 64, 16  # queries and keys that a tile of attention is rounded up to


@dataclass(frozen=True, kw_only=True)
class Op:
    """One entry, of `count` calls alike; all figures are of one call."""

    stage: Stage
    group: str
    name: str
    what: str  # the layer, or the shape
    bytes: int
    launches: int = 1
    flops: int = 0
    product: tuple[int, int, int, int] | None = None  # batch, M, N, K
    role: str = ""  # of a product: forward, data gradient, weight gradient
    precision: str = "bf16"  # in which it multiplies
    elements: int = 0  # what instructions are counted by
    count: int = 1


# --- what an op is --------------------------------------------------------------------------------------

FREE = ("empty", "new_empty", "detach", "set_", "lift_fresh")  # memory or a view, and no kernel
GROUPS = {  # of what is not a product of matrices
    "attention": ("attention_tile", "attention_other"),
    "add_layer_norm": ("add_layer_norm", "native_layer_norm", "layer_norm"),
    "bias_gelu": ("bias_gelu", "gelu"),
    "gather, restore": (
        "gather", "gather_patches", "gather_tokens", "index", "restore_tokens", "scatter", "scatter_",
        "scatter_add", "scatter_add_", "index_put", "slice_backward",
    ),
    "pixel loss": ("norm_pix_loss", "norm_pix_loss_image"),
    "info_nce": ("info_nce",),
    "masks": ("split_patches", "split_patches_grouped"),
    "casts, copies": ("_to_copy", "stack", "cat", "copy_", "clone", "repeat", "_foreach_copy_"),
    "zero fills": ("zeros", "zeros_like", "new_zeros", "fill_", "zero_", "full", "ones_like"),
}  # fmt: skip
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def group_of(name: str, stage: Stage) -> str:
    if name == "sum" and stage == "backward":
        return "bias gradients"
    return GROUP_OF.get(name.removesuffix("_backward"), GROUP_OF.get(name, "other"))


def launches(name: str, args: tuple[Any, ...], rows: int) -> int:
    """Of one call, as CUDA sees it. `rows`: all but the last dimension of the largest input."""
    partial = summed(-(-rows // SHARE))
    segments = next((a for a in args if isinstance(a, (list, tuple)) and a and type(a[0]) is int), (1,))
    return {
        "add_layer_norm_backward": 2 + 2 * partial,  # and a fill for a scale that is not there
        "bias_gelu_backward": 1 + partial,
        "attention_tile": runs(segments),
        "attention_tile_backward": sum(2 if n > SHARE else 1 for n in set(segments)),
        "attention_other_backward": 2,
        "native_layer_norm_backward": 3,
        "restore_tokens_backward": 5,  # a fill, and the sums for the mask token and the positions
        "info_nce": 2,  # and the norms of the keys
        "scatter_add": 2,
        "slice_backward": 2,
        "sum": summed(rows),
    }.get(name, 1)


def summed(rows: int) -> int:
    return 1 + (rows >= SEMAPHORES)


def runs(segments: Any) -> int:
    """Neighbors of one length share a launch."""
    return 1 + sum(a != b for a, b in pairwise(segments))


def touched(x: Tensor) -> int:
    """Bytes that a tensor really has: an expanded dimension is one value."""
    return x.element_size() * math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s)


def traffic(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that one call moves."""
    read = {(memory(x), x.storage_offset(), tuple(x.shape)): touched(x) for x in inputs}
    out = sum(touched(x) for x in outputs)
    if name in ("gather", "index", "gather_tokens"):  # as much of the first as comes out
        return 2 * out + sum(touched(x) for x in inputs[1:])
    if name == "gather_patches":
        return out + outputs[0].numel() * inputs[0].element_size() + touched(inputs[1])
    if name.startswith("norm_pix_loss_image"):
        pred, image = inputs[-3:-1]
        return sum(read.values()) - touched(image) + pred.numel() * image.element_size() + out
    if name == "restore_tokens_backward":
        return sum(read.values()) + 2 * out  # the gradient is filled with zeros first
    return sum(read.values()) + out


def memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def attention_work(q: Tensor, args: Any, backward: bool) -> tuple[int, int]:
    """FLOP by definition, and the logits that tiles of the kernels hold."""
    B, T, H, d = q.shape
    segments, *rest = [a for a in args if isinstance(a, (list, tuple))] or [(T,)]
    keys = rest[0] if rest and len(rest[0]) == len(segments) else segments
    pairs = list(zip(segments, keys, strict=True))
    flops = 4 * B * H * d * sum(n * m for n, m in pairs) * (2 if backward else 1)
    up, across = PADDING
    return flops, B * H * sum(-(-n // up) * up * (-(-m // across) * across) for n, m in pairs)
