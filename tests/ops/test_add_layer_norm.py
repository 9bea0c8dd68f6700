"""add_layer_norm: the kernel against the fp64 definition, then the op against PyTorch's checks."""

from importlib import import_module

import pytest
import torch
from fastmim_kernels import add_layer_norm
from fastmim_kernels.add_layer_norm import add_layer_norm_reference, launch_backward, launch_forward
from fastmim_kernels.testing import assert_no_worse

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ALL = (True,) * 5
# B, T, D: MAE's visible tokens with the class token, R-MAE's other view, a whole image; widths of ViT-Ti, S,
# the decoder, B and H, of which only 512 fills a block; 43 narrow tokens are no whole number of programs;
# one row; the widest
CASES = [
    (3, 50, 768),
    (2, 148, 192),
    (1, 197, 384),
    (4, 50, 512),
    (2, 5, 1280),
    (1, 43, 48),
    (1, 1, 768),
    (2, 2, 8192),
]


def make_inputs(B, T, D, dtype, device):
    """x, residual, weight, bias, scale, keep and the gradients of normed and sum."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(B, T, D)] * 4 + [(D,)] * 3
    x, residual, dnormed, dsum, weight, bias, scale = (torch.randn(s, generator=rng) for s in shapes)
    keep = torch.rand(B, generator=rng).lt(0.7).float() / 0.7
    keep[0] = 1 / 0.7
    rows = [v.to(device, dtype) for v in (x, 2 * residual + 0.5)]
    vectors = [v.to(device) for v in (weight, bias, scale)]  # parameters stay fp32 in a bf16 model
    return *rows, *vectors, keep.to(device), dnormed.to(device, dtype), dsum.to(device, dtype)


FORMS = [
    *((FP32, form) for form in ("plain", "scale", "keep", "scale and keep")),
    *((BF16, form) for form in ("plain", "scale and keep")),
    (FP16, "scale and keep"),
]
# of many rows, where they take seconds each in the interpreter
FEW = (
    FORMS
    if torch.cuda.is_available()
    else [(FP32, "scale and keep"), (BF16, "plain"), (FP16, "scale and keep")]
)


@pytest.mark.parametrize(
    ("case", "dtype", "form"),
    [
        pytest.param(
            case, *form, marks=pytest.mark.long if case[0] * case[1] > 50 and form not in FEW else ()
        )
        for case in CASES
        for form in FORMS
    ],
)
def test_kernel_matches_definition(case, dtype, form, device):
    x, residual, weight, bias, scale, keep, dnormed, dsum = make_inputs(*case, dtype, device)
    scale, keep = scale if "scale" in form else None, keep if "keep" in form else None

    def forward_backward(cast):
        inputs = [v if v is None else v.to(cast).requires_grad_() for v in (x, residual, weight, bias, scale)]
        outputs = add_layer_norm_reference(
            *inputs[:4], 1e-6, inputs[4], None if keep is None else keep.to(cast)
        )
        some = inputs if scale is not None else inputs[:4]
        grads = torch.autograd.grad(outputs, some, (dnormed.to(cast), dsum.to(cast)))
        return *(out.detach() for out in outputs), *grads

    oracle, naive = forward_backward(torch.float64), forward_backward(FP32)
    normed, total, mean, rstd = launch_forward(x, residual, weight, bias, scale, keep, 1e-6)
    needs = (*ALL[:4], scale is not None)
    rounded = oracle[1].to(dtype)  # to nearest, as on the device: the interpreter cuts bf16 off
    grads = launch_backward(dnormed, dsum, rounded, mean, rstd, weight, x, scale, keep, dtype, needs)
    names = ("normed", "sum", "dx", "dresidual", "dweight", "dbias", "dscale")
    dtypes = [dtype] * 4 + [FP32] * 3
    if dtype != FP32:
        naive = (*naive[:2], *rounded_backward(rounded, weight, x, scale, keep, dnormed, dsum))
    for name, out, cast, true, plain in zip(
        names, (normed, total, *grads), dtypes, oracle, naive, strict=False
    ):
        assert out.dtype == cast, name
        assert_no_worse(name, out, true, plain.to(cast))


def rounded_backward(total, weight, x, scale, keep, dnormed, dsum):
    """The gradients in weight's dtype from a sum that was rounded, as the unfused ops save it."""
    x, total, dnormed, dsum = (v.to(weight.dtype) for v in (x, total, dnormed, dsum))
    t, w = (v.detach().clone().requires_grad_() for v in (total, weight))
    b = torch.zeros_like(weight, requires_grad=True)
    normed = torch.nn.functional.layer_norm(t, t.shape[-1:], w, b, 1e-6)
    dtotal, dweight, dbias = torch.autograd.grad((normed, t), (t, w, b), (dnormed, dsum))
    kept = dtotal if keep is None else dtotal * keep[:, None, None]
    dx = kept if scale is None else kept * scale
    return dx, dtotal, dweight, dbias, *([] if scale is None else [(kept * x).sum((0, 1))])


def test_sums_of_many_rows(device, monkeypatch):
    """More than 1024 rows of more than half a block are two per program of the backward, the last alone."""
    tokens = 347
    if device == "cpu":  # 1024 programs take ten seconds in the interpreter
        monkeypatch.setattr(import_module("fastmim_kernels.add_layer_norm"), "SHARES", 64)
        tokens = 25
    x, residual, weight, bias, scale, keep, dnormed, dsum = make_inputs(3, tokens, 520, FP32, device)
    total = add_layer_norm_reference(x, residual, weight, bias, 1e-6, scale, keep)[1]
    var, mean = torch.var_mean(total, -1, correction=0)
    saved = total, mean.flatten(), (var + 1e-6).rsqrt().flatten(), weight, x, scale, keep
    grads = launch_backward(dnormed, dsum, *saved, FP32, ALL)
    expected = rounded_backward(*(v.double() for v in (total, weight, x, scale, keep, dnormed, dsum)))
    naive = rounded_backward(total, weight, x, scale, keep, dnormed, dsum)
    for name, grad, true, plain in zip(
        ["x", "residual", "weight", "bias", "scale"], grads, expected, naive, strict=True
    ):
        assert_no_worse(name, grad, true, plain)


def test_the_formula_in_plain_numbers():
    x, residual = torch.tensor([[2.0, 4.0, 6.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    weight, bias = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.0, 5.0, 0.0])
    scale, keep = torch.tensor([0.5, 0.25, 0.5]), torch.tensor([2.0])
    normed, total = add_layer_norm(x, residual, weight, bias, eps=6.0, scale=scale, keep=keep)
    assert total.tolist() == [[3.0, 3.0, 7.0]]  # mean 13/3, variance 32/9 divided by D, 86/9 with eps
    rstd = (9 / 86) ** 0.5
    expected = torch.tensor([[-4 / 3 * rstd, -4 / 3 * rstd + 5, 16 / 3 * rstd]])
    torch.testing.assert_close(normed, expected)
    plain = add_layer_norm(x, residual, torch.ones(3), torch.zeros(3))
    torch.testing.assert_close(plain, (torch.tensor([[-1.5, 0.0, 1.5]]) / 1.5**0.5, x + 1))


def test_rows_of_equal_values_stay_finite(device):
    """Variance 0: only eps holds rstd."""
    x, residual, weight, bias, scale, keep, dnormed, dsum = make_inputs(2, 3, 192, FP32, device)
    x, residual = torch.zeros_like(x), torch.full_like(residual, 0.5)
    normed, total, mean, rstd = launch_forward(x, residual, weight, bias, scale, keep, 1e-6)
    torch.testing.assert_close(normed, bias.expand(2, 3, 192))
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e3))
    _, dresidual, *_ = launch_backward(dnormed, dsum, total, mean, rstd, weight, x, scale, keep, FP32, ALL)
    g = dnormed * weight
    torch.testing.assert_close(dresidual, dsum + 1e3 * (g - g.mean(-1, keepdim=True)), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("needs", [(1, 1, 0, 0, 0), (0, 1, 1, 1, 0), (1, 0, 0, 1, 0), (0, 0, 0, 0, 1)])
def test_only_what_is_needed_is_computed(needs, device):
    x, residual, *vectors, keep, dnormed, dsum = make_inputs(3, 50, 48, FP32, device)
    needs = tuple(map(bool, needs))
    weight, bias, scale = vectors
    _, *saved = launch_forward(x, residual, weight, bias, scale, keep, 1e-6)
    rest = weight, x, scale, keep, FP32
    everything = launch_backward(dnormed, dsum, *saved, *rest, ALL)
    for some, grad, need in zip(
        launch_backward(dnormed, dsum, *saved, *rest, needs), everything, needs, strict=True
    ):
        assert torch.equal(some, grad) if need else not some.any()  # the same bits, or nothing
    inputs = x, residual, *vectors
    for v, need in zip(inputs, needs, strict=True):
        v.requires_grad_(need)
    torch.autograd.backward(add_layer_norm(*inputs[:4], scale=scale, keep=keep), (dnormed, dsum))
    for v, grad, need in zip(inputs, everything, needs, strict=True):
        if need:
            torch.testing.assert_close(v.grad, grad)
        else:
            assert v.grad is None


@pytest.mark.parametrize("learns", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32)])
def test_without_scale_and_keep_both_rows_get_the_same_gradient(dtypes, learns, device):
    x, residual, weight, bias, _, _, _, dsum = make_inputs(2, 3, 48, FP32, device)
    inputs = [v.to(d).requires_grad_(n) for v, d, n in zip((x, residual), dtypes, learns, strict=True)]
    normed, total = add_layer_norm(*inputs, weight, bias)
    assert (normed.dtype, total.dtype) == dtypes
    (normed.square().sum() + (total * dsum).sum()).backward()
    leaves = [v.detach().float().requires_grad_() for v in inputs]
    normed, total = add_layer_norm_reference(*leaves, weight, bias)
    (normed.square().sum() + (total * dsum).sum()).backward()
    for v, leaf, need in zip(inputs, leaves, learns, strict=True):
        if need:
            assert v.grad.dtype == v.dtype
            tolerance = {"rtol": 2e-2, "atol": 5e-2} if BF16 in dtypes else {}
            torch.testing.assert_close(v.grad.float(), leaf.grad, **tolerance)
        else:
            assert v.grad is None


def test_one_output_may_be_left_unused(device):
    x, residual, weight, bias, scale, keep, dnormed, _ = make_inputs(2, 3, 48, FP32, device)
    for which in (0, 1):
        grads = []
        for add in (add_layer_norm, add_layer_norm_reference):
            leaf = x.clone().requires_grad_()
            out = add(leaf, residual, weight, bias, scale=scale, keep=keep) if add is add_layer_norm else add(
                leaf, residual, weight, bias, 1e-6, scale, keep
            )  # fmt: skip
            grads.append(torch.autograd.grad(out[which], leaf, dnormed)[0])
        torch.testing.assert_close(*grads)


def test_a_dropped_sample_keeps_its_residual_and_teaches_no_branch(device):
    x, residual, weight, bias, scale, _, dnormed, dsum = make_inputs(3, 5, 48, BF16, device)
    keep = torch.tensor([2.0, 0.0, 2.0], device=device)
    _, total, mean, rstd = launch_forward(x, residual, weight, bias, scale, keep, 1e-6)
    assert torch.equal(total[1], residual[1])
    saved = total, mean, rstd, weight, x, scale, keep
    dx, dresidual, *_ = launch_backward(dnormed, dsum, *saved, BF16, ALL)
    assert not dx[1].any()
    assert dx[0].any() and dx[2].any() and dresidual[1].any()


def test_strides_do_not_matter(device, monkeypatch):
    x, residual, weight, bias, scale, keep, *_ = make_inputs(4, 9, 48, FP32, device)
    apart = torch.cat([x, x], 1)[:, :9], residual.transpose(0, 1).contiguous().transpose(0, 1)
    assert not apart[0].is_contiguous() and not apart[1].is_contiguous()
    expected = launch_forward(x, residual, weight, bias, scale, keep, 1e-6)
    spread = torch.stack([keep, keep], 1)[:, 0]
    for a, b in zip(launch_forward(*apart, weight, bias, scale, keep, 1e-6), expected, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(add_layer_norm(*apart, weight, bias, scale=scale, keep=spread), expected[:2])
    monkeypatch.setattr(import_module("fastmim_kernels.add_layer_norm"), "_op", launch_forward)  # as on CUDA
    for a, b in zip(add_layer_norm(*apart, weight, bias, scale=scale, keep=spread), expected, strict=False):
        assert torch.equal(a, b)
    saved = *expected[1:], weight
    one = torch.ones((), device=device).expand(4, 9, 48)  # what sum() sends back
    for a, b in zip(
        launch_backward(one, one, *saved, apart[0], scale, keep, FP32, ALL),
        launch_backward(one.contiguous(), one.contiguous(), *saved, x, scale, keep, FP32, ALL),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_rows_of_two_dims_and_no_rows(device):
    x, residual, weight, bias, scale, keep, dnormed, dsum = make_inputs(7, 1, 192, FP32, device)
    flat = [v[:, 0] for v in (x, residual)]
    options = {"scale": scale, "keep": keep}
    for a, b in zip(
        add_layer_norm(*flat, weight, bias, **options),
        add_layer_norm(x, residual, weight, bias, **options),
        strict=True,
    ):
        assert torch.equal(a, b[:, 0])
    for shape in ((0, 5, 192), (3, 0, 192), (0, 192)):
        none = torch.empty(shape, device=device, requires_grad=True)
        w = weight.clone().requires_grad_()
        out = add_layer_norm(none, none, w, bias, scale=scale, keep=keep.new_ones(shape[0]))
        assert [v.shape for v in out] == [shape, shape]
        (out[0].sum() + out[1].sum()).backward()
        assert none.grad.shape == shape
        assert w.grad.shape == (192,) and not w.grad.any()
    launched = launch_forward(x[:0], residual[:0], weight, bias, scale, keep[:0], 1e-6)
    assert [v.shape for v in launched] == [(0, 1, 192), (0, 1, 192), (0,), (0,)]
    saved = *launched[1:], weight, x[:0], scale, keep[:0]
    grads = launch_backward(dnormed[:0], dsum[:0], *saved, FP32, ALL)
    assert [v.shape for v in grads] == [(0, 1, 192), (0, 1, 192), (192,), (192,), (192,)]
    assert not any(v.any() for v in grads)


def test_op_is_registered_right(device):
    x, residual, *vectors, keep, dnormed, dsum = make_inputs(3, 5, 48, FP32, device)
    weight, bias, scale = (v.requires_grad_() for v in vectors)
    op, op_backward = (
        torch.ops.fastmim.add_layer_norm.default,
        torch.ops.fastmim.add_layer_norm_backward.default,
    )
    rows = x.requires_grad_(), residual.requires_grad_(), weight, bias
    torch.library.opcheck(op, (*rows, scale, keep, 1e-6))
    torch.library.opcheck(op, (*rows, None, None, 1e-6))
    with torch.no_grad():
        _, *saved = op(*rows, scale, keep, 1e-6)
    saved = [v.detach() for v in (*saved, weight, x, scale)]
    for needs in (ALL, (True, False, False, True, False), (False, True, True, False, False)):
        torch.library.opcheck(op_backward, (dnormed, dsum, *saved, keep, BF16, *needs))
    torch.library.opcheck(op_backward, (dnormed, dsum, *saved[:4], None, None, None, FP32, *ALL[:4], False))


@pytest.mark.parametrize(
    ("compiled", "form"),
    [(False, "plain"), (False, "scale"), (False, "keep"), (True, "plain"), (True, "scale and keep")],
)
def test_public_op_matches_reference_and_compiles_to_one_graph(compiled, form, device):
    x, residual, weight, bias, scale, keep, _, dsum = make_inputs(3, 5, 48, FP32, device)
    options = {k: v for k, v in {"scale": scale, "keep": keep}.items() if k in form}

    def fused(x, residual, weight, bias, scale=None, keep=None):
        return add_layer_norm(x, residual, weight, bias, scale=scale, keep=keep)

    def reference(x, residual, weight, bias, scale=None, keep=None):
        return add_layer_norm_reference(x, residual, weight, bias, 1e-6, scale, keep)

    step = torch.compile(fused, fullgraph=True) if compiled else fused
    results = []
    for add in (step, reference):  # never the op against itself
        leaves = {k: v.clone().requires_grad_(k != "keep") for k, v in options.items()}
        inputs = [v.clone().requires_grad_() for v in (x, residual, weight, bias)]
        normed, total = add(*inputs, **leaves)
        loss = normed.square().mean() + (normed * total).mean() + (total * dsum).mean()
        learn = inputs + [v for k, v in leaves.items() if k != "keep"]
        results.append((loss.detach(), *torch.autograd.grad(loss, learn)))
    torch.testing.assert_close(results[0], results[1])


def test_compiled_where_the_sum_is_unused(device):
    """As after the last block: the backward gets no gradient of it, and none is put in its place by hand."""
    inputs = [v.requires_grad_() for v in make_inputs(3, 5, 48, FP32, device)[:4]]
    normed = torch.compile(lambda *inputs: add_layer_norm(*inputs)[0], fullgraph=True)
    reference = add_layer_norm_reference(*inputs, 1e-6, None, None)[0]
    results = [torch.autograd.grad(out.square().mean(), inputs) for out in (normed(*inputs), reference)]
    torch.testing.assert_close(*results)


def test_gradients_come_in_the_dtype_of_their_input(device):
    x, residual, weight, bias, scale, keep, dnormed, _ = make_inputs(3, 5, 48, BF16, device)
    dtypes = [BF16, FP32, FP16, FP32, BF16]
    inputs = [
        v.to(d).requires_grad_() for v, d in zip((x, residual, weight, bias, scale), dtypes, strict=True)
    ]
    normed, total = add_layer_norm(*inputs[:4], scale=inputs[4], keep=keep)
    assert (normed.dtype, total.dtype) == (BF16, FP32)
    grads = torch.autograd.grad((normed, total), inputs, (dnormed, dnormed.float()))
    assert [g.dtype for g in grads] == dtypes


def test_rejects_what_it_cannot_do(device):
    x, residual, weight, bias, scale, keep, *_ = make_inputs(3, 5, 48, FP32, device)
    vectors = weight, bias
    with pytest.raises(ValueError, match="want two"):
        add_layer_norm(x, residual[:, :4], *vectors)
    with pytest.raises(ValueError, match="want two"):
        add_layer_norm(x[None], residual[None], *vectors)
    with pytest.raises(ValueError, match="want 1 <= D <= 8192"):
        add_layer_norm(*[v.new_zeros(1, 8193) for v in (x, x, x[0, 0], x[0, 0])])
    with pytest.raises(ValueError, match="want weight, bias and scale"):
        add_layer_norm(x, residual, weight, bias[:-1])
    with pytest.raises(ValueError, match="want weight, bias and scale"):
        add_layer_norm(x, residual, *vectors, scale=scale[None])
    with pytest.raises(ValueError, match="want fp32"):
        add_layer_norm(x.double(), residual, *vectors)
    with pytest.raises(ValueError, match="want fp32"):
        add_layer_norm(x, residual, *vectors, scale=scale.double())
    with pytest.raises(ValueError, match="contiguous"):
        add_layer_norm(x.mT.contiguous().mT, residual, *vectors)
    with pytest.raises(ValueError, match="contiguous"):
        add_layer_norm(x, residual, *vectors, scale=torch.stack([scale, scale], 1)[:, 0])
    with pytest.raises(ValueError, match="want keep"):
        add_layer_norm(x, residual, *vectors, keep=keep[:2])
    with pytest.raises(ValueError, match="want keep"):
        add_layer_norm(x, residual, *vectors, keep=keep.bool())
    with pytest.raises(ValueError, match="keep gets no gradient"):
        add_layer_norm(x, residual, *vectors, keep=keep.requires_grad_())
    with pytest.raises(ValueError, match="one device"):
        add_layer_norm(x, residual.to("meta"), *vectors)
