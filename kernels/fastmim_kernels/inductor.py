"""torch.compile before torch 2.13, of models with many custom ops in a row.

At the first call of each custom op Inductor makes a log line, read or not, of the op's inputs, each
printed with its own inputs, back to the beginning of the graph: exponential in depth where residuals
branch. On torch 2.11 MAE of twelve blocks, however narrow, was not compiled in 25 minutes, or ended in a
RecursionError; with this it compiles in the time that newer versions take. From torch 2.13 on the line is
made only where it is logged. Here its inputs are named.

Ends with torch 2.12, the last that needs it.
"""

from typing import Any

import torch


def needs_brief_log(torch_version: str = torch.__version__) -> bool:
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return (major, minor) < (2, 13)


def brief(target: Any, args: Any, kwargs: dict[str, Any]) -> str:
    """An op and the kinds of its inputs, none of which is asked for what lies behind it."""
    kinds = ", ".join(type(arg).__name__ for arg in (*args, *kwargs.values()))
    return f"  target: {target}\n  inputs: {kinds}"


def install() -> None:
    """For the process, where torch needs it: there Inductor is imported with this package."""
    if needs_brief_log():
        from torch._inductor.exc import OperatorIssue

        OperatorIssue.operator_str = staticmethod(brief)  # type: ignore[method-assign,assignment]
