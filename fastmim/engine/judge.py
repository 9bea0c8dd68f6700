"""Whether a run that had steps which were not finite may go on.

One bad batch costs a step, and is said; IN_A_ROW of them, or more than SHARE of the last WINDOW steps, end
the run; so do weights that are not finite, before they are saved. Every rank decides alike.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

IN_A_ROW = 3  # steps that are not finite and end the run
WINDOW, SHARE = 100, 0.1


class NonFinite(RuntimeError):
    """The loss or gradients of too many steps, or the weights, were not finite."""


def is_bad(row: Mapping[str, Any]) -> bool:
    """Whether the gradients or the loss of a step were not finite."""
    return bool(row["skipped"]) or not math.isfinite(row["loss"])


class Judge:
    """Whether a run that had steps which were not finite may go on; on every rank the same."""

    def __init__(self) -> None:
        self.recent: deque[bool] = deque(maxlen=WINDOW)

    def __call__(self, rows: Sequence[Mapping[str, Any]], left: Sequence[float]) -> None:
        """`NonFinite` after too many bad steps, and where weights, averages or buffers are not finite."""
        for row, size in zip(rows, left, strict=True):
            self.recent.append(is_bad(row))
            if not math.isfinite(size):
                raise NonFinite(f"weights are not finite at step {row['step']}, {after(row, rows)}")
            if len(self.recent) >= IN_A_ROW and all(list(self.recent)[-IN_A_ROW:]):
                what = "loss is" if not math.isfinite(row["loss"]) else "gradients are"
                raise NonFinite(
                    f"{what} not finite at step {row['step']}, the {IN_A_ROW}rd in a row, {after(row, rows)}"
                )
            if sum(self.recent) > SHARE * WINDOW:
                raise NonFinite(
                    f"gradients are not finite at step {row['step']}, nor in {sum(self.recent) - 1} of the "
                    f"{len(self.recent) - 1} before, {after(row, rows)}"
                )


def after(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What else is known of a step that ends the run, and what to try."""
    return (
        f"with a loss of {row['loss']:.4g} and a rate of {row['lr']:.3g} (seen at step {rows[-1]['step']}). "
        "No checkpoint was made of it: the last one is from before. nonfinite.jsonl names the samples. Try a "
        "lower --optim.blr, --optim.clip 1, or --precision fp32"
    )


def require_finite(state: Mapping[str, Tensor]) -> None:
    """NonFinite, with the names, for weights that are not to be published."""
    bad = [name for name, x in state.items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFinite(f"weights are not finite, nothing was exported: {', '.join(bad[:3])}{more}")


def strict(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as JSON has it, which knows neither NaN nor infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
