"""bias_gelu: the kernel against the fp64 definition, then the op against PyTorch's checks."""

import pytest
import torch
from fastmim_kernels import bias_gelu
from fastmim_kernels.bias_gelu import bias_gelu_reference, launch_backward, launch_forward
from fastmim_kernels.testing import assert_no_worse

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# M, D: MAE's visible tokens at ViT-B's hidden width; R-MAE's other view at ViT-Ti's, which fills half of its
# last tile; a whole image at an odd width; 601 rows are two tiles of a share of the backward, the last share
# not full; H's width; narrow rows share a program; one row
SHAPES = [(50, 3072), (148, 768), (197, 384), (601, 512), (3, 5120), (43, 48), (1, 1280)]


def make_inputs(M, D, dtype, device):
    rng = torch.Generator().manual_seed(0)
    x, dout, bias = (torch.randn(s, generator=rng) for s in [(M, D), (M, D), (D,)])
    x[0, :4] = torch.tensor([-30.0, 30.0, -6.0, 0.0])  # the flat ends, and where erf loses its digits
    return x.to(device, dtype), bias.to(device), dout.to(device, dtype)  # bias stays fp32 in a bf16 model


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("M", "D"), SHAPES)
def test_kernel_matches_definition(M, D, dtype, device):
    x, bias, dout = make_inputs(M, D, dtype, device)

    def forward_backward(cast):
        inputs = [v.to(cast).requires_grad_() for v in (x, bias)]
        out = bias_gelu_reference(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, dout.to(cast))

    oracle, naive = forward_backward(torch.float64), forward_backward(FP32)
    out = launch_forward(x, bias)
    dx, dbias = launch_backward(dout, x, bias, (True, True))
    assert (out.dtype, dx.dtype, dbias.dtype) == (dtype, dtype, FP32)
    # but for the first values, of which one is 30 and would loosen the rest
    assert_no_worse("out", out[:, 4:], oracle[0][:, 4:], naive[0][:, 4:].to(dtype))
    assert_no_worse("first", out[:, :4], oracle[0][:, :4], naive[0][:, :4].to(dtype))
    assert_no_worse("dx", dx, oracle[1], naive[1].to(dtype))
    assert_no_worse("dbias", dbias, oracle[2], naive[2])


@pytest.mark.parametrize("gelu", [bias_gelu, launch_forward])
def test_the_formula_in_plain_numbers(gelu, device):
    x, bias = torch.tensor([[0.0, 0.5, -2.0]], device=device), torch.tensor([0.0, 0.5, 1.0], device=device)
    expected = torch.tensor([[0.0, 0.8413447, -0.1586553]])  # Phi(1), -Phi(-1): the exact form, not tanh
    torch.testing.assert_close(gelu(x, bias).cpu(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_needed_is_computed(needs, device):
    x, bias, dout = make_inputs(43, 48, FP32, device)
    everything = launch_backward(dout, x, bias, (True, True))
    for some, grad, need in zip(launch_backward(dout, x, bias, needs), everything, needs, strict=True):
        assert torch.equal(some, grad) if need else not some.any()  # the same bits, or nothing
    inputs = [v.requires_grad_(need) for v, need in zip((x, bias), needs, strict=True)]
    bias_gelu(*inputs).backward(dout)
    for v, grad, need in zip(inputs, everything, needs, strict=True):
        if need:
            torch.testing.assert_close(v.grad, grad)
        else:
            assert v.grad is None


def test_strided_rows_more_dims_and_no_rows(device):
    x, bias, dout = make_inputs(8, 48, FP32, device)
    rows, expected = x[::2], bias_gelu_reference(x[::2], bias)
    torch.testing.assert_close(launch_forward(rows, bias), expected)
    torch.testing.assert_close(bias_gelu(rows, bias), expected)
    for a, b in zip(
        launch_backward(dout[1::2], rows, bias, (True, True)),
        launch_backward(dout[1::2].contiguous(), rows.contiguous(), bias, (True, True)),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(bias_gelu(x.view(2, 2, 2, 48), bias), bias_gelu(x, bias).view(2, 2, 2, 48))
    for shape in ((0, 48), (0, 5, 48), (3, 0, 48)):
        none, b = torch.empty(shape, device=device, requires_grad=True), bias.clone().requires_grad_()
        out = bias_gelu(none, b)
        assert out.shape == shape
        out.sum().backward()
        assert none.grad.shape == shape
        assert b.grad.shape == (48,) and not b.grad.any()
    assert launch_forward(x[:0], bias).shape == (0, 48)
    dx, dbias = launch_backward(dout[:0], x[:0], bias, (True, True))
    assert dx.shape == (0, 48)
    assert dbias.shape == (48,) and not dbias.any()


def test_op_is_registered_right(device):
    x, bias, dout = make_inputs(5, 48, FP32, device)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.fastmim.bias_gelu_backward.default, (dout, x, bias, *needs))
    leaves = x.requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(torch.ops.fastmim.bias_gelu.default, leaves)


@pytest.mark.parametrize("compiled", [False, True])
def test_public_op_matches_reference_and_compiles_to_one_graph(compiled, device):
    x, bias, _ = make_inputs(15, 48, FP32, device)
    x = x.view(3, 5, 48)
    step = torch.compile(bias_gelu, fullgraph=True) if compiled else bias_gelu
    results = []
    for gelu in (step, bias_gelu_reference):  # never the op against itself
        inputs = [v.clone().requires_grad_() for v in (x, bias)]
        loss = gelu(*inputs).square().mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(results[0], results[1])


def test_gradients_come_in_the_dtype_of_their_input(device):
    x, bias, dout = make_inputs(5, 48, BF16, device)
    for dtypes in ((BF16, FP32), (FP32, BF16), (FP16, BF16)):
        inputs = [v.to(d).requires_grad_() for v, d in zip((x, bias), dtypes, strict=True)]
        out = bias_gelu(*inputs)
        assert out.dtype == dtypes[0]
        grads = torch.autograd.grad(out, inputs, dout.to(dtypes[0]))
        assert tuple(g.dtype for g in grads) == dtypes


def test_rejects_what_it_cannot_do(device):
    x, bias, _ = make_inputs(4, 48, FP32, device)
    with pytest.raises(ValueError, match="want x"):
        bias_gelu(x, bias[:-1])
    with pytest.raises(ValueError, match="want x"):
        bias_gelu(x[0], bias)
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        bias_gelu(x.double(), bias)
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        bias_gelu(x, bias.double())
    with pytest.raises(ValueError, match="one device"):
        bias_gelu(x, bias.to("meta"))
    with pytest.raises(ValueError, match="contiguous"):
        bias_gelu(x.T.contiguous().T, bias)
    with pytest.raises(ValueError, match="contiguous"):
        bias_gelu(x.view(2, 2, 48)[:, :1], bias)
    with pytest.raises(ValueError, match="contiguous"):
        bias_gelu(x, torch.stack([bias, bias], 1)[:, 0])
