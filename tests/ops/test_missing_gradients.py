"""What a backward gets for an output that nobody used: None, not a tensor that autograd filled with zeros."""

from collections.abc import Callable, Sequence

import pytest
import torch
from fastmim_kernels import (
    add_layer_norm,
    bias_gelu,
    gather_patches,
    gather_tokens,
    info_nce,
    norm_pix_loss,
    norm_pix_loss_image,
    restore_tokens,
)
from fastmim_kernels.attention.tile import attention_tile
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

INDEX = torch.tensor([[3, 0], [1, 2]])


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer_norm(x, residual, weight, bias, scale):
    return add_layer_norm(x, residual, weight, bias, scale=scale)


def plain_layer_norm(x, residual, weight, bias):
    """Of which one tensor is the gradient of both summands."""
    return add_layer_norm(x, residual, weight, bias)


def attention(q, k, v):
    return (attention_tile(q, k, v, (3, 2)),)


def gelu(x, bias):
    return (bias_gelu(x, bias),)


def patches(image):
    return (gather_patches(image, INDEX, 2, (0.5,), (0.2,)),)


def visible(tokens, pos, cls):
    return (gather_tokens(tokens, INDEX, pos, cls),)


def restored(tokens, mask_token, pos):
    return (restore_tokens(tokens, torch.tensor([[0, -1, 2], [-1, 1, 3]]), mask_token, pos),)


def contrast(q, k):
    return info_nce(q, k, temperature=0.2)[:1]


def rows_loss(pred, target):
    return (norm_pix_loss(pred, target, normalize=False),)


def image_loss(pred):
    image = randn(2, 4, 4, 1)
    return (norm_pix_loss_image(pred, image, INDEX, 2, (0.5,), (0.2,)),)


Op = Callable[..., Sequence[Tensor]]
TOKENS, WIDE = (2, 4, 16), (16,)
OPS: list[tuple[Op, list[tuple[int, ...]]]] = [
    (layer_norm, [TOKENS, TOKENS, WIDE, WIDE, WIDE]),
    (plain_layer_norm, [TOKENS, TOKENS, WIDE, WIDE]),
    (attention, [(1, 5, 2, 16)] * 3),
    (gelu, [TOKENS, WIDE]),
    (patches, [(2, 4, 4, 1)]),
    (visible, [TOKENS, (4, 16), WIDE]),
    (restored, [(4, 16), WIDE, (3, 16)]),
    (contrast, [(4, 3, 16), (4, 3, 16)]),
    (rows_loss, [(5, 16), (5, 16)]),
    (image_loss, [(2, 2, 4)]),
]
CASES = [
    pytest.param(op, shapes, missing, id=f"{op.__name__}-{missing}")
    for op, shapes in OPS
    for missing in range(2 if "layer_norm" in op.__name__ else 1)
]


class NoGradient(torch.autograd.Function):
    """The identity; its backward gives nothing, as that of a function does which did not need its input."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


class Fills(TorchDispatchMode):
    """Counts the tensors of zeros made inside it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name().startswith(("aten::zeros", "aten::new_zeros"))
        return func(*args, **(kwargs or {}))


def gradients(op: Op, shapes, total: Callable[[Sequence[Tensor]], Tensor]) -> list[Tensor]:
    """Of a total of the outputs in every input, zeros where there is none."""
    inputs = [randn(*shape).requires_grad_() for shape in shapes]
    grads = torch.autograd.grad(total(op(*inputs)), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


@pytest.mark.parametrize(("op", "shapes", "missing"), CASES)
def test_a_missing_gradient_is_one_of_zeros(op, shapes, missing):
    def weighted(outputs, weight_of_missing):
        weights = [randn(*out.shape) for out in outputs]
        weights[missing] = weight_of_missing(weights[missing])
        return sum((out * w).sum() for out, w in zip(outputs, weights, strict=True) if w is not None)

    with_zeros = gradients(op, shapes, lambda outputs: weighted(outputs, torch.zeros_like))
    if len(op(*(randn(*shape) for shape in shapes))) > 1:
        unused = gradients(op, shapes, lambda outputs: weighted(outputs, lambda _: None))
        assert all(map(torch.equal, unused, with_zeros))
        assert any(g.any() for g in unused)

    def blocked(outputs):
        return sum(
            (NoGradient.apply(out) if i == missing else out).mul(randn(*out.shape)).sum()
            for i, out in enumerate(outputs)
        )

    assert all(map(torch.equal, gradients(op, shapes, blocked), with_zeros))


@pytest.mark.parametrize(("op", "shapes"), OPS, ids=[op.__name__ for op, _ in OPS])
def test_all_gradients_missing_give_none(op, shapes):
    def blocked(outputs):
        return sum(NoGradient.apply(out).sum() for out in outputs)

    assert not any(g.any() for g in gradients(op, shapes, blocked))


def test_nothing_is_filled_for_outputs_that_autograd_alone_sees():
    """A layer norm saves the mean and the scale of its rows as outputs: 98 such fills in a step of ViT-B."""
    inputs = [randn(*shape).requires_grad_() for shape in OPS[0][1]]
    outputs = layer_norm(*inputs)
    with Fills() as fills:
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    assert fills.count == 0
