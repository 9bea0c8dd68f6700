"""attention: dense and packed against the definition, and which backend serves and why."""

import sys

import pytest
import torch
from fastmim_kernels.attention import attention, attention_reference, choose_attention
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
        assert_no_worse(name, a, o, n, slack=3)


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
    module = sys.modules["fastmim_kernels.attention"]  # the package exports its function by that name
    assert choose_attention("auto", "cpu", torch.float32) == ("sdpa", "xformers has no cpu operator")
    monkeypatch.setattr(module, "XFORMERS", "0.0.35")
    monkeypatch.setattr(module, "why_no_xformers", lambda: None)
    assert choose_attention("auto", "cuda", torch.bfloat16) == ("xformers", "xformers 0.0.35 on CUDA")
    assert choose_attention("auto", "cuda", torch.float32)[0] == "sdpa"
    monkeypatch.setattr(module, "why_no_xformers", lambda: "xformers is not installed")
    assert choose_attention("auto", "cuda", torch.bfloat16) == ("sdpa", "xformers is not installed")


def test_what_cannot_be_had_is_refused(device):
    q, k, v = inputs(4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="xformers asked for, but xformers has no cpu operator"):
        attention(q, k, v, backend="xformers")
    with pytest.raises(ValueError, match="want auto, xformers or sdpa, got 'flash'"):
        choose_attention("flash", "cpu", torch.float32)
    with pytest.raises(ValueError, match="want positive segments that sum to T = 4"):
        attention(q, k, v, segments=(1, 2))
    with pytest.raises(ValueError, match="want three"):
        attention(q, k[:, :2], v)


def test_xformers_is_tried_before_it_is_chosen(monkeypatch):
    module = sys.modules["fastmim_kernels.attention"]
    monkeypatch.setattr(module, "XFORMERS", None)
    module.why_no_xformers.cache_clear()
    assert module.why_no_xformers() == "xformers is not installed"
    if not torch.cuda.is_available():
        monkeypatch.setattr(module, "XFORMERS", "0.0.35")
        module.why_no_xformers.cache_clear()
        assert module.why_no_xformers().startswith("xformers 0.0.35 does not work here: ")
    module.why_no_xformers.cache_clear()
