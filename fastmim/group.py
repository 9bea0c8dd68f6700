"""How the optimizer treats a parameter, as far as its method says so."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Group:
    """What a method says of a parameter; None, and each default, leaves it to the run."""

    decay: bool | None = None  # whether weight decay applies; None: MAE's 1-D rule
    lr_scale: float = 1.0  # factor of the learning rate, beside that of layer decay
    schedule: str | None = None  # another schedule of the learning rate
    clip: float | None = None  # largest norm of its gradient: of each such tensor alone
    frozen_epochs: int = 0  # epochs for which it has no gradient: neither decay nor moments
