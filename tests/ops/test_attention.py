"""attention: dense and packed against the definition, and which backend serves and why."""

import json
import logging
import re
import sys

import pytest
import torch
from fastmim_kernels.attention import (
    attention,
    attention_choices,
    attention_reference,
    choose_attention,
    pin_attention_choices,
    timing,
    varlen,
)
from fastmim_kernels.attention.api import BACKENDS
from fastmim_kernels.attention.timing import Call, cuda_ms, measure
from fastmim_kernels.testing import assert_no_worse

# 50 + 148 = R-MAE at 196 patches; 1 = a class token alone; 65 is no multiple of any tile
SEGMENTS = [None, (50, 148), (1, 64), (65,), (7, 3, 9)]


def inputs(T: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, T, 3, 3, 16, generator=rng).to(device, dtype)  # strided, as a fused qkv gives them
    return list(qkv.unbind(2))


@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_definition(segments, dtype, device):
    qkv = inputs(sum(segments) if segments else 33, dtype, device)
    dout = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def forward_backward(fn, cast):
        leaves = [x.to(cast).detach().requires_grad_() for x in qkv]
        out = fn(*leaves, segments)
        return out.detach(), *torch.autograd.grad(out, leaves, dout.to(cast))

    oracle = forward_backward(attention_reference, torch.float64)
    naive = forward_backward(attention_reference, dtype)
    ours = forward_backward(lambda q, k, v, s: attention(q, k, v, segments=s), dtype)
    for name, a, o, n in zip(("out", "dq", "dk", "dv"), ours, oracle, naive, strict=True):
        assert a.shape == o.shape
        assert_no_worse(name, a, o, n, slack=6 if a.is_cuda else 3)


def test_segments_do_not_see_one_another(device):
    q, k, v = inputs(12, torch.float32, device)
    before = attention(q, k, v, segments=(5, 7))
    v2 = v.clone()
    v2[:, 5:] += 1
    after = attention(q, k, v2, segments=(5, 7))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_one_graph_with_segments(device):
    q, k, v = (x.requires_grad_() for x in inputs(12, torch.float32, device))
    compiled = torch.compile(attention, fullgraph=True)
    torch.testing.assert_close(
        compiled(q, k, v, segments=(5, 7), backend="sdpa"), attention_reference(q, k, v, (5, 7))
    )


def test_the_choice_is_said_with_its_reason(monkeypatch):
    module = sys.modules["fastmim_kernels.attention.api"]  # the package exports its function by that name
    monkeypatch.setattr(varlen, "_why_not_here", lambda: None)
    assert choose_attention("auto", "cpu", torch.float32) == ("sdpa", "torch's own kernels serve on cpu")
    assert choose_attention("tile", "cpu", torch.float32) == ("tile", "asked for by name")
    monkeypatch.setattr(module, "why_no_xformers", lambda: None)
    measured = "measured at the first call of each shape"
    assert choose_attention("auto", "cuda", torch.bfloat16) == (
        "auto", f"the fastest of xformers, sdpa, tile, varlen, {measured}",
    )  # fmt: skip
    assert choose_attention("auto", "cuda", torch.float32) == (
        "sdpa",
        "xformers' fast operators want bf16 or fp16, this is float32; "
        "the tile kernels want bf16 or fp16, this is float32; "
        "torch's varlen_attn wants bf16 or fp16, this is float32",
    )  # fmt: skip
    monkeypatch.setattr(module, "why_no_xformers", lambda: "it is not installed")
    monkeypatch.setattr(varlen, "_why_not_here", lambda: "no FlashAttention")
    assert choose_attention("auto", "cuda", torch.bfloat16) == (
        "auto", f"the fastest of sdpa, tile, {measured}; it is not installed; no FlashAttention",
    )  # fmt: skip


def test_what_cannot_be_had_is_refused(device):
    q, k, v = inputs(4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="xformers asked for, but xformers has no cpu operator"):
        attention(q, k, v, backend="xformers")
    with pytest.raises(ValueError, match="want auto, xformers, sdpa, tile, varlen, got 'flash'"):
        choose_attention("flash", "cpu", torch.float32)
    with pytest.raises(ValueError, match="tile asked for, but the tile kernels want bf16 or fp16"):
        choose_attention("tile", "cuda", torch.float32)
    with pytest.raises(ValueError, match="want positive segments that sum to T = 4"):
        attention(q, k, v, segments=(1, 2))
    with pytest.raises(ValueError, match="want three"):
        attention(q, k[:, :2], v)


# --- the choice by measurement ------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """`auto` measures on this device, by a clock that calls what it times. Returns what the clock saw."""
    module, seen = sys.modules["fastmim_kernels.attention.api"], []
    monkeypatch.setattr(timing, "_CHOICES", {})
    monkeypatch.setattr(module, "MEASURED_ON", "cuda" if torch.cuda.is_available() else "cpu")

    def clock(runs):
        seen.append([[x.shape for x in run()] for run in runs])
        return [3.0, 1.0, 2.0][-len(runs) :]  # the second of the last three, the first of two

    monkeypatch.setattr(module, "cuda_ms", clock)
    monkeypatch.setattr(module, "why_no_xformers", lambda: "none here")
    monkeypatch.setattr(varlen, "_why_not_here", lambda: "none here")
    return seen


def some(T, device, batch=4, heads=2, d=16, grad=False):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    qkv = torch.randn(batch, T, 3, heads, d, device=device, dtype=dtype, requires_grad=grad)
    return qkv.unbind(2)


def test_each_kind_of_call_is_measured_once(measured, device, caplog):
    caplog.set_level(logging.INFO)
    for batch in (4, 5, 7):
        attention(*some(50, device, batch))
    (choice,) = attention_choices()
    assert choice["segments"] == (50,) and choice["batch"] == 4 and choice["layout"] == "packed"
    assert (choice["heads"], choice["width"], choice["grad"]) == (2, 16, False)
    assert choice["ms"] == {"sdpa": 1.0, "tile": 2.0} and choice["use"] == "sdpa"
    assert list(choice["left_out"]) == ["xformers", "varlen"]
    (line,) = [record.message for record in caplog.records if record.name == "fastmim_kernels"]
    assert (
        "50 tokens, 2 heads of 16, batch 4" in line and "forward: sdpa (sdpa 1.000 ms, tile 2.000 ms" in line
    )
    assert measured == [[[(4, 50, 2, 16)]] * 2]
    q, k, v = some(50, device, grad=True)
    attention(q, k, v)
    assert measured[1:] == [[[(4, 50, 2, 16)] * 4] * 2]  # the gradients as well
    q, k, v = some(52, device, grad=True)
    with torch.no_grad():
        attention(q, k, v)
    assert len(measured) == 3 and not attention_choices()[-1]["grad"]
    for q, k, v in (some(51, device), some(50, device, 8), some(50, device, heads=3), some(50, device, d=32)):
        attention(q, k, v)
    q, k, v = some(50, device)
    attention(q.contiguous(), k.contiguous(), v.contiguous())
    attention(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)))
    attention(q, k, v, segments=(20, 30))
    assert len(measured) == len(attention_choices()) == 10
    assert {c["layout"] for c in attention_choices()} == {"plain", "packed", "heads"}


def test_the_fastest_serves(measured, monkeypatch, device):
    module, served = sys.modules["fastmim_kernels.attention.api"], []
    for name, real in list(BACKENDS.items()):
        monkeypatch.setitem(BACKENDS, name, lambda *a, n=name, real=real: served.append(n) or real(*a))
    monkeypatch.setattr(module, "cuda_ms", lambda runs: [2.0, 1.0])
    q, k, v = some(50, device)
    attention(q, k, v)
    assert served[-1] == "tile"
    served.clear()
    attention(q, k, v)
    assert served == ["tile"]  # and nothing is measured again
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 50, 2, 16)
    assert served == ["tile"] and len(attention_choices()) == 1  # of nothing nothing is measured


def test_one_token_whose_gradients_are_rounding_is_no_failure(measured, device):
    attention(*some(1, device, grad=True))
    assert attention_choices()[0]["ms"].keys() == {"sdpa", "tile"}


def test_a_large_batch_is_measured_at_a_share_of_it(measured, device):
    attention(*some(5, device, batch=5000, heads=3))
    (choice,) = attention_choices()
    assert choice["batch"] == 2048  # the power of two that makes 4096 heads


def test_a_backend_that_fails_or_is_wrong_is_left_out_and_named(measured, monkeypatch, device):
    def broken(*_):
        raise RuntimeError("no kernel image\nsecond line")

    def wrong(q, k, v, segments):
        return BACKENDS["sdpa"](q, k, v, segments) * 1.05

    for name, fn, reason in (
        ("tile", broken, "RuntimeError: no kernel image"),
        ("tile", wrong, r"off by 0\.05\d* of sdpa's largest value"),  # in bf16 there are more digits
        ("tile", lambda q, k, v, s: q * float("nan"), "off by nan of sdpa's largest value"),
    ):
        timing._CHOICES.clear()
        monkeypatch.setitem(BACKENDS, name, fn)
        attention(*some(50, device))
        (choice,) = attention_choices()
        assert choice["use"] == "sdpa" and choice["ms"] == {}
        assert re.fullmatch(reason, choice["left_out"][name])
    attention(*some(300, device))
    assert attention_choices()[-1]["left_out"]["tile"] == (
        "the tile kernels want at most 256 tokens a segment, there are 300"
    )


def test_an_sdpa_that_fails_is_left_out_and_the_others_are_checked_by_the_definition(
    measured, monkeypatch, device
):
    def fails(*_):
        raise RuntimeError("No available kernel. Aborting execution.\nand more")

    def wrong_gradient(q, k, v, segments):
        return BACKENDS["tile"](q, k * 1.05 - 0.05 * k.detach(), v, segments)

    module = sys.modules["fastmim_kernels.attention.api"]
    monkeypatch.setitem(BACKENDS, "sdpa", fails)
    monkeypatch.setattr(timing, "CHECKED_LOGITS", 2 * 2 * 50**2)  # two samples of the four
    for q, k, v in (some(50, device), some(50, device, grad=True)):
        out = attention(q, k, v, segments=(20, 30))
        torch.testing.assert_close(out, attention_reference(q, k, v, (20, 30)), rtol=2e-2, atol=2e-2)
        choice = attention_choices()[-1]
        assert choice["use"] == "tile" and choice["ms"] == {}
        assert choice["left_out"]["sdpa"] == "RuntimeError: No available kernel. Aborting execution."
    timing._CHOICES.clear()
    monkeypatch.setitem(BACKENDS, "another", wrong_gradient)
    q, k, v = some(50, device, grad=True)
    attention(q, k, v)
    reason = attention_choices()[-1]["left_out"]["another"]
    assert re.fullmatch(r"off by 0\.05\d* of the definition's largest value", reason)
    monkeypatch.setattr(module, "attention_reference", fails)
    timing._CHOICES.clear()
    with pytest.raises(RuntimeError, match="no tile: nothing to check it with .RuntimeError: No available"):
        attention(q, k, v)


def test_where_all_fail_the_reason_of_each_is_said(measured, monkeypatch, device):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(BACKENDS, "sdpa", fails)
    monkeypatch.setitem(BACKENDS, "tile", lambda q, k, v, segments: q + 1)
    with pytest.raises(RuntimeError) as caught:
        attention(*some(50, device))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("no backend serves: attention of 50 tokens, 2 heads of 16, batch 4")
    assert "no sdpa: OutOfMemoryError: CUDA out of memory." in line and "no xformers: " in line
    assert "no tile: off by " in line and "no varlen: " in line and attention_choices() == []
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):  # alone, it speaks for itself
        attention(*some(300, device))


def test_equal_outputs_agree_whatever_they_are(device):
    """A device that computes nothing hands out zeros."""
    zeros = [torch.zeros(2, 3, device=device)]
    assert timing._disagreement(zeros, zeros, "sdpa's") is None
    assert timing._disagreement([zeros[0] + 1], zeros, "sdpa's") == "off by 1 of sdpa's largest value"


def test_choices_are_pinned_for_a_run_that_resumes(measured, device):
    q, k, v = some(50, device)
    attention(q, k, v)
    saved = json.loads(json.dumps(attention_choices()))
    saved[0]["use"] = "tile"
    timing._CHOICES.clear()
    pin_attention_choices(saved)
    attention(q, k, v)
    assert len(measured) == 1 and attention_choices()[0]["use"] == "tile"


def test_measuring_leaves_the_random_state_alone(measured, device):
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else [])]
    q, k, v = some(50, device)
    before = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else [])]
    assert any(not torch.equal(a, b) for a, b in zip(states, before, strict=True))
    attention(q, k, v)
    after = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else [])]
    assert len(measured) == 1 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_inputs_are_measured_as_they_lie(device):
    dtype = torch.float32
    for layout, stride in (("plain", (32, 16)), ("packed", (96, 16)), ("heads", (16, 16 * 50))):
        call = Call((20, 30), 2, 16, 4, layout, "float32", True, device)
        q, k, v, dout = timing._make_inputs(call, dtype, torch.device(device))
        for x in (q, k, v):
            assert x.shape == (4, 50, 2, 16) and x.stride()[1:3] == stride and x.is_leaf and x.requires_grad
        assert not dout.requires_grad and dout.std() > 0.5 and not torch.equal(q, k)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiler_takes_the_choice_as_a_constant(measured, dynamic, device):
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T, batch in ((20, 4), (20, 5), (21, 4)):
        q, k, v = some(T, device, batch, grad=True)
        torch.testing.assert_close(compiled(q, k, v), attention_reference(q, k, v), rtol=2e-2, atol=2e-2)
    assert [(c["segments"], c["batch"]) for c in attention_choices()] == [((20,), 4), ((21,), 4)]
    assert len(measured) == 2


def test_nothing_is_measured_where_nothing_is_computed(measured, device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert attention(*some(50, device)).shape == (4, 50, 2, 16)
    assert attention_choices() == [] and measured == []


def test_a_graph_that_is_being_captured_is_not_measured_in(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call = Call((50,), 2, 16, 4, "plain", "bfloat16", True, "a GPU")
    settings = torch.bfloat16, torch.device("cuda"), BACKENDS, {}, None, None
    assert timing.fastest(call, *settings) == "sdpa" and attention_choices() == []
    pin_attention_choices([{**vars(call), "use": "tile", "ms": {}, "left_out": {}}])
    assert timing.fastest(call, *settings) == "tile"


class Clock:
    """CUDA's events and streams as far as `cuda_ms` knows them."""

    now = 0.0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_the_clock(monkeypatch):
    """Each run by its own median per call: the first round, which compiles, does not count."""
    order, calls = [], [0, 0]
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: setattr(Clock, "now", Clock.now + 1000.0))

    def runner(i, ms):
        def run():
            order.append(i)
            Clock.now += 500.0 if calls[i] == 0 else ms
            calls[i] += 1

        return run

    assert cuda_ms([runner(0, 3.0), runner(1, 0.5)]) == [3.0, 0.5]
    assert calls == [(1 + timing.TURNS) * timing.CALLS] * 2
    assert order[:8] == [1, 1, 0, 0, 0, 0, 1, 1] and order.count("wait") == 1 and order[-1] == "wait"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures on a GPU")
@pytest.mark.gpu
def test_auto_on_a_gpu(monkeypatch):
    monkeypatch.setattr(timing, "_CHOICES", {})
    for T, d in ((50, 64), (197, 32)):
        q, k, v = some(T, "cuda", batch=64, heads=8, d=d, grad=True)
        out = attention(q, k, v)
        torch.testing.assert_close(out, attention_reference(q, k, v), rtol=2e-2, atol=2e-2)
        choice = attention_choices()[-1]
        assert {"sdpa", "tile"} <= choice["ms"].keys(), choice["left_out"]
        assert choice["use"] == min(choice["ms"], key=choice["ms"].get)
        assert all(0 < ms < 100 for ms in choice["ms"].values())


def test_measure_times_only_what_it_has_checked(device):
    call = Call((20,), 2, 16, 2, "plain", "float32", True, device)
    found = {"xformers": "none here", "sdpa": None, "tile": "not wanted", "varlen": "none here"}
    settings = torch.float32, torch.device(device), BACKENDS, found, lambda runs: 1 / 0, None
    choice = measure(call, *settings)
    assert choice.use == "sdpa" and choice.ms == {}
    assert choice.left_out.keys() == {"xformers", "tile", "varlen"}
