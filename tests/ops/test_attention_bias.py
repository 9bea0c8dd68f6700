"""Attention with a bias of the logits, and with keys of another length: every back end against fp64."""

import sys

import pytest
import torch
from fastmim_kernels.attention import attention, attention_reference, memory_efficient
from fastmim_kernels.attention.api import GENERAL, obstacles_of_general
from fastmim_kernels.attention.tile_bias import attention_tile_bias, cpu_backward, cpu_forward
from fastmim_kernels.attention.tile_triton import launch_backward, launch_backward_bias, launch_forward
from fastmim_kernels.attention.timing import Call, measure
from fastmim_kernels.testing import assert_no_worse

from .test_attention_tile import interpreter_multiplies_bf16  # noqa: F401  a fixture for all tests here

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("out", "dq", "dk", "dv", "dbias")
# one token, whose softmax the bias cannot move; a tile of 16 and one token more; a whole tile of 64, and one
# more; BEiT at 224 px; two segments, the second without a bias; equals, which share a launch without one
CASES = [
    ((1,), 16), ((17,), 32), ((64,), 16), ((65,), 24), ((197,), 64), ((50, 20), 16), ((5, 5, 5), 16),
]  # fmt: skip


def make_inputs(segments, d, dtype, device, *, batch=2, heads=2, keys=None, none_at=1):
    """q, k, v as views of one tensor, biases that are no contiguous tensors, and the output's gradient."""
    rng = torch.Generator().manual_seed(0)
    T, S = sum(segments), sum(keys or segments)
    q = torch.randn(batch, T, 3, heads, d, generator=rng)[:, :, 0]
    k, v = torch.randn(batch, S, 3, heads, d, generator=rng)[:, :, :2].unbind(2)
    biases = [
        None if i == none_at else torch.randn(n, m, heads, generator=rng).permute(2, 0, 1).to(device, dtype)
        for i, (n, m) in enumerate(zip(segments, keys or segments, strict=True))
    ]
    dout = torch.randn(batch, T, heads, d, generator=rng)
    return [x.to(device, dtype) for x in (q, k, v)], biases, dout.to(device, dtype)


def results(attend, qkv, biases, dout, cast=None):
    """The output and the gradients of q, k, v and of all biases in one."""
    leaves = [x.detach().to(cast or x.dtype).requires_grad_() for x in qkv]
    masks = [None if b is None else b.detach().to(cast or b.dtype).requires_grad_() for b in biases]
    out = attend(*leaves, tuple(masks))
    given = [b for b in masks if b is not None]
    grads = torch.autograd.grad(out, [*leaves, *given], dout.to(out.dtype))
    return out.detach(), *grads[:3], torch.cat([g.flatten() for g in grads[3:]])


def compare(actual, segments, qkv, biases, dout, keys=None, slack=2.0):
    def defined(q, k, v, masks):
        return attention_reference(q, k, v, segments, keys, masks)

    oracle = results(defined, qkv, biases, dout, torch.float64)
    naive = results(defined, qkv, biases, dout, FP32)
    for name, a, o, n in zip(NAMES, actual, oracle, naive, strict=True):
        if o.abs().max() > 1e-12:
            assert_no_worse(name, a, o, n.to(qkv[0].dtype), slack)
        else:  # one token has but one softmax
            assert a.abs().max() < 1e-5, name


def triton_form(q, k, v, dout, segments, biases):
    contiguous = [None if b is None else b.contiguous() for b in biases]
    out, lse = launch_forward(q, k, v, segments, contiguous)
    grads = launch_backward(dout, q, k, v, out, lse, segments, (True, True, True), contiguous)
    dbiases = launch_backward_bias(dout, q, k, v, out, lse, segments, contiguous)
    return out, *grads, torch.cat([g.flatten() for g in dbiases if g is not None])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("segments", "d"), CASES, ids=str)
def test_tile_kernels_match_the_definition(segments, d, dtype, device):
    if device == "cuda" and dtype == FP32:
        pytest.skip("no fp32 on CUDA")
    if device == "cpu" and dtype == BF16 and sum(segments) > 100:
        pytest.skip("minutes in the interpreter")
    qkv, biases, dout = make_inputs(segments, d, dtype, device)
    slack = 3.0 if dtype == FP32 else 2.0
    compare(triton_form(*qkv, dout, segments, biases), segments, qkv, biases, dout, slack=slack)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("segments", "d"), CASES, ids=str)
def test_the_cpu_form_matches_the_definition(segments, d, dtype):
    qkv, biases, dout = make_inputs(segments, d, dtype, "cpu")
    out, lse = cpu_forward(*qkv, segments, biases)
    dq, dk, dv, dbiases = cpu_backward(dout, *qkv, lse, segments, biases)
    dbias = torch.cat([g.flatten() for g in dbiases if g is not None])
    compare((out, dq, dk, dv, dbias), segments, qkv, biases, dout, slack=3.0)


@pytest.mark.parametrize("backend", ["sdpa", "tile"])
@pytest.mark.parametrize(("segments", "d"), CASES, ids=str)
def test_back_ends_match_the_definition(segments, d, backend, device):
    dtype = FP32 if device == "cpu" else BF16
    qkv, biases, dout = make_inputs(segments, d, dtype, device)

    def attend(q, k, v, masks):
        serve = attention_tile_bias if backend == "tile" else GENERAL[backend]
        return serve(q, k, v, segments, segments, masks)

    compare(results(attend, qkv, biases, dout), segments, qkv, biases, dout, slack=3.0)


# CAE's regressor, 98 queries to 98 visible patches and themselves; one query; segments of several lengths
@pytest.mark.parametrize(
    ("segments", "keys"), [((98,), (196,)), ((1,), (5,)), ((3, 20), (50, 1)), ((9,), (4,))], ids=str
)
@pytest.mark.parametrize("biased", [False, True])
def test_keys_of_another_length(segments, keys, biased, device):
    qkv, biases, dout = make_inputs(segments, 16, FP32, device, keys=keys)
    if not biased:
        leaves = [x.detach().double().requires_grad_() for x in qkv]
        expected = attention_reference(*leaves, segments, keys)
        actual = attention(*qkv, segments=segments, key_segments=keys)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
        return

    def attend(q, k, v, masks):
        return attention(q, k, v, segments=segments, key_segments=keys, bias=masks)

    compare(
        results(attend, qkv, biases, dout),
        segments,
        qkv,
        biases,
        dout,
        keys,
        slack=16.0 if qkv[0].is_cuda else 6.0,
    )


def test_a_bias_that_several_calls_share_gets_the_sum_of_their_gradients(device):
    (q, k, v), (bias,), _ = make_inputs((17,), 16, FP32, device)
    bias = bias.requires_grad_()
    x = attention(q, k, v, bias=bias)
    (attention(q + x, k, v, bias=bias).sum() + x.square().sum()).backward()
    total, bias.grad = bias.grad.clone(), None
    first, second = (bias.detach().clone().requires_grad_() for _ in range(2))
    x = attention(q, k, v, bias=first)
    (attention(q + x, k, v, bias=second).sum() + x.square().sum()).backward()
    torch.testing.assert_close(total, first.grad + second.grad)


def test_a_bias_of_zero_is_none_and_one_of_minus_infinity_hides(device):
    (q, k, v), (bias,), _ = make_inputs((17,), 16, FP32, device)
    plain = attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v, bias=torch.zeros_like(bias)), plain)
    hidden = torch.zeros_like(bias)
    hidden[:, :, 9:] = -torch.inf
    torch.testing.assert_close(
        attention(q, k, v, bias=hidden)[:, :9], attention(*(x[:, :9] for x in (q, k, v)))
    )


def test_the_tile_op_passes_opcheck_and_compiles_in_one_graph(device):
    from fastmim_kernels.attention.tile_bias import _op

    dtype = FP32 if device == "cpu" else BF16
    (q, k, v), biases, _ = make_inputs((5, 3), 16, dtype, device, none_at=0)
    flat = biases[1].contiguous().flatten()
    leaves = [x.detach().requires_grad_() for x in (q, k, v, flat)]
    torch.library.opcheck(_op, (*leaves, (5, 3), (-1, 0)))
    compiled = torch.compile(
        lambda *x: attention_tile_bias(*x[:3], (5, 3), (5, 3), (None, x[3])), fullgraph=True
    )
    torch.testing.assert_close(
        compiled(q, k, v, biases[1]), attention_tile_bias(q, k, v, (5, 3), (5, 3), (None, biases[1]))
    )


def test_xformers_gets_aligned_rows_expanded_over_the_samples(monkeypatch):
    """Its operator by torch's: what it is given has the layout that it wants, and the gradients arrive."""
    seen = []

    def operator(q, k, v, attn_bias=None):
        if attn_bias is not None:
            seen.append((attn_bias.shape, attn_bias.stride()))
            assert attn_bias.stride(2) % 8 == 0 and attn_bias.stride(0) == 0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_bias).transpose(1, 2)

    monkeypatch.setattr(memory_efficient, "serving", lambda: ("xformers", ()))
    monkeypatch.setitem(memory_efficient.SOURCES, "xformers", lambda: (operator, None))
    segments = (17, 5)
    qkv, biases, dout = make_inputs(segments, 16, FP32, "cpu")

    def attend(q, k, v, masks):
        return GENERAL["xformers"](q, k, v, segments, segments, masks)

    compare(results(attend, qkv, biases, dout), segments, qkv, biases, dout, slack=3.0)
    assert seen == [((2, 2, 17, 17), (0, 17 * 24, 24, 1))]


def test_what_cannot_serve_is_named():
    found = obstacles_of_general((5,), (5,), True, 64, BF16, "cpu")
    assert found["sdpa"] is None and found["tile"] is None and "no cpu operator" in found["xformers"]
    assert "as many keys as queries" in obstacles_of_general((5,), (9,), False, 64, BF16, "cpu")["tile"]
    (q, k, v), _, _ = make_inputs((5,), 16, FP32, "cpu", keys=(9,))
    with pytest.raises(ValueError, match="tile asked for, but the tile kernels want as many keys as queries"):
        attention(q, k, v, key_segments=(9,), backend="tile")


def test_kinds_of_calls_are_measured_apart():
    """A choice is of a bias, and of the lengths of keys; what is timed has both."""
    asked = []

    def serve(q, k, v, segments, key_segments, biases):
        asked.append((q.shape[1], k.shape[1], None if biases is None else [b is not None for b in biases]))
        return GENERAL["sdpa"](q, k, v, segments, key_segments, biases)

    call = Call((3, 4), 2, 16, 2, "plain", "float32", True, "x", key_segments=(3, 6), biased=(True, False))
    backends = {"sdpa": serve, "tile": serve}
    cpu, none = torch.device("cpu"), dict.fromkeys(backends)
    choice = measure(call, FP32, cpu, backends, none, lambda _: [2.0, 1.0], attention_reference)
    assert choice.use == "tile" and asked == [(7, 9, [True, False])] * 2
    assert "3 + 4 tokens to 3 + 6 with a bias" in choice.sentence(call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(2, 5, 4)}, r"want a bias of floats \(2, 5, 5\)"),
        ({"bias": torch.zeros(2, 5, 5, dtype=torch.int64)}, "want a bias of floats"),
        ({"bias": (torch.zeros(2, 5, 5), None)}, "want a bias, or None, for each of 1 segments, got 2"),
        ({"key_segments": (2, 3)}, "want as many segments of keys as of queries"),
        ({"key_segments": (4,)}, "want positive key_segments that sum to T = 5"),
    ],
)
def test_bad_calls_are_refused(change, message):
    q = torch.zeros(1, 5, 2, 16)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, **change)


def test_keys_of_another_length_want_to_be_said():
    q, k = torch.zeros(1, 5, 2, 16), torch.zeros(1, 6, 2, 16)
    with pytest.raises(ValueError, match="or key_segments"):
        attention(q, k, k)
    assert "fastmim_kernels.attention.api" in sys.modules


def test_a_backend_sees_the_bias_as_it_was_measured(monkeypatch):
    """Relative positions come as a permuted view, which torch's fused kernels on CUDA do not take."""
    served, serve = [], GENERAL["sdpa"]

    def spy(q, k, v, segments, key_segments, biases):
        served.extend(biases)
        return serve(q, k, v, segments, key_segments, biases)

    monkeypatch.setitem(GENERAL, "sdpa", spy)
    q, k, v = torch.randn(3, 2, 5, 3, 8)
    bias = torch.randn(5, 5, 3).permute(2, 0, 1).requires_grad_()
    attention(q, k, v, bias=bias, backend="sdpa").sum().backward()
    assert [one.is_contiguous() for one in served] == [True]
    assert bias.grad is not None and bias.grad.shape == bias.shape
