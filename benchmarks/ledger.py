"""The ops of one training step of any method: what each reads, writes, multiplies and launches.

The method is built on the meta device, where tensors have shapes and no values, and runs forward and backward
there once; every op that reaches the dispatcher is one entry. So the list is that of the code as it stands,
for every method and option, and takes a second of a CPU. The optimizer and the averages of a teacher work on
lists of tensors or on flat memory, and are counted from the number of parameters.

Limits    attention is that of the tile kernels where they serve the shape; elsewhere it is one launch forward
          and two backward, as other libraries have it. One rank: collectives are not in it.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from fastmim_kernels.attention.tile import why_no_tile
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.op_facts import FREE, MANY, Op, Stage, attention_work, group_of, launches, memory, traffic
from fastmim.engine.ranks import Ranks
from fastmim.methods.base import Method, MethodConfig
from fastmim.models import block
from fastmim.models.vit import ViTConfig
from fastmim.optim.groups import parameter_groups
from fastmim.views import Batch

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
ENGINES = ("deepspeed", "plain")
CAT_BATCH = 128  # tensors that one launch of torch's concatenation takes
LIST_CHUNKS = 320 * 65536  # values that one launch of torch's ops on lists of tensors takes, at most

# --- trace ----------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Writes down every op that would run. Knows the weights, and which layer read what."""

    def __init__(self, method: Method):
        super().__init__()
        self.stage: Stage = "forward"
        self.ops: list[Op] = []
        self.weights = {memory(p): plain_name(name) for name, p in method.named_parameters()}
        self.readers: dict[tuple[int, int], str] = {}  # memory of an input, width of the output
        self.alive: list[torch.UntypedStorage] = []  # or another tensor would get its memory's name

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.numel()]
        name = op._schema.name.split("::")[1]
        self.alive += [x.untyped_storage() for x in outputs]
        held = {memory(x) for x in inputs}
        crop = not op._schema.is_mutable and all(memory(x) in held for x in outputs)
        if crop or not outputs or name.startswith(FREE):
            return out
        owners = [self.weights.get(memory(x)) for x in inputs]
        if inputs and owners[0] and len(set(owners)) == 1:  # a weight that was cast or put in order
            self.weights |= {memory(x): owners[0] for x in outputs}
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.ops.append(self.product(name, inputs, outputs))
        else:
            self.ops.append(self.other(name, args, inputs, outputs, next(filter(None, owners), None)))
        return out

    def product(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Op:
        a, b = inputs[-2:]
        *batch, M, K = a.shape
        N, size = b.shape[-1], math.prod(batch)
        owner = self.weights.get(memory(b)) or self.weights.get(memory(a))
        if self.stage == "forward":
            role = "forward"
            if owner:
                self.readers[memory(a), N] = owner
        else:
            role = "data gradient" if owner else "weight gradient"
            owner = owner or self.readers.get((memory(b), M)) or self.readers.get((memory(a), N))
        return Op(
            stage=self.stage, group=f"products, {role}" if owner else "other", name=name,
            what=owner or f"{M} x {N} x {K}", role=role, bytes=traffic(name, inputs, outputs),
            flops=2 * size * M * N * K, product=(size, M, N, K),
            precision="fp32" if a.dtype == torch.float32 else "bf16",
        )  # fmt: skip

    def other(
        self, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor], owner: str | None
    ) -> Op:
        largest = max([*inputs, *outputs], key=lambda x: x.numel())
        rows = math.prod(largest.shape[:-1]) if largest.numel() >= MANY else 1
        known = owner if name.removesuffix("_backward") in ("add_layer_norm", "bias_gelu") else None
        flops, elements = 0, largest.numel()
        if name.startswith("attention"):
            largest = inputs[1] if name.endswith("_backward") else inputs[0]  # a query
            flops, elements = attention_work(largest, args, name.endswith("_backward"))
        elif name == "info_nce":
            (B, n, D), G = inputs[0].shape, len(inputs[1])
            flops, elements = 4 * B * n * D * G, B * n * G
        elif name.startswith("norm_pix_loss_image"):
            elements = inputs[-3].numel()
        return Op(
            stage=self.stage, group=group_of(name, self.stage), name=name,
            what=known or " x ".join(map(str, largest.shape)), bytes=traffic(name, inputs, outputs),
            launches=launches(name, args, rows), flops=flops, elements=elements,
            precision="fp32" if largest.dtype == torch.float32 else "bf16",
        )  # fmt: skip


def plain_name(name: str) -> str:
    """Of a parameter: its layer, blocks alike."""
    return re.sub(r"\.\d+(?=\.)", "", name).rpartition(".")[0] or name


@torch.library.custom_op("fastmim_benchmarks::attention_other", mutates_args=())
def _other(
    q: Tensor, k: Tensor, v: Tensor, segments: list[int], keys: list[int], bias: Tensor | None = None
) -> Tensor:
    raise NotImplementedError("attention_other stands for kernels of other libraries in a trace")


@_other.register_fake
def _(q, k, v, segments, keys, bias=None):
    return q.new_empty(q.shape)


@torch.library.custom_op("fastmim_benchmarks::attention_other_backward", mutates_args=())
def _other_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    segments: list[int],
    keys: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise NotImplementedError("attention_other stands for kernels of other libraries in a trace")


@_other_backward.register_fake
def _(dout, q, k, v, bias, out, segments, keys):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        (q[:0] if bias is None else bias).clone(),
    )


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    q, k, v, *ctx.segments, bias = inputs
    ctx.save_for_backward(q, k, v, bias, output)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    *grads, dbias = _other_backward(dout, *ctx.saved_tensors, *ctx.segments)
    return *grads, None, None, dbias if ctx.saved_tensors[3] is not None else None


_other.register_autograd(_gradients, setup_context=_save)


@contextmanager
def attention_that_serves() -> Iterator[None]:
    """Within, models call the tile kernels where they serve on a GPU, and a stand-in where they do not."""
    real: Callable[..., Tensor] = block.attention

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        segments: Any = None,
        key_segments: Any = None,
        bias: Any = None,
        backend: Any = None,
    ) -> Tensor:
        lengths = (q.shape[1],) if segments is None else tuple(segments)
        if key_segments not in (None, lengths):
            assert bias is None
            return _other(q, k, v, list(lengths), list(key_segments))
        if why_no_tile(lengths, q.shape[3], q.dtype, "cuda") is None:
            return real(q, k, v, segments=segments, bias=bias, backend="tile")
        first = bias if bias is None or isinstance(bias, Tensor) else next(b for b in bias if b is not None)
        return _other(q, k, v, list(lengths), list(lengths), first)

    with patch.object(block, "attention", attention):
        yield


def traced(method: MethodConfig, model: ViTConfig, batch: int, precision: str) -> tuple[Method, list[Op]]:
    """Forward and backward of one micro-batch. ValueError for a batch that the method refuses."""
    method.check_batch(batch, 1)
    with torch.device("meta"), attention_that_serves():
        built = method.build(model).to(PRECISIONS[precision])
        built.share(Ranks.single())
        crops = tuple(torch.empty(batch, *v.size, model.channels, dtype=torch.uint8) for v in built.crops)
        numbers = torch.empty(batch, dtype=torch.int64)
        recorder = Recorder(built)
        with recorder:
            labels = numbers if method.labeled else None
            loss = built(Batch(crops, numbers, numbers, 0, labels)).loss
            recorder.stage = "backward"
            loss.backward()
    return built, recorder.ops


# --- update ---------------------------------------------------------------------------------------------


def listed(sizes: list[int], tensors: int) -> int:
    """Launches of one of torch's ops on lists: so many values, and so many tensors, fit into one."""
    return max(-(-sum(sizes) // LIST_CHUNKS), -(-len(sizes) // tensors)) if sizes else 0


def update(method: Method, precision: str, engine: str) -> list[Op]:
    """Optimizer and teacher, one rank. DeepSpeed keeps fp32 values flat, and moves each gradient there."""
    groups = parameter_groups(method.named_parameters(), weight_decay=0.05, group=method.group)
    sizes = [[p.numel() for p in group["params"]] for group in groups]
    flat = engine == "deepspeed"
    P, half, width = sum(map(sum, sizes)), precision == "bf16", PRECISIONS[precision].itemsize
    adamw = Op(
        stage="update", group="optimizer", name="adamw", what=f"{P} values", bytes=28 * P, elements=P,
        launches=sum(listed([sum(group)] if flat else group, 36) + 1 for group in sizes),
    )  # fmt: skip
    ops = [adamw]
    if half:  # gradients to fp32 before, weights to bf16 behind
        cast = len(sizes) if flat else sum(listed(group, 64) for group in sizes)
        ops.append(replace(adamw, name="cast", bytes=6 * P, launches=cast, count=2))
    if flat:
        count = sum(map(len, sizes))
        batches = sum(-(-len(group) // CAT_BATCH) for group in sizes)
        moved = replace(
            adamw, stage="backward", name="copy", what="gradients", bytes=2 * width * P // count, launches=1,
            count=count, elements=P // count,
        )  # fmt: skip
        ops += [
            moved,
            replace(adamw, name="flatten", what="gradients", bytes=2 * width * P, launches=batches),
        ]
    return ops + teacher(method, half)


def teacher(method: Method, half: bool) -> list[Op]:
    sizes = [
        p.numel()
        for module, student in method.averages()
        for p, s in zip(module.parameters(), student.parameters(), strict=True)
        if s.requires_grad
    ]
    if not sizes:
        return []
    P = sum(sizes)
    average = Op(
        stage="update", group="teacher", name="ema_update", what=f"{P} values", bytes=12 * P, elements=P
    )
    return [average] + (
        [replace(average, name="cast", bytes=6 * P, launches=listed(sizes, 64))] if half else []
    )


@cache
def ledger(
    method: MethodConfig, model: ViTConfig, *, batch: int, precision: str, engine: str = "deepspeed"
) -> tuple[Op, ...]:
    """Every op of a step, those alike as one entry, in the order in which they first run."""
    for what, got, known in (("precision", precision, PRECISIONS), ("engine", engine, ENGINES)):
        if got not in known:
            raise ValueError(f"{what}: want one of {', '.join(known)}, got {got!r}")
    if batch < 1:
        raise ValueError(f"batch: want 1 or more images, got {batch}")
    built, ops = traced(method, model, batch, precision)
    found: dict[Op, int] = {}
    for op in ops + update(built, precision, engine):
        one = replace(op, count=1)
        found[one] = found.get(one, 0) + op.count
    return tuple(replace(op, count=count) for op, count in found.items())
