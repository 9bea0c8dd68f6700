"""What apply has found is tried before it is put in: on a copy of the layer, its own code against ours.

Inputs    random, of the layer's own width, dtype and device: an even and an odd number of tokens, rows
          without a batch, images in both layouts, and each optional argument that is known by name. What its
          own code does not take is no evidence; of the rest the patched code must take all.
Compared  outputs and all gradients, in eval and in training mode, each pair from one seed.
Traces    none. The copy has random weights of its own (zeros and ones hide who adds them where) and no hooks;
          the generators go on from where they were; attention is not timed.
Cost      layers of equal classes, shapes and settings are tried once.
"""

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmim_kernels.apply.swap import FLOATS, Finding, swap
from fastmim_kernels.attention.timing import untimed

Randn = Callable[..., Tensor]
Call = tuple[str, Tensor, dict[str, Any]]  # how its shape is written, the first argument, the others
Calls = Callable[[Randn], list[Call]]
Seed = Callable[[int], None]

AGREE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # of the norm; a GPU may use TF32
TOKENS = "[B, N, D]"
OPTIONS: dict[str, Callable[[Randn], list[Any]]] = {  # for two samples of five tokens
    "attn_mask": lambda randn: [randn(5, 5), randn(5, 5).fill_diagonal_(1) > 0],
    "attention_mask": lambda randn: [randn(2, 1, 5, 5)],
    "is_causal": lambda randn: [True],
    "shared_rel_pos_bias": lambda randn: [randn(1, 1, 5, 5)],
}


def tokens(width: int, takes: tuple[str, ...] = (), **always: Any) -> Calls:
    """Calls of a layer that may take tokens, rows or images, with each option of `takes` that is known."""

    def make(randn: Randn) -> list[Call]:
        shapes: dict[str, list[tuple[int, ...]]] = {
            TOKENS: [(2, 5, width), (3, 16, width)],
            "[M, D]": [(7, width)],
            "[B, H, W, D]": [(2, 3, 5, width)],
            "[B, D, H, W]": [(2, width, 3, 5)],
        }
        calls: list[Call] = [(form, randn(*s), always) for form, sizes in shapes.items() for s in sizes]
        for name in takes:
            values = OPTIONS[name](randn) if name in OPTIONS else []
            calls += [(f"{TOKENS} with {name}", randn(2, 5, width), always | {name: v}) for v in values]
        return calls

    return make


def weightless(module: nn.Module) -> str | None:
    """Why it cannot be tried yet."""
    weights = list(module.parameters())
    if any(is_lazy(p) for p in weights):
        return "its weights are not there yet: run the model once, then apply"
    if any(p.is_meta for p in weights):
        return "it is on the meta device and cannot be tried"
    return None


def tried(finding: Finding, known: dict[Any, str | None]) -> Finding:
    """The finding if it stood its trial, else the same place left, and why. `known`: verdicts so far."""
    if finding.obstacle is not None or finding.calls is None:
        return finding
    root = finding.swaps[0][0]
    key = finding.what, finding.op, tuple(mixin for _, mixin in finding.swaps), likeness(root)
    if key not in known:
        known[key] = trial(root, finding)
    return finding if known[key] is None else finding.left(str(known[key]))


def likeness(root: nn.Module) -> tuple:
    """What layers share that behave alike; rates of dropout and drop path only as on or off."""
    internals, found = vars(nn.Module()), []
    for name, module in root.named_modules():
        own: list[tuple[str, object]] = []
        for key, value in vars(module).items():
            if key in ("p", "drop_prob"):
                own.append((key, bool(value)))
            elif key not in internals and key != "layer_idx":  # transformers counts its layers
                plain = isinstance(value, bool | int | float | str | tuple | torch.dtype | None)
                own.append((key, repr(value) if plain else id(value)))
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = tuple((n, type(t), t.shape, t.dtype, t.device, t.requires_grad) for n, t in tensors)
        found.append((name, type(module), tuple(own), shapes))
    return tuple(found)


# --- the trial -----------------------------------------------------------------------------------------


def trial(root: nn.Module, finding: Finding) -> str | None:
    """Why the patched code is not that of `root`; None where it is."""
    device = next(root.parameters()).device
    with rehearsal(device) as seed:
        try:
            seed(0)
            twin, parts = twin_of(root)
        except Exception as error:  # of whatever the layer holds
            return f"it cannot be copied for a trial: {one_line(error)}"
        dtypes, dtype = {p.dtype for p in twin.parameters()}, next(p.dtype for p in twin.parameters())
        tolerance = max(AGREE[d] for d in (*dtypes & AGREE.keys(), *[torch.bfloat16] * (len(dtypes) > 1)))
        buffers = [(b, b.clone()) for b in twin.buffers()]
        calls = (
            finding.calls(lambda *shape: torch.randn(shape, device=device).to(dtype)) if finding.calls else []
        )
        modes = [(call, training) for call in calls for training in (False, True)]
        with torch.autocast(device.type, torch.bfloat16, enabled=len(dtypes) > 1):
            taken: list[tuple[str, Tensor, partial[dict[str, Tensor]], dict[str, Tensor]]] = []
            refusals: dict[str, Exception] = {}
            for (form, x, others), training in modes:
                whole = (
                    not taken or taken[0][1] is x
                )  # the gradients of the weights, for one input: they cost most
                run = partial(outcome, twin, buffers, x, others, training, seed, whole)
                try:
                    taken.append((form, x, run, run()))
                except Exception as error:  # it does not take this form
                    refusals.setdefault(form, error)
            if not taken:
                return unrunnable(root, refusals)
            for module, mixin in finding.swaps:
                swap(parts[module], (mixin,))
            for form, _, run, expected in taken:
                if (why := difference(run, expected, tolerance)) is not None:
                    return f"takes {form}" if TOKENS in refusals else f"{why} on {form}"
    return None


@contextmanager
def rehearsal(device: torch.device) -> Iterator[Seed]:
    """Gradients on, autocast off, warnings unsaid; yields what seeds, and puts the generators back.

    Only those of the CPU and of `device`: torch.manual_seed would seed every GPU, started or not.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [g.get_state() for g in generators]

    def seed(number: int) -> None:
        for g in generators:
            g.manual_seed(number)

    try:
        with (
            torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings(), untimed(),
            torch.autocast(device.type, enabled=False),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            yield seed
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)


def twin_of(root: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy with random weights and no hooks, and which module in it is the copy of which."""
    memo: dict[int, Any] = {}
    for module in root.modules():
        for key, value in vars(module).items():
            if key.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor) and value.grad_fn is not None:  # of a weight norm with hooks
                memo[id(value)] = value.detach().clone()
    for p in root.parameters():
        if type(p) is not nn.Parameter:
            raise TypeError(f"its weights are {type(p).__name__}s")
        std = 0.5 if p.ndim < 2 else p[0].numel() ** -0.5
        memo[id(p)] = nn.Parameter((torch.randn(p.shape, device=p.device) * std).to(p.dtype))
    twin = copy.deepcopy(root, memo)
    return twin, {module: memo[id(module)] for module in root.modules()}


def outcome(
    module: nn.Module, buffers: list[tuple[Tensor, Tensor]], x: Tensor, others: dict[str, Any],
    training: bool, seed: Seed, whole: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Outputs, and gradients of their randomly weighted sum: of the input, and if `whole` of every weight."""
    module.train(training)
    with torch.no_grad():
        for buffer, value in buffers:  # BatchNorm's statistics move
            buffer.copy_(value)
    seed(1)
    leaf = x.clone().requires_grad_()
    out = module(leaf, **others)
    outs = [out] if isinstance(out, Tensor) else [o for o in out if isinstance(o, Tensor)]
    seed(2)
    total = torch.stack([(o.float() * torch.randn(o.shape, device=o.device)).sum() for o in outs]).sum()
    named = {"input": leaf} | (dict(module.named_parameters()) if whole else {})
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    found = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    return found | {f"gradient of {n}": g for n, g in zip(named, grads, strict=True) if g is not None}


def difference(
    run: Callable[[], dict[str, Tensor]], expected: dict[str, Tensor], tolerance: float
) -> str | None:
    """What the patched code does otherwise, if anything."""
    try:
        actual = run()
    except Exception as error:
        return f"the patched code does not run ({one_line(error)})"
    if actual.keys() != expected.keys():
        return "outputs or gradients are missing"
    norms = {name: rms(e) for name, e in expected.items()}
    for name, e in expected.items():
        a, kind = actual[name], name.partition(" ")[0]
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            return f"{kind}s are {a.dtype} {tuple(a.shape)}, not {e.dtype} {tuple(e.shape)}"
        # a key's bias has no gradient but rounding: what is small beside the others counts as they do
        scale = max(norms[name], 0.1 * max(norm for other, norm in norms.items() if other.startswith(kind)))
        allowed = tolerance if kind == "output" else 3 * tolerance
        if e.dtype in FLOATS and not rms(a.float() - e.float()) <= allowed * scale:
            return f"{kind}s differ"
    return None


def rms(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.float()).item() / max(1, x.numel()) ** 0.5


def unrunnable(root: nn.Module, refusals: dict[str, Exception]) -> str:
    parameters = list(inspect.signature(type(root).forward).parameters.values())[2:]
    wants = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if wants:
        return f"forward wants {', '.join(wants)}"
    return f"its own code does not run on {', '.join(refusals)}: {one_line(next(iter(refusals.values())))}"


def one_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__
