"""FusedAdam of NVIDIA's apex. The package `apex` on PyPI is another thing, and is refused by name."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastmim.optim import OptimConfig

ADVICE = "build NVIDIA's with `pip install git+https://github.com/NVIDIA/apex`, or use --optim.name adamw"


def find_fused_adam() -> type[torch.optim.Optimizer]:
    """apex.optimizers.FusedAdam with its kernels. ImportError says which apex is missing and what to do."""
    try:
        import apex
    except ImportError as error:
        raise ImportError(
            f"optim.name apex: want NVIDIA's apex, got no package of that name; {ADVICE}"
        ) from error
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        where = getattr(apex, "__file__", None) or "an unknown place"
        raise ImportError(
            f"optim.name apex: want NVIDIA's apex, got another package of that name at {where}; {ADVICE}"
        ) from error
    try:
        import amp_C  # noqa: F401  # apex's compiled kernels
    except ImportError as error:
        raise ImportError(
            f"optim.name apex: NVIDIA's apex is installed without its CUDA kernels; {ADVICE}"
        ) from error
    return FusedAdam


def apex_adamw(groups: list[dict[str, Any]], config: "OptimConfig") -> torch.optim.Optimizer:
    """apex's FusedAdam with decoupled weight decay. Raises ImportError where it cannot be had."""
    fused_adam = find_fused_adam()
    return fused_adam(groups, lr=0.0, betas=config.betas, eps=config.eps, adam_w_mode=True)  # type: ignore[call-arg]
