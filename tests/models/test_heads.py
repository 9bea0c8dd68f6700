"""Heads: layers, widths, initialization; batch norm against torch's in fp64, on one rank and on two."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fastmim.models.block import LinearGELU
from fastmim.models.heads import BatchNorm, Head
from tests.engine.forked import scenarios

from .heads_ranks import CHANNELS, ROWS, tensors


def kinds(head: Head) -> list[type]:
    return [type(module) for module in head]


def test_layers_of_each_kind():
    assert kinds(Head((4, 8, 3))) == [LinearGELU, nn.Linear]
    assert kinds(Head((4, 8, 3), activation="relu")) == [nn.Linear, nn.ReLU, nn.Linear]
    huang = Head((4, 8, 3), activation="relu", norm="bn", last_bias=False, init="torch")
    assert kinds(huang) == [nn.Linear, BatchNorm, nn.ReLU, nn.Linear]
    assert huang[0].bias is not None and huang[3].bias is None and huang[1].eps == 1e-6
    assert kinds(Head((4, 8, 8, 3), norm="ln")) == [nn.Linear, nn.LayerNorm, nn.GELU] * 2 + [nn.Linear]
    assert kinds(Head((4, 3))) == [nn.Linear]


@pytest.mark.parametrize("widths", [(4,), (), (4, 0, 3)])
def test_bad_widths_are_refused(widths):
    with pytest.raises(ValueError, match="want two or more widths of at least 1, got"):
        Head(widths)


def test_two_initializations():
    torch.manual_seed(0)
    mae = Head((64, 128, 32))
    bound = (6 / (64 + 128)) ** 0.5
    assert 0.99 * bound < mae[0].weight.abs().max() <= bound
    assert not mae[0].bias.any() and not mae[1].bias.any()
    torch.manual_seed(0)
    default = Head((64, 128, 32), activation="relu", init="torch")
    assert 0.9 / 8 < default[0].weight.abs().max() <= 1 / 8 and default[0].bias.any()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm", ["none", "ln", "bn"])
def test_a_head_equals_its_formula(activation, norm):
    torch.manual_seed(0)
    head = Head((6, 10, 4), activation=activation, norm=norm, init="torch")
    x = torch.randn(3, 5, 6)
    first, last = head[0], head[-1]
    h = x.double() @ first.weight.double().T + first.bias.double()
    if norm != "none":
        dims = (-1,) if norm == "ln" else (0, 1)
        h = (h - h.mean(dims, keepdim=True)) / (h.var(dims, correction=0, keepdim=True) + 1e-6).sqrt()
    h = h.clamp(min=0) if activation == "relu" else 0.5 * h * (1 + torch.erf(h / 2**0.5))
    expected = h @ last.weight.double().T + last.bias.double()
    torch.testing.assert_close(head(x).double(), expected, rtol=1e-5, atol=1e-5)


# --- batch norm -----------------------------------------------------------------------------------------


def expected_in_fp64() -> list[torch.Tensor]:
    """Output, gradients of x, weight and bias, and running averages: torch's, on the whole batch."""
    x, dy, weight, bias = (t.double() for t in tensors())
    norm = nn.BatchNorm1d(CHANNELS, eps=1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    x.requires_grad_()
    y = norm(x)
    (y * dy).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_batch_norm_of_one_rank_is_torchs():
    x, dy, weight, bias = tensors()
    norm = BatchNorm(CHANNELS)
    norm.load_state_dict({**norm.state_dict(), "weight": weight, "bias": bias})
    x.requires_grad_()
    y = norm(x)
    (y * dy).sum().backward()
    assert_equal(
        [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var],
        expected_in_fp64(),
    )


@pytest.mark.slow
def test_batch_norm_of_two_ranks_is_that_of_the_whole_batch():
    a, b = scenarios(Path(__file__).with_name("heads_ranks.py"))["batch_norm"]
    y, dx, dweight, dbias, mean, var = zip(map(torch.tensor, a), map(torch.tensor, b), strict=True)
    assert_equal([torch.cat(y), torch.cat(dx), sum(dweight), sum(dbias), mean[0], var[0]], expected_in_fp64())
    assert torch.equal(*mean) and torch.equal(*var)


def test_gradients_of_batch_norm_are_those_of_its_formula():
    x = torch.randn(5, 3, dtype=torch.float64)
    weight = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    norm = BatchNorm(3)
    with torch.no_grad():
        norm.weight.copy_(weight)

    def loss(rows, formula):
        if formula:
            unit = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-6).sqrt() * weight
        else:
            unit = norm(rows.float()).double()
        return unit.pow(3).sum()

    grads = []
    for formula in (False, True):
        rows = x.clone().requires_grad_()
        loss(rows, formula).backward()
        grads.append(rows.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_evaluation_takes_the_running_averages_and_leaves_them():
    norm = BatchNorm(CHANNELS)
    x = tensors()[0]
    norm(x)
    before = norm.running_mean.clone()
    norm.eval()
    expected = (x - norm.running_mean) / (norm.running_var + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x[:1]), expected[:1])
    assert torch.equal(norm.running_mean, before)


def test_in_bf16_statistics_are_fp32():
    norm = BatchNorm(CHANNELS).bfloat16()
    assert norm.weight.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    x = tensors()[0].bfloat16().requires_grad_()
    y = norm(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == norm.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach().float().mean(0))
    expected = nn.functional.batch_norm(x.detach().double(), None, None, training=True, eps=1e-6)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


def test_one_row_has_no_variance():
    with pytest.raises(ValueError, match="want at least two rows to take a variance of, got one"):
        BatchNorm(3)(torch.ones(1, 3))
    assert ROWS % 2 == 0
