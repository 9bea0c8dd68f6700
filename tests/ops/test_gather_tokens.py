"""gather_tokens: the kernel against the fp64 definition, then the op against PyTorch's checks."""

import pytest
import torch
from fastmim_kernels import gather_tokens
from fastmim_kernels.gather_tokens import gather_tokens_reference, launch_backward, launch_forward
from fastmim_kernels.testing import assert_no_worse

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ALL = (True, True, True)
# B, N, D, K: MAE's quarter, R-MAE's other view and all tokens at the widths of ViT-B, Ti and S, which fill no
# power of two; 130 samples are three shares of the backward, the last not full; a block of 512 to the last
# value; H's width is two blocks and a half; one narrow row; nothing visible
CASES = [
    (2, 49, 768, 12),
    (2, 196, 192, 147),
    (1, 197, 384, 197),
    (130, 5, 48, 2),
    (3, 9, 512, 3),
    (2, 5, 1280, 2),
    (1, 3, 8, 1),
    (2, 4, 48, 0),
]


def make_inputs(B, N, D, K, dtype, device):
    """Tokens, index in a random order, pos, cls and a gradient for a result with cls."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(B, N, D), (N, D), (D,), (B, K + 1, D)]
    tokens, pos, cls, dout = (torch.randn(s, generator=rng) for s in shapes)
    index = torch.stack([torch.randperm(N, generator=rng)[:K] for _ in range(B)])
    vectors = pos.to(device), cls.to(device)  # positions stay fp32 in a bf16 model
    return tokens.to(device, dtype), index.to(device), *vectors, dout.to(device, dtype)


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        *((FP32, form) for form in ("plain", "pos", "cls", "pos and cls")),
        *((BF16, form) for form in ("plain", "pos and cls")),
        (FP16, "pos and cls"),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_definition(case, dtype, form, device):
    tokens, index, pos, cls, dout = make_inputs(*case, dtype, device)
    pos, cls = pos if "pos" in form else None, cls if "cls" in form else None
    dout = dout if "cls" in form else dout[:, 1:]

    def forward_backward(cast):
        inputs = [None if v is None else v.to(cast).requires_grad_() for v in (tokens, pos, cls)]
        out = gather_tokens_reference(inputs[0], index, *inputs[1:])
        learn = [v for v in inputs if v is not None]
        return out.detach(), *torch.autograd.grad(out, learn, dout.to(cast), materialize_grads=True)

    oracle, naive = forward_backward(torch.float64), forward_backward(FP32)
    out = launch_forward(tokens, index, pos, cls)
    needs = True, pos is not None, cls is not None
    grads = [
        g
        for g, need in zip(
            launch_backward(dout, index, tokens.shape[1], cls is not None, needs), needs, strict=True
        )
        if need
    ]
    names = ["out", "dtokens", *(name for name in ("pos", "cls") if name in form)]
    dtypes = [dtype, dtype, FP32, FP32]
    for name, x, cast, true, plain in zip(names, (out, *grads), dtypes, oracle, naive, strict=False):
        assert x.dtype == cast, name
        if x.numel():
            assert_no_worse(name, x, true, plain.to(cast))
    hidden = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device).scatter_(1, index, False)
    assert not grads[0][hidden].any()


def test_what_goes_where():
    tokens = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    index, pos = torch.tensor([[2, 0], [1, 2]]), torch.tensor([[10.0], [20.0], [30.0]])
    assert gather_tokens(tokens, index).tolist() == [[[3.0], [1.0]], [[5.0], [6.0]]]
    out = gather_tokens(tokens, index, pos, torch.tensor([-1.0]))
    assert out.tolist() == [[[-1.0], [33.0], [11.0]], [[-1.0], [25.0], [36.0]]]


@pytest.mark.parametrize("needs", [(1, 1, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)])
def test_only_what_is_needed_is_computed(needs, device):
    tokens, index, pos, cls, dout = make_inputs(70, 5, 192, 2, FP32, device)
    needs = tuple(map(bool, needs))
    everything = launch_backward(dout, index, 5, True, ALL)
    for some, grad, need in zip(launch_backward(dout, index, 5, True, needs), everything, needs, strict=True):
        assert torch.equal(some, grad) if need else not some.any()  # the same bits, or nothing
    inputs = [v.requires_grad_(need) for v, need in zip((tokens, pos, cls), needs, strict=True)]
    gather_tokens(tokens, index, pos, cls).backward(dout)
    for v, grad, need in zip(inputs, everything, needs, strict=True):
        if need:
            torch.testing.assert_close(v.grad, grad)
        else:
            assert v.grad is None


def test_strides_do_not_matter(device):
    tokens, index, pos, cls, _ = make_inputs(4, 9, 48, 3, FP32, device)
    expected = gather_tokens_reference(tokens, index, pos, cls)
    gapped = torch.cat([tokens, tokens], 1)[:, :9], torch.stack([pos, pos], 1)[:, 0]
    turned = tokens.transpose(0, 1).contiguous().transpose(0, 1), index.T.contiguous().T
    for gather in (gather_tokens, launch_forward):
        torch.testing.assert_close(gather(gapped[0], index, gapped[1], cls), expected)
        torch.testing.assert_close(gather(*turned, pos, cls), expected)
    one = torch.ones((), device=device).expand(4, 4, 48)  # what sum() sends back
    for a, b in zip(
        launch_backward(one, turned[1], 9, True, ALL),
        launch_backward(one.contiguous(), index, 9, True, ALL),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_no_samples_and_no_tokens(device):
    tokens, index, pos, cls, dout = make_inputs(2, 5, 48, 3, FP32, device)
    for gather in (gather_tokens, launch_forward):
        assert gather(tokens[:0], index[:0], pos, cls).shape == (0, 4, 48)
        torch.testing.assert_close(gather(tokens, index[:, :0], pos, cls), cls.expand(2, 1, 48))
        assert gather(tokens, index[:, :0], pos, None).shape == (2, 0, 48)
        assert gather(tokens[:, :0], index[:, :0], pos[:0], None).shape == (2, 0, 48)
    grads = launch_backward(dout[:0], index[:0], 5, True, ALL)
    assert [g.shape for g in grads] == [(0, 5, 48), (5, 48), (48,)]
    assert not any(g.any() for g in grads)
    leaves = [v.requires_grad_() for v in (tokens, pos)]
    gather_tokens(tokens, index[:, :0], pos).sum().backward()
    assert not any(v.grad.any() for v in leaves)


def test_op_is_registered_right(device):
    tokens, index, pos, cls, dout = make_inputs(3, 5, 48, 2, FP32, device)
    for needs in (ALL, (False, True, False), (True, False, True)):
        torch.library.opcheck(
            torch.ops.fastmim.gather_tokens_backward.default, (dout, index, 5, True, *needs)
        )
    leaves = [v.requires_grad_() for v in (tokens, pos, cls)]
    torch.library.opcheck(torch.ops.fastmim.gather_tokens.default, (leaves[0], index, *leaves[1:]))
    torch.library.opcheck(torch.ops.fastmim.gather_tokens.default, (leaves[0], index, None, None))


@pytest.mark.parametrize("form", ["plain", "pos and cls"])
@pytest.mark.parametrize("compiled", [False, True])
def test_public_op_matches_reference_and_compiles_to_one_graph(compiled, form, device):
    tokens, index, *vectors, _ = make_inputs(3, 5, 48, 2, FP32, device)
    step = torch.compile(gather_tokens, fullgraph=True) if compiled else gather_tokens
    results = []
    for gather in (step, gather_tokens_reference):  # never the op against itself
        t, *rest = (v.clone().requires_grad_() for v in (tokens, *(vectors if form != "plain" else ())))
        loss = gather(t, index, *rest).square().mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, (t, *rest))))
    torch.testing.assert_close(results[0], results[1])


def test_gradients_come_in_the_dtype_of_their_input(device):
    tokens, index, pos, cls, dout = make_inputs(3, 5, 48, 2, BF16, device)
    leaves = [v.requires_grad_() for v in (tokens, pos, cls.half())]
    out = gather_tokens(leaves[0], index, *leaves[1:])
    assert [v.dtype for v in torch.autograd.grad(out, leaves, dout)] == [BF16, FP32, FP16]
    with torch.no_grad():
        assert gather_tokens(leaves[0], index, None, cls).dtype == BF16


def test_rejects_what_it_cannot_do(device):
    tokens, index, pos, cls, _ = make_inputs(3, 5, 48, 2, FP32, device)
    with pytest.raises(ValueError, match="want tokens"):
        gather_tokens(tokens[0], index)
    with pytest.raises(ValueError, match="want tokens"):
        gather_tokens(tokens, index.int())
    with pytest.raises(ValueError, match="want index"):
        gather_tokens(tokens, index[:2])
    with pytest.raises(ValueError, match="want index"):
        gather_tokens(tokens, index.repeat(1, 3))
    with pytest.raises(ValueError, match="want pos"):
        gather_tokens(tokens, index, pos[:-1])
    with pytest.raises(ValueError, match="want cls"):
        gather_tokens(tokens, index, pos, cls[None])
    with pytest.raises(ValueError, match="want fp32"):
        gather_tokens(tokens, index, pos.double())
    with pytest.raises(ValueError, match="one device"):
        gather_tokens(tokens, index, pos.to("meta"))
    with pytest.raises(ValueError, match="contiguous"):
        gather_tokens(tokens.mT.contiguous().mT, index)


@pytest.mark.parametrize(
    ("bad", "message"), [(-1, "want token indices"), (5, "want token"), (1, "at most once")]
)
def test_a_wrong_index_is_found_on_the_cpu(bad, message):
    tokens, index, *_ = make_inputs(3, 5, 48, 3, FP32, "cpu")
    index[1] = torch.tensor([1, 3, bad])
    with pytest.raises(ValueError, match=message):
        gather_tokens(tokens, index)
