"""The backends of attention that others wrote: xformers and its heir, torch's varlen_attn."""

import inspect
import sys
import tomllib
import types
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from fastmim_kernels.attention import (
    attention,
    attention_reference,
    memory_efficient,
    obstacles,
    varlen,
)
from fastmim_kernels.attention.api import BACKENDS
from fastmim_kernels.attention.memory_efficient import PAIRS, remedy, serving, why_broken, why_no_xformers
from fastmim_kernels.attention.varlen import why_no_varlen

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def asked_anew():
    """Answers are kept for good: none that a fake gave outlives its test."""
    caches = serving, varlen._why_not_here, varlen._kept_offsets
    caches += (memory_efficient._block_diagonal,)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


# --- xformers and mslk --------------------------------------------------------------------------------


class Mask:
    def __init__(self, lengths):
        self.lengths = lengths

    @classmethod
    def from_seqlens(cls, lengths, device):
        return cls(tuple(lengths))


def memory_efficient_attention(q, k, v, attn_bias=None):
    return attention_reference(q, k, v, attn_bias and attn_bias.lengths)


@pytest.fixture
def without_cuda(monkeypatch):
    """Tensors of the trial lie on the CPU."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **kw: zeros(*size, **kw))


def test_the_package_that_serves(monkeypatch, without_cuda):
    """xformers comes first; where it does not load its heir serves, and what was wrong with it is known."""

    def broken():
        raise RuntimeError("no operators") from OSError(
            "libcudart.so.12: cannot open shared object file\nmore"
        )

    works = lambda: (memory_efficient_attention, Mask)  # noqa: E731
    q, k, v = torch.randn(3, 2, 12, 2, 8).unbind()
    monkeypatch.setattr(memory_efficient, "INSTALLED", {"xformers": "0.0.35", "mslk-cuda": "1.1.0"})
    monkeypatch.setattr(memory_efficient, "SOURCES", {"xformers": works, "mslk-cuda": broken})
    assert serving() == ("xformers", ()) and why_no_xformers() is None
    serving.cache_clear()
    monkeypatch.setattr(memory_efficient, "SOURCES", {"xformers": broken, "mslk-cuda": works})
    wrong = "xformers 0.0.35 does not work here (libcudart.so.12: cannot open shared object file)"
    assert serving() == ("mslk-cuda", (wrong,)) and why_no_xformers() is None
    for segments in ((12,), (5, 7)):
        out = BACKENDS["xformers"](q, k, v, segments)
        torch.testing.assert_close(out, attention_reference(q, k, v, segments))
    serving.cache_clear()
    monkeypatch.setattr(memory_efficient, "SOURCES", {"xformers": broken, "mslk-cuda": broken})
    assert why_no_xformers().startswith(f"{wrong}; mslk-cuda 1.1.0 does not work here (libcudart")
    assert why_no_xformers().endswith(remedy())


def test_what_is_not_installed_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr(memory_efficient, "INSTALLED", {"xformers": None, "mslk-cuda": None})
    assert why_no_xformers() == f"neither xformers nor mslk-cuda is installed; {remedy()}"
    assert obstacles((4,), 64, BF16, "cpu")["xformers"] == f"xformers has no cpu operator; {remedy()}"


def test_the_remedy_fits_the_torch():
    assert remedy("2.10.0+cu128") == "torch 2.10 wants xformers 0.0.34: pip install 'fastmim[xformers]'"
    assert remedy("2.11.0") == "torch 2.11 wants mslk-cuda 1.1.0: pip install 'fastmim[mslk]'"
    assert remedy("2.13.0+cpu") == (
        "nothing fits torch 2.13: "
        "torch 2.10 with xformers 0.0.34 or torch 2.11 with mslk-cuda 1.1.0 would serve"
    )


def test_the_pairs_are_those_that_can_be_installed():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for torch_release, (extra, package, number) in PAIRS.items():
        wanted = [line.partition(";")[0].strip() for line in extras[extra]]
        assert wanted == [f"torch=={torch_release}.*", f"{package}=={number}"]
    assert not [line for line in extras["engine"] + extras["dev"] if line.startswith(("xformers", "mslk"))]


def test_the_cause_of_an_error_is_said():
    error = RuntimeError("Could not load this library: /x.so")
    error.__cause__ = OSError("undefined symbol: abc\nat line 1")
    assert why_broken(error) == "undefined symbol: abc"
    assert why_broken(RuntimeError()) == "RuntimeError"


# --- varlen --------------------------------------------------------------------------------------------


def packed_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
    """What varlen_attn promises, run by run. Differentiable."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    ends = cu_seq_q.tolist()
    lengths = [b - a for a, b in pairwise(ends)]
    assert ends[0] == 0 and ends[-1] == len(query) and max(lengths) == max_q == max_k
    outs = [attention_reference(*(x[None] for x in run)) for run in zip(
        *(x.split(lengths) for x in (query, key, value)), strict=True
    )]  # fmt: skip
    return torch.cat(outs, dim=1)[0]


@pytest.fixture
def on_the_cpu(monkeypatch):
    from torch.nn.attention import varlen as theirs

    monkeypatch.setattr(theirs, "varlen_attn", packed_attention)


@pytest.mark.parametrize("segments", [(12,), (5, 7), (3, 3, 6), (1, 11)], ids=str)
def test_varlen_packs_what_the_definition_means(on_the_cpu, segments):
    qkv = torch.randn(3, 12, 3, 2, 8, requires_grad=True)  # as a fused qkv gives them
    heads = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv.unbind(2)]
    expected = attention_reference(*qkv.unbind(2), segments)
    (grad,) = torch.autograd.grad(expected.square().sum(), qkv)
    for inputs in (qkv.unbind(2), heads):
        out = BACKENDS["varlen"](*inputs, segments)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), qkv, retain_graph=True)[0], grad)


def test_varlen_keeps_only_offsets_that_hold_something(on_the_cpu):
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept = varlen._kept_offsets
    with FakeTensorMode():
        q = torch.randn(2, 12, 2, 8)
        assert not varlen._may_be_kept(q)
    with torch.inference_mode():
        BACKENDS["varlen"](*torch.randn(3, 2, 12, 2, 8).unbind(), (5, 7))
    offsets = kept((5, 7), 2, torch.device("cpu"))
    assert kept.cache_info().hits == 1 and not offsets.is_inference()
    assert offsets.tolist() == list(accumulate((5, 7, 5, 7), initial=0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiler_makes_the_offsets(dynamic):
    run = torch.compile(
        lambda x: varlen._offsets((5, 7), len(x), x.device), fullgraph=True, dynamic=dynamic,
        backend="aot_eager",
    )  # fmt: skip
    for batch in (2, 3):
        expected = list(accumulate((5, 7) * batch, initial=0))
        assert run(torch.zeros(batch, 1)).tolist() == expected


def test_varlen_in_one_graph():
    """torch's own op, traced whole: as far as a machine without a GPU goes."""
    q, k, v = torch.randn(3, 2, 12, 2, 8, dtype=BF16).unbind()
    seen = []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    step = torch.compile(lambda q, k, v: BACKENDS["varlen"](q, k, v, (5, 7)), fullgraph=True, backend=look)
    with pytest.raises(Exception, match="_flash_attention_forward|flash"):  # of which the CPU has none
        step(q, k, v)
    assert any("varlen_attn" in name for name in seen)


def test_the_obstacles_of_varlen_are_named(monkeypatch):
    monkeypatch.setattr(varlen, "_why_not_here", lambda: None)
    assert why_no_varlen(64, BF16, "cuda") is None and why_no_varlen(256, torch.float16, "cuda") is None
    assert why_no_varlen(64, BF16, "cpu") == "torch's varlen_attn has no cpu operator"
    assert "wants bf16 or fp16, this is float32" in why_no_varlen(64, torch.float32, "cuda")
    for width in (20, 264):
        assert f"up to 256, these are {width} wide" in why_no_varlen(width, BF16, "cuda")
    with pytest.raises(ValueError, match="varlen asked for, but torch's varlen_attn has no cpu operator"):
        attention(*torch.randn(3, 2, 4, 2, 8).unbind(), backend="varlen")


def test_varlen_is_tried_before_it_is_chosen(monkeypatch, without_cuda):
    from torch.nn.attention import varlen as theirs

    monkeypatch.setattr(theirs, "varlen_attn", packed_attention)
    assert why_no_varlen(64, BF16, "cuda") is None
    varlen._why_not_here.cache_clear()

    def fails(*_):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(theirs, "varlen_attn", fails)
    assert why_no_varlen(64, BF16, "cuda") == (
        "torch's varlen_attn does not work here (FlashAttention only supports Ampere GPUs or newer.)"
    )
    varlen._why_not_here.cache_clear()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.ModuleType("of an older torch"))
    assert why_no_varlen(64, BF16, "cuda").endswith("has no torch.nn.attention.varlen, torch 2.10 has")


def test_torch_takes_what_varlen_gives():
    """The arguments that are given by position, in every torch that the project allows."""
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
