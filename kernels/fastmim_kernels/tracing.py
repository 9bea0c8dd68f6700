"""What torch.compile is told about our functions, without the import of its tracer.

`torch.compiler.assume_constant_result` sets one attribute, and first imports torch._dynamo to do so: that
takes as long as all of torch, in every process that imports this package, most of which compile nothing.
"""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_in_graphs(fn: F) -> F:
    """torch.compile calls `fn` once while it traces, and what it returns is a constant of the graph.

    Of a function with a cache the tracer takes what is within, so that is marked as well.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    if (within := getattr(fn, "__wrapped__", None)) is not None:
        within._dynamo_marked_constant = True
    return fn
