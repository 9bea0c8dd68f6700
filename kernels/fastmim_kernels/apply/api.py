"""The fused ops inside a live ViT of another codebase, and out of it again.

    report = fastmim_kernels.apply(model)   # this instance alone; its weights and state dict stay
    print(report)                           # what was replaced, what was left, and why
    fastmim_kernels.revert(model)           # every class as it was

Families  timm.py, transformers.py, mae.py: what is recognized, and what each op replaces.
          parts.py: the MLP and the norm they share, and which dtypes come out. swap.py: how.
Limits    apply last: after LoRA, quantization and the like, before FSDP, DeepSpeed and torch.compile. A
          checkpoint of the state dict knows nothing of it; a pickled model needs fastmim_kernels to load.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fastmim_kernels.apply.mae import find_mae_layout
from fastmim_kernels.apply.parts import find_mlp
from fastmim_kernels.apply.swap import Finding, Swapped, base_of, home, swap
from fastmim_kernels.apply.timm import find_timm
from fastmim_kernels.apply.transformers import find_transformers
from fastmim_kernels.apply.trial import tried, weightless

LOOKED_FOR = (
    "blocks, MLPs and attention with the parts of timm's VisionTransformer; layers of transformers' ViT, "
    "Dinov2 and BEiT, all of its ViTMAE (5.23); classes laid out as facebookresearch/mae"
)
LIKELY = re.compile(r"(Block|Layer|Attention|Mlp|MLP|Intermediate)$")  # a person would expect an op there


@dataclass(frozen=True)
class Row:
    """Places that fared alike. `note` says why they were left; empty where the op was put in."""

    where: str  # "blocks.*.mlp"
    what: str  # its class
    count: int
    op: str
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What apply did; prints as a table."""

    model: str
    replaced: tuple[Row, ...]
    left: tuple[Row, ...]

    def __str__(self) -> str:
        head = "", "where", "class", "count", "op", "why not"
        rows = [("replaced", r.where, r.what, str(r.count), r.op, r.note) for r in self.replaced]
        rows += [("left", r.where, r.what, str(r.count), r.op, r.note) for r in self.left]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = (
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (head, *rows)
        )
        return "\n".join([self.model, *(line.rstrip() for line in lines)])


def apply(model: nn.Module) -> Report:
    """Puts the ops wherever they fit in this instance; returns what was replaced and what was left, and why.

    ValueError when there is nothing to patch, or when something in `model` is patched already.
    """
    patched = [name or type(model).__name__ for name, m in model.named_modules() if isinstance(m, Swapped)]
    if patched:
        raise ValueError(
            f"patched already: {patched[0]} and {len(patched) - 1} more; revert(model) comes first"
        )
    findings = list(_find(model))
    mixins: dict[nn.Module, list[type]] = {}
    for finding in findings:
        for module, mixin in finding.swaps:
            mixins.setdefault(module, []).append(mixin)
    cls = f"{type(model).__module__}.{type(model).__qualname__}"
    left = _rows(f for f in findings if f.obstacle is not None)
    if not mixins:
        why = "".join(f"; {row.where} ({row.what}): {row.note}" for row in left)
        raise ValueError(f"nothing to patch in {cls}. Looked for {LOOKED_FOR}{why}")
    for module, chosen in mixins.items():
        swap(module, dict.fromkeys(chosen))
    return Report(cls, _rows(f for f in findings if f.obstacle is None), left)


def revert(model: nn.Module) -> None:
    """Undoes apply: every module has the class it had. ValueError when nothing in `model` is patched."""
    bases = {module: base_of(module) for module in model.modules() if isinstance(module, Swapped)}
    if not bases:
        raise ValueError(
            f"nothing to revert in {type(model).__name__}: fastmim_kernels.apply patched none of it"
        )
    for module, base in bases.items():
        module.__class__ = base


def _find(model: nn.Module) -> Iterator[Finding]:
    parents = Counter(id(child) for module in model.modules() for child in module.children())
    known: dict = {}  # verdicts of the trials
    for name, module in model.named_modules():
        named = LIKELY.search(type(module).__name__) is not None
        finding = find_transformers(name, module) or find_timm(name, module)
        finding = finding or find_mlp(name, module, parents, named)
        if finding is not None:
            missing = weightless(module)
            yield tried(finding, known) if missing is None else finding.left(missing)
            continue
        yield from (layout := find_mae_layout(name, module))
        foreign = home(module).__module__.partition(".")[0] not in ("timm", "transformers")
        if not layout and not foreign and named:
            yield Finding(
                name, type(module).__name__, "", obstacle="its parts are not those of a layer that is known"
            )


def _rows(findings: Iterator[Finding]) -> tuple[Row, ...]:
    """Findings that differ in the numbers of their paths only are one row."""
    places = Counter(
        (re.sub(r"\d+", "*", f.where) or "(the model)", f.what, f.op, f.obstacle or "") for f in findings
    )
    return tuple(Row(where, what, count, op, note) for (where, what, op, note), count in places.items())
