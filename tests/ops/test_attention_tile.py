"""The tile kernels of attention: kernels and CPU form against the fp64 definition, gradients included."""

import math
import sys
from itertools import pairwise

import pytest
import torch
import torch._functorch.config
from fastmim_kernels import attention
from fastmim_kernels.attention import attention_reference
from fastmim_kernels.attention.tile import attention_tile, cpu_backward, cpu_forward
from fastmim_kernels.attention.tile_triton import forward_tile, launch_backward, launch_forward, runs
from fastmim_kernels.testing import assert_no_worse
from hypothesis import given, settings
from hypothesis import strategies as st

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("out", "dq", "dk", "dv")
# segments, width. One token, and one that fills no tile of 16; MAE's encoder of 49 patches with and without
# class token; a whole tile and one token more; what MAE scores; SimMIM without and with class token; the most
CASES = [
    ((1,), 16), ((5,), 32), ((49,), 64), ((50,), 64), ((64,), 32), ((65,), 64), ((147,), 32), ((196,), 64),
    ((197,), 32), ((197,), 64), ((256,), 16),
]  # fmt: skip
# widths that fill no power of two: tiny models, ViT-H and others; the widest
CASES += [((17,), 24), ((50,), 80), ((70,), 80), ((33,), 128), ((130,), 128), ((20,), 48), ((140,), 40)]
# R-MAE's two views; the shortest; equals, which share a launch; a mixture of one launch and two kernels
CASES += [((50, 148), 16), ((1, 1), 16), ((64,), 16), ((37, 37), 16), ((3, 3, 70, 1), 32)]


@pytest.fixture(autouse=True)
def interpreter_multiplies_bf16(monkeypatch):
    """Triton's interpreter (3.6, 3.7) hands tl.dot the bits of bf16 as integers: here, their values.

    It also cuts bits off where the device rounds to bf16: here, nearest and even.
    """
    if torch.cuda.is_available():
        return
    import numpy as np
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x):
        if x.dtype != bfloat16 or x.data.dtype != np.uint16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), float32)

    def create_dot(self, a, b, *others):
        return dot(self, widened(a), widened(b), *others)

    def cast_impl(self, x, dtype):
        if x.dtype == float32 and dtype.scalar == bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(rounded, bfloat16)
        return cast(self, x, dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def make_inputs(segments, d, dtype, device, batch=2, heads=3, size=1.0):
    """q, k, v as views of one tensor, as a fused linear layer leaves them, and the output's gradient."""
    rng = torch.Generator().manual_seed(0)
    T = sum(segments)
    qkv = torch.randn(batch, T, 3, heads, d, generator=rng).mul_(size).to(device, dtype)
    dout = torch.randn(batch, T, heads, d, generator=rng).to(device, dtype)
    return *qkv.unbind(2), dout


def definition(q, k, v, dout, segments, cast):
    leaves = [x.detach().to(cast).requires_grad_() for x in (q, k, v)]
    out = attention_reference(*leaves, segments)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(cast))


def triton_form(q, k, v, dout, segments, needs=(True, True, True)):
    out, lse = launch_forward(q, k, v, segments)
    return out, lse, *launch_backward(dout, q, k, v, out, lse, segments, needs)


def cpu_form(q, k, v, dout, segments, needs=(True, True, True)):
    out, lse = cpu_forward(q, k, v, segments)
    return out, lse, *cpu_backward(dout, q, k, v, lse, segments, needs)


def logsumexp(q, k, segments):
    parts = zip(*(x.double().split(segments, 1) for x in (q, k)), strict=True)
    scale = q.shape[3] ** -0.5
    return torch.cat([(torch.einsum("bihd,bjhd->bhij", *p) * scale).logsumexp(-1) for p in parts], -1)


def compare(form, q, k, v, dout, segments, slack=2.0):
    oracle = definition(q, k, v, dout, segments, torch.float64)
    naive = definition(q, k, v, dout, segments, FP32)
    out, lse, *grads = form(q, k, v, dout, segments)
    for name, a, o, n in zip(NAMES, (out, *grads), oracle, naive, strict=True):
        assert a.dtype == q.dtype and a.is_contiguous(), name
        if o.any():
            assert_no_worse(name, a, o, n.to(q.dtype), slack)
        else:  # one token has but one softmax
            assert a.abs().max() < 1e-5, name
    assert lse.dtype == FP32
    torch.testing.assert_close(lse.double(), logsumexp(q, k, segments), rtol=1e-5, atol=1e-5)


# in the interpreter, which takes half a minute for all of them, a case is seen in fp32 and one of the halves
@pytest.mark.parametrize(
    ("segments", "d", "dtype"),
    [
        pytest.param(*case, dtype, marks=pytest.mark.long if dtype == left_out else ())
        for i, case in enumerate(CASES)
        for left_out in [None if torch.cuda.is_available() else (BF16, FP16)[i % 2]]
        for dtype in (FP32, BF16, FP16)
    ],
    ids=str,
)
def test_kernels_match_the_definition(segments, d, dtype, device):
    if device == "cuda" and dtype == FP32:
        pytest.skip("no fp32 on CUDA")
    # in fp32 the naive form's own rounding differs by a few per cent from one processor to another
    slack = 3.0 if dtype == FP32 else 2.0
    compare(triton_form, *make_inputs(segments, d, dtype, device, 1, 2), segments, slack)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(
    ("segments", "d"), [((50, 148), 64), ((197,), 80), ((1, 1), 16), ((5,), 24)], ids=str
)
def test_cpu_form_matches_the_definition(segments, d, dtype, monkeypatch):
    # one sample at a time, the last block of two samples short
    monkeypatch.setattr(sys.modules["fastmim_kernels.attention.tile"], "CHUNK", 2 * 2 * max(segments) ** 2)
    compare(cpu_form, *make_inputs(segments, d, dtype, "cpu", 3, 2), segments)


def test_rows_of_64_as_hopper_takes_them(device, monkeypatch):
    """Above 128 tokens sm_80 takes 32, and so does the interpreter."""
    module = sys.modules["fastmim_kernels.attention.tile_triton"]
    rows = set()
    for wide in (False, True):
        monkeypatch.setattr(module, "_wide_products", lambda wide=wide: wide)
        rows.add(forward_tile(150, 16)["ROWS"])
        compare(triton_form, *make_inputs((150,), 16, FP16, device, 1, 1), (150,))
    assert rows == {32, 64}


@pytest.mark.parametrize("length", range(1, 257))
def test_tiles_hold_every_key_once(length):
    tile = forward_tile(length, 64)
    keys = tile["CHUNKS"] * tile["WIDTH"] + tile["TAIL"]
    assert length <= keys < length + 32 + 16 * (length < 16)
    assert tile["CHUNKS"] * tile["WIDTH"] <= length  # what is not the tail is not masked


def test_runs_cover_the_tokens():
    segments = (7, 3, 3, 3, 7, 7, 1)
    assert list(runs(segments)) == [(0, 7, 1), (7, 3, 3), (16, 7, 2), (30, 1, 1)]


# --- numbers that are hard ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [triton_form, cpu_form])
@pytest.mark.parametrize("segments", [(50,), (70, 20)], ids=str)
def test_large_logits(form, segments, device):
    """Logits of hundreds: exp of them, or of what is far below them, is no number."""
    where = device if form is triton_form else "cpu"
    q, k, v, dout = make_inputs(segments, 32, BF16, where, 1, 2, size=12.0)
    assert logsumexp(q, k, segments).max() > 500
    compare(form, q, k, v, dout, segments)


@pytest.mark.parametrize("form", [triton_form, cpu_form])
@pytest.mark.parametrize("length", [20, 70])
def test_logits_all_far_below_zero(form, length, device):
    """exp(0 - lse) of a key that does not exist would be infinite.

    Slack: where one key has all the weight, dp - delta is small, and delta is made of the rounded output.
    """
    where = device if form is triton_form else "cpu"
    q, k, v, dout = make_inputs((length,), 16, BF16, where, 1, 1)
    q, k = q.abs() * 8 + 8, -k.abs() * 8 - 8
    assert logsumexp(q, k, (length,)).max() < -200
    compare(form, q, k, v, dout, (length,), slack=3.0)


@pytest.mark.parametrize("length", [50, 100])
def test_equal_keys_give_the_mean(length, device):
    q, _, v, _ = make_inputs((length,), 16, FP16, device, 1, 2)
    out, lse = launch_forward(q, torch.zeros_like(q), v, (length,))
    mean = v.float().mean(1, keepdim=True).expand(v.shape)
    torch.testing.assert_close(out.float(), mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(length)))


def test_nothing_outside_a_segment_is_read_or_written(device):
    """NaN beside every segment: before, behind, in the next head and in the next sample."""
    for segments in ((5, 20, 7), (3, 70, 2)):
        q, k, v, dout = make_inputs(segments, 16, FP16, device, 2, 3)
        expected = triton_form(q, k, v, dout, segments)
        inside = slice(segments[0], segments[0] + segments[1])
        poisoned = [torch.full_like(x, float("nan")) for x in (q, k, v, dout)]
        for x, y in zip(poisoned, (q, k, v, dout), strict=True):
            x[0, inside, 1] = y[0, inside, 1]
        out, lse, *grads = triton_form(*poisoned, segments)
        for a, e in zip((out, *grads), (expected[0], *expected[2:]), strict=True):
            assert torch.equal(a[0, inside, 1], e[0, inside, 1])
        assert torch.equal(lse[0, 1, inside], expected[1][0, 1, inside])


# --- strides, addresses, empty -----------------------------------------------------------------------


@pytest.mark.parametrize("form", [triton_form, cpu_form])
@pytest.mark.parametrize("segments", [(20,), (70,), (4, 66)], ids=str)
def test_strides_do_not_matter(form, segments, device):
    where = device if form is triton_form else "cpu"
    q, k, v, dout = make_inputs(segments, 24, FP16, where, 2, 2)
    plain = [x.contiguous() for x in (q, k, v, dout)]
    expected = form(*plain, segments)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    tokens_first = k.transpose(0, 1).contiguous().transpose(0, 1)
    wider = torch.nn.functional.pad(v, (0, 8))[..., :24]
    turned = dout.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)  # not even the last dim contiguous
    for inputs in ((q, k, v, dout), (heads_first, tokens_first, wider, turned)):
        for name, a, e in zip(
            (*NAMES[:1], "lse", *NAMES[1:]), form(*inputs, segments), expected, strict=True
        ):
            assert torch.equal(a, e), name
    one = torch.ones((), device=where, dtype=FP16).expand(dout.shape)  # what sum() sends back
    for a, e in zip(form(*plain[:3], one, segments), form(*plain[:3], one.clone(), segments), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("length", [20, 70])
def test_addresses_beyond_int32(length, monkeypatch):
    """Sample and token times their strides pass 2**31. The interpreter shows it: its pointers are numbers."""
    if torch.cuda.is_available():
        pytest.skip("looks into the interpreter")
    from triton.language import float16
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    strides, real, far = (2**30, 2**27, 16, 1), InterpreterBuilder.create_masked_load, set()
    backing = torch.zeros(4 * length * 2 * 16, dtype=FP16)

    class Far(torch.Tensor):
        def stride(self, dim=None):
            return strides if dim is None else strides[dim]

    def masked_load(self, pointers, mask, other, *rest):
        if pointers.dtype.scalar.element_ty != float16:
            return real(self, pointers, mask, other, *rest)
        offsets = pointers.data.astype("int64") - backing.data_ptr()
        far.update(offsets[mask.data])
        near = (backing.data_ptr() + offsets % 64).astype(pointers.data.dtype)
        return real(self, TensorHandle(near, pointers.dtype), mask, other, *rest)

    x = backing.view(4, length, 2, 16)
    lse, last = torch.zeros(4, 2, length), 2 * (3 * 2**30 + (length - 1) * 2**27 + 16 + 15)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
    y = x.as_subclass(Far)
    launch_forward(y, y, y, (length,))
    assert max(far) == last and min(far) == 0
    far.clear()
    launch_backward(y, y, y, y, x, lse, (length,), (True, True, True))
    assert max(far) == last and min(far) == 0


def test_nothing_is_good_input(device):
    q, k, v, dout = make_inputs((70,), 16, FP16, device)
    for form in (triton_form, cpu_form) if device == "cpu" else (triton_form,):
        for empty in (lambda x: x[:0], lambda x: x[:, :, :0]):
            out, lse, *grads = form(*map(empty, (q, k, v, dout)), (70,))
            assert out.shape == empty(q).shape and lse.numel() == 0
            assert all(g.shape == empty(q).shape for g in grads)
    leaf = q[:0].detach().requires_grad_()
    attention(leaf, k[:0], v[:0], backend="tile").sum().backward()
    assert leaf.grad.shape == leaf.shape


@given(
    segments=st.lists(st.integers(1, 80), min_size=1, max_size=3),
    d=st.sampled_from([16, 24, 32]),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
)
@settings(max_examples=8, deadline=None)
def test_any_shape(segments, d, batch, heads):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compare(triton_form, *make_inputs(segments, d, FP16, device, batch, heads), tuple(segments))


# --- the op -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [triton_form, cpu_form])
@pytest.mark.parametrize("segments", [(20,), (70,)], ids=str)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 0)])
def test_only_the_gradients_that_are_asked_for(needs, segments, form, device):
    needs = tuple(map(bool, needs))
    q, k, v, dout = make_inputs(segments, 16, FP16, device if form is triton_form else "cpu")
    every = form(q, k, v, dout, segments)[2:]
    for need, a, e in zip(needs, form(q, k, v, dout, segments, needs)[2:], every, strict=True):
        assert torch.equal(a, e) if need else a.shape == (0, *e.shape[1:])
    leaves = [x.detach().requires_grad_(need) for x, need in zip((q, k, v), needs, strict=True)]
    out = attention(*leaves, segments=segments, backend="tile")
    assert out.requires_grad == any(needs)
    if any(needs):
        out.backward(dout)
    for x, need, e in zip(leaves, needs, definition(q, k, v, dout, segments, FP32)[1:], strict=True):
        assert (x.grad is not None) == need
        if need:
            torch.testing.assert_close(x.grad.float(), e, rtol=1e-2, atol=1e-2)


def test_op_is_registered_right(device):
    dtype = FP16 if device == "cuda" else FP32
    op = torch.ops.fastmim.attention_tile.default
    back = torch.ops.fastmim.attention_tile_backward.default
    for segments in ((20,), (4, 66)):
        q, k, v, dout = make_inputs(segments, 16, dtype, device)
        out, lse = op(q, k, v, segments)
        for needs in ((True, True, True), (False, True, False)):
            torch.library.opcheck(back, (dout, q, k, v, out, lse, segments, *needs))
        torch.library.opcheck(op, (q, k, v, segments))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(op, (*leaves, segments))


@pytest.mark.parametrize("dynamic", [False, True])
@torch._functorch.config.patch(enable_autograd_cache=False)  # it would not see that our backward has changed
def test_one_graph_forward_and_backward(dynamic, device):
    def step(q, k, v, segments):
        return attention(q, k, v, segments=segments, backend="tile")

    run = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for segments in ((20,), (5, 12)):
        q, k, v, dout = make_inputs(segments, 16, BF16 if device == "cuda" else FP32, device)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = run(*leaves, segments)
        actual = out.detach(), *torch.autograd.grad(out, leaves, dout)
        expected = definition(q, k, v, dout, segments, q.dtype)
        slack = {"rtol": 2e-2, "atol": 2e-2} if device == "cuda" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(actual, expected, **slack)


def test_the_same_bits_each_time(device):
    q, k, v, dout = make_inputs((150,), 32, BF16, device)
    for a, b in pairwise(triton_form(q, k, v, dout, (150,)) for _ in range(2)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_rejects_what_it_cannot_do(device):
    def ones(T=4, d=16, dtype=BF16, where=device):
        return torch.ones(1, T, 1, d, dtype=dtype, device=where)

    wide = ones(d=32)[..., ::2]
    bad = [
        ("at most 256 tokens a segment, there are 257", (ones(257),) * 3, (257,)),
        *(
            (
                f"want heads of 16 to 64 in steps of 8, to 128 in steps of 16, these are {d} wide",
                (ones(d=d),) * 3,
                None,
            )
            for d in (8, 20, 72, 129, 144)
        ),
        ("want bf16 or fp16, this is float64", (ones(dtype=torch.float64),) * 3, None),
        ("want q, k and v with a contiguous last dim", (ones(), ones(), wide), None),
        ("want positive segments that sum to T = 4, got \\(4, 0\\)", (ones(),) * 3, (4, 0)),
        ("want positive segments that sum to T = 4, got \\(\\)", (ones(),) * 3, ()),
        ("want positive segments that sum to T = 4, got \\(5, -1\\)", (ones(),) * 3, (5, -1)),
    ]
    for message, qkv, segments in bad:
        with pytest.raises(ValueError, match=message):
            attention(*qkv, segments=segments, backend="tile")
    with pytest.raises(ValueError, match="want bf16 or fp16, this is float32"):
        attention_tile(*(ones(dtype=FP32, where="meta"),) * 3, (4,))  # anywhere but on the CPU
    two = attention(*(ones(300),) * 3, segments=(150, 150), backend="tile")  # it is the segment that counts
    assert torch.equal(two, torch.ones_like(two))
