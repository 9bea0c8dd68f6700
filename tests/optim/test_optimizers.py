"""The optimizers by name: AdamW against its formula, and a wrong apex refused by what it is."""

import sys
import types

import pytest
import torch

from fastmim.optim import OptimConfig, torch_adamw
from fastmim.optim.apex import find_fused_adam


def test_adamw_equals_its_formula():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, 3))
    config = OptimConfig(betas=(0.9, 0.95), eps=1e-8)
    optimizer = torch_adamw([{"params": [p], "weight_decay": 0.05}], config)
    x = p.detach().double().clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(1, 6):
        g = torch.randn(5, 3)
        p.grad = g
        optimizer.param_groups[0]["lr"] = 1e-2 * t
        optimizer.step()
        x -= 1e-2 * t * 0.05 * x
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.double() ** 2
        x -= 1e-2 * t * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach().double(), x, rtol=1e-5, atol=1e-6)


def test_learning_rate_scales_with_the_effective_batch():
    assert OptimConfig(blr=1.5e-4).peak_lr(1024) == pytest.approx(6e-4)
    assert OptimConfig(blr=1.5e-4, lr=1e-3).peak_lr(1024) == 1e-3


def test_no_apex_and_the_wrong_apex_are_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ImportError, match="want NVIDIA's apex, got no package of that name"):
        find_fused_adam()
    other = types.ModuleType("apex")  # PyPI's apex is a web toolkit
    other.__file__ = "/somewhere/apex/__init__.py"
    monkeypatch.setitem(sys.modules, "apex", other)
    with pytest.raises(ImportError, match="got another package of that name at /somewhere/apex"):
        find_fused_adam()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blr": -1.0}, "optim.blr: want 0 or more, and a number, got -1.0"),
        ({"betas": (0.9, 1.0)}, "optim.betas: want two numbers in"),
        ({"layer_decay": 0.0}, "optim.layer-decay: want a factor in"),
        ({"warmup_epochs": -3.0}, "optim.warmup-epochs: want 0 or more"),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)
