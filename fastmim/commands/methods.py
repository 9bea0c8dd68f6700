"""`fastmim methods`: what can be trained, in the words of one view of the field, and what it costs."""

import argparse
import signal
from collections.abc import Sequence

HEAD = ("--method", "paper", "T1 sees", "second branch", "M", "cost", "state")


def rows() -> list[tuple[str, ...]]:
    """A row of cells for each method.

    The cost is arithmetic per image of ViT-B/16 at 224 px, MAE's being 1, less that of a tokenizer.
    """
    from fastmim.methods import METHODS, suited
    from fastmim.models import VITS

    flops = {}
    for name in METHODS:
        config, model = suited(name, VITS["vit_base"])
        flops[name] = config.work(model).flops
    found: list[tuple[str, ...]] = []
    for name, kind in METHODS.items():
        a = kind.about
        state = "works" + (f"; wants {a.needs}" if a.needs else "")
        cost = f"{flops[name] / flops['mae']:.1f}"
        found.append((f"`{name}`", a.paper, a.t1, a.t2, a.similarity, cost, state))
    return found


def markdown(cells: Sequence[tuple[str, ...]]) -> str:
    """The table of the README."""
    head = (f"`{HEAD[0]}`", *HEAD[1:])
    lines = ["| " + " | ".join(row) + " |" for row in (head, *cells)]
    return "\n".join([lines[0], "|" + "---|" * len(HEAD), *lines[1:]])


def text(cells: Sequence[tuple[str, ...]]) -> str:
    """A paragraph for each method, which any width of a terminal holds."""
    lines = []
    for row in cells:
        name, paper, *rest = (cell.replace("`", "") for cell in row)
        lines.append(f"{name:<12}{paper}")
        lines += [f"{'':12}{what:<15}{cell}" for what, cell in zip(HEAD[2:], rest, strict=True)]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fastmim methods",
        description="What can be trained. Cost: arithmetic per image of ViT-B/16 at 224 px, MAE's being 1, "
        "less that of a tokenizer.",
    )
    parser.add_argument("--markdown", action="store_true", help="as the table of the README")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `fastmim methods | head` is no error
    print(markdown(rows()) if args.markdown else text(rows()))
