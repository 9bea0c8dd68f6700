"""How a live module is patched: its class is exchanged for a subclass that puts a mixin (or more) before it.

Nothing else of the instance changes: weights, hooks, buffers and the class itself stay, another instance
keeps its own forward, and going back is one assignment. The subclass bears the name of its base, so that what
knows modules by name (`_no_split_modules`, printed models) finds them, `isinstance` holds, and a base that
acts on its subclasses (gradient checkpointing of transformers) acts on it. A forward stored in the instance
would not do: a bound method is pickled by its name in the class, which is the old one, and it hides what the
base does around forward. FSDP2 and torch's parametrizations exchange classes likewise.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd import forward_ad

REVERT_FIRST = "{} a model that is patched: fastmim_kernels.revert(model) first"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


if TYPE_CHECKING:
    Whatever = Any  # a mixin reads the attributes of the class that it will stand before
else:
    Whatever = object


class Swapped(Whatever):
    """What every mixin shares: copies and pickles are patched as their original is."""

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        swapped = vars(type(self)).get("swapped_from")
        # a class made of ours since (FSDP2) pickles as it likes; one made by `type` has no name to pickle by
        return reduced if swapped is None else (_new, swapped, *reduced[2:])

    def __prepare_scriptable__(self):  # torch.jit.script asks for it before all else
        raise ValueError(REVERT_FIRST.format("torch.jit.script cannot read"))


@cache
def swapped_class(mixins: tuple[type, ...], base: type) -> type:
    """`base` with the mixins before it, made once for each pair."""
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (*mixins, base), names | {"swapped_from": (mixins, base)})


def _new(mixins: tuple[type, ...], base: Any) -> nn.Module:
    cls: Any = swapped_class(mixins, base)
    return cls.__new__(cls)


def swap(module: nn.Module, mixins: Iterable[type]) -> None:
    base: Any = type(module)
    module.__class__ = swapped_class(tuple(mixins), base)


def base_of(module: nn.Module) -> type:
    """The class that a patched module had. ValueError where it was exchanged again since."""
    if "swapped_from" not in vars(type(module)):
        name = type(module).__name__
        raise ValueError(f"{name}: its class was exchanged since apply (FSDP?): undo that first")
    return vars(type(module))["swapped_from"][1]


# --- recognition: by where a forward is defined, and what it takes -----------------------------------


@dataclass(frozen=True)
class Finding:
    """A place where an op fits, with the mixins that put it there; or why it is left alone."""

    where: str
    what: str
    op: str
    swaps: tuple[tuple[nn.Module, type], ...] = ()
    obstacle: str | None = None
    calls: Callable | None = None  # what it is to be tried with (trial.py): the first of swaps

    def left(self, why: str) -> "Finding":
        return replace(self, swaps=(), obstacle=why)


def home(module: nn.Module) -> type:
    """The class whose forward runs: a subclass that defines none is as good as its base."""
    return next(cls for cls in type(module).__mro__ if "forward" in vars(cls))


def arguments(module: nn.Module, method: str = "forward") -> tuple[str, ...]:
    """Names of what a method takes, `self` left out."""
    return tuple(inspect.signature(getattr(type(module), method)).parameters)[1:]


def is_a(module: object, package: str, *names: str) -> bool:
    """Whether the forward of `module` is that of a class of one of these names in `package`."""
    if not isinstance(module, nn.Module) or "forward" in vars(module):
        return False
    cls = home(module)
    return cls.__name__ in names and (cls.__module__ + ".").startswith(package + ".")


def hooked(*modules: object) -> bool:
    """Whether a user listens to one of them: its arguments or its value would not be what they were."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(m, kind) for m in modules if isinstance(m, nn.Module) for kind in kinds)


def strange_dtype(*modules: nn.Module) -> str | None:
    """Why the ops cannot take these weights."""
    dtypes = {p.dtype for m in modules for p in m.parameters()} - set(FLOATS)
    return f"weights of {', '.join(sorted(map(str, dtypes)))}; want fp32, bf16 or fp16" if dtypes else None


def demand_float(x: Tensor) -> None:
    """ValueError for what no op takes, such as a model that became fp64 since it was patched."""
    if x.dtype not in FLOATS:
        raise ValueError(f"want fp32, bf16 or fp16, got {x.dtype}: fastmim_kernels.revert(model) first")


def demand_plain(*given: object) -> None:
    """ValueError for what passes through no op: torch.fx, the transforms of torch.func, forward mode."""
    if torch.compiler.is_compiling():  # and exporting
        return
    if any(isinstance(x, torch.fx.Proxy) for x in given):
        raise ValueError(REVERT_FIRST.format("torch.fx cannot trace"))
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(REVERT_FIRST.format("torch.func (grad, vmap, vjp, jvp) cannot transform"))
    if forward_ad._current_level >= 0:
        raise ValueError(REVERT_FIRST.format("forward-mode differentiation cannot pass through"))
