"""What every kernel test shares: how far a fused result may stray."""

import torch
from torch import Tensor


def assert_no_worse(name: str, actual: Tensor, oracle: Tensor, naive: Tensor, slack: float = 2.0) -> None:
    """`actual` may err from the fp64 `oracle` at most `slack` times as far as `naive` does.

    `naive` is the reference run without fp64, so the tolerance is measured and not chosen. One ulp
    of the oracle's largest value is added, for the cases where `naive` happens to be exact.
    """
    assert actual.shape == oracle.shape, f"{name}: {tuple(actual.shape)} is not {tuple(oracle.shape)}"
    assert actual.isfinite().all(), f"{name}: not finite"
    ulp = torch.finfo(actual.dtype).eps * oracle.abs().max()
    budget = slack * ((naive.double() - oracle).abs().max() + ulp)
    error = (actual.double() - oracle).abs().max()
    assert error <= budget, f"{name}: max error {error:.3e}, budget {budget:.3e}"
