"""C-MAE on two real ranks is C-MAE on one: the loss and the gradients of the same global batch."""

from pathlib import Path

import pytest
import torch

from tests.engine.forked import scenarios


@pytest.mark.slow
def test_two_ranks_of_gloo_are_one():
    found = scenarios(Path(__file__).with_name("cmae_ranks.py"))
    ((one,), (a, b)) = found["one"], found["two"]
    for name, (loss, grads) in one.items():
        assert (a[name][0] + b[name][0]) / 2 == pytest.approx(loss, rel=1e-5), name
        total = torch.tensor(a[name][1]) + torch.tensor(b[name][1])
        torch.testing.assert_close(total, torch.tensor(grads), rtol=1e-3, atol=2e-5, msg=name)
