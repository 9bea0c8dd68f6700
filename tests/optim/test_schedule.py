"""MAE's schedule, against its formula in fractional epochs."""

import math

import pytest

from fastmim.optim.schedule import learning_rate


def in_epochs(e: float, lr: float, w: float, E: float, low: float) -> float:
    if e < w:
        return lr * e / w
    return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * (e - w) / (E - w)))


@pytest.mark.parametrize(("warmup", "low"), [(20.0, 0.0), (0.0, 1e-5), (2.5, 0.0)])
def test_equals_the_formula_in_epochs(warmup, low):
    per_epoch, epochs, lr = 13, 100, 6e-4
    for step in range(0, epochs * per_epoch, 7):
        ours = learning_rate(
            step, peak=lr, warmup_steps=warmup * per_epoch, total_steps=epochs * per_epoch, min_lr=low
        )
        assert ours == pytest.approx(in_epochs(step / per_epoch, lr, warmup, epochs, low), rel=1e-12)


def test_warmup_may_start_above_zero():
    """CMAE's, as released: 1e-4 of the rate at the first step, linear, the cosine as ever."""
    options = {"peak": 2.0, "warmup_steps": 4, "total_steps": 10}
    rate = [learning_rate(s, **options, warmup_start=1e-4) for s in range(11)]
    assert rate[:5] == pytest.approx([2e-4, 0.50015, 1.0001, 1.50005, 2.0], rel=1e-12)
    assert rate[4:] == [learning_rate(s, **options) for s in range(4, 11)]


def test_ends():
    rate = [learning_rate(s, peak=1.0, warmup_steps=4, total_steps=10) for s in range(11)]
    assert rate[0] == 0.0
    assert rate[4] == 1.0
    assert rate[10] == pytest.approx(0.0, abs=1e-12)
    assert rate[4:] == sorted(rate[4:], reverse=True)
