"""restore_tokens: the kernel against the fp64 definition, then the op against PyTorch's checks."""

import pytest
import torch
from fastmim_kernels import restore_tokens
from fastmim_kernels.restore_tokens import launch_backward, launch_forward, restore_tokens_reference
from fastmim_kernels.testing import assert_no_worse

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# B, N, D, tokens per sequence: MAE's decoder on a quarter of its patches; 192 and 768 fill no power of two;
# 130 samples are three shares of the backward, the last not full; one narrow sequence; 600 is two blocks wide
CASES = [(3, 50, 512, 13), (2, 37, 768, 9), (130, 5, 192, 2), (1, 3, 8, 1), (9, 2, 600, 2)]


def make_inputs(B, N, D, K, dtype, device):
    """Rows in a random order, a quarter of which nobody asks for."""
    rng = torch.Generator().manual_seed(0)
    R = B * K + B * K // 4
    tokens, mask, pos, dout = (torch.randn(*s, generator=rng) for s in [(R, D), (D,), (N, D), (B, N, D)])
    source = torch.full((B, N), -1)
    for b, rows in enumerate(torch.randperm(R, generator=rng)[: B * K].view(B, K)):
        source[b, torch.randperm(N, generator=rng)[:K]] = rows
    vectors = mask.to(device, dtype), pos.to(device)  # positions stay fp32 in a bf16 model
    return tokens.to(device, dtype), source.to(device), *vectors, dout.to(device, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_definition(case, dtype, device):
    tokens, source, mask, pos, dout = make_inputs(*case, dtype, device)

    def forward_backward(cast):
        t, m, p = (x.to(cast).requires_grad_() for x in (tokens, mask, pos))
        out = restore_tokens_reference(t, source, m, p)
        return out.detach(), *torch.autograd.grad(out, (t, m, p), dout.to(cast))

    oracle, naive = forward_backward(torch.float64), forward_backward(FP32)
    out = launch_forward(tokens, source, mask, pos)
    assert out.dtype == dtype
    assert_no_worse("out", out, oracle[0], naive[0].to(dtype))
    dtokens, dmask, dpos = launch_backward(dout, source, len(tokens), (True, True, True))
    assert dtokens.dtype == dtype
    assert_no_worse("dtokens", dtokens, oracle[1], naive[1].to(dtype))
    assert_no_worse("dmask", dmask, oracle[2], naive[2])
    assert_no_worse("dpos", dpos, oracle[3], naive[3])
    unused = torch.ones(len(tokens), dtype=torch.bool, device=device)
    unused[source[source >= 0]] = False
    assert unused.any() == (len(tokens) > case[0] * case[3])
    assert not dtokens[unused].any()


@pytest.mark.parametrize("needs", [(1, 1, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)])
def test_only_what_is_needed_is_computed(needs, device):
    tokens, source, mask, pos, dout = make_inputs(70, 5, 192, 2, FP32, device)
    needs = tuple(map(bool, needs))
    everything = launch_backward(dout, source, len(tokens), (True, True, True))
    for some, grad, need in zip(
        launch_backward(dout, source, len(tokens), needs), everything, needs, strict=True
    ):
        assert torch.equal(some, grad) if need else not some.any()  # the same bits, or nothing
    inputs = tokens, mask, pos
    for x, need in zip(inputs, needs, strict=True):
        x.requires_grad_(need)
    restore_tokens(tokens, source, mask, pos).backward(dout)
    for x, grad, need in zip(inputs, everything, needs, strict=True):
        if need:
            torch.testing.assert_close(x.grad, grad)
        else:
            assert x.grad is None


def test_two_views_packed_into_one_row_of_tokens(device):
    """50 + 148 tokens of an image lie side by side; both views are restored by one call."""
    B, N, D = 2, 197, 16
    tokens, mask, pos = torch.randn(B * 198, D), torch.randn(D), torch.randn(N, D)
    order = torch.stack([torch.randperm(196) for _ in range(B)]) + 1
    source = torch.full((2 * B, N), -1)
    for b in range(B):
        source[b, 0], source[B + b, 0] = b * 198, b * 198 + 50
        source[b, order[b, :49]] = b * 198 + 1 + torch.arange(49)
        source[B + b, order[b, 49:]] = b * 198 + 51 + torch.arange(147)
    tokens, source, mask, pos = (x.to(device) for x in (tokens, source, mask, pos))
    out = launch_forward(tokens, source, mask, pos) - pos
    torch.testing.assert_close(out[1, order[1, :49]], tokens[199:248])
    torch.testing.assert_close(out[B + 1, order[1, 49:]], tokens[249:396])
    torch.testing.assert_close(out[B, order[0, :49]], mask.expand(49, D))


def test_strides_do_not_matter(device):
    tokens, source, mask, pos, _ = make_inputs(4, 9, 48, 3, FP32, device)
    expected = restore_tokens_reference(tokens, source, mask, pos)
    gapped = [torch.stack([x, x], -2)[..., 0, :] for x in (tokens, pos)]
    transposed = source.T.contiguous().T
    for restore in (restore_tokens, launch_forward):
        torch.testing.assert_close(restore(gapped[0], transposed, mask, gapped[1]), expected)
    one = torch.ones((), device=device).expand(4, 9, 48)  # what sum() sends back
    for a, b in zip(
        launch_backward(one, transposed, len(tokens), (True, True, True)),
        launch_backward(one.contiguous(), source, len(tokens), (True, True, True)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_no_sequences_no_tokens_and_only_tokens(device):
    tokens, source, mask, pos, dout = make_inputs(2, 5, 48, 5, FP32, device)
    assert (source >= 0).all()
    reference = restore_tokens_reference(tokens, source, mask, pos)
    torch.testing.assert_close(launch_forward(tokens, source, mask, pos), reference)
    hidden = torch.full_like(source, -1)
    for restore in (restore_tokens, launch_forward):
        torch.testing.assert_close(restore(tokens[:0], hidden, mask, pos), (mask + pos).expand(2, 5, 48))
        assert restore(tokens, source[:0], mask, pos).shape == (0, 5, 48)
    dtokens, dmask, dpos = launch_backward(dout[:0], source[:0], len(tokens), (True, True, True))
    assert not dtokens.any()
    assert not dmask.any()
    assert not dpos.any()
    assert (dtokens.shape, dmask.shape, dpos.shape) == (tokens.shape, mask.shape, pos.shape)


def test_op_is_registered_right(device):
    tokens, source, mask, pos, dout = make_inputs(3, 5, 48, 2, FP32, device)
    floats = [x.requires_grad_() for x in (tokens, mask, pos)]
    torch.library.opcheck(torch.ops.fastmim.restore_tokens.default, (floats[0], source, *floats[1:]))
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            torch.ops.fastmim.restore_tokens_backward.default, (dout, source, len(tokens), *needs)
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_public_op_matches_reference_and_compiles_to_one_graph(compiled, device):
    tokens, source, mask, pos, _ = make_inputs(3, 5, 48, 2, FP32, device)
    step = torch.compile(restore_tokens, fullgraph=True) if compiled else restore_tokens
    results = []
    for restore in (step, restore_tokens_reference):  # never the op against itself
        t, m = tokens.clone().requires_grad_(), mask.clone().requires_grad_()
        loss = restore(t, source, m, pos).square().mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, (t, m))))
    torch.testing.assert_close(results[0], results[1])


def test_gradients_come_in_the_dtype_of_their_input(device):
    tokens, source, mask, pos, dout = make_inputs(3, 5, 48, 2, BF16, device)
    floats = [x.requires_grad_() for x in (tokens, mask, pos)]
    out = restore_tokens(tokens, source, mask, pos)
    assert [x.dtype for x in torch.autograd.grad(out, floats, dout)] == [BF16, BF16, FP32]


def test_rejects_what_it_cannot_do(device):
    tokens, source, mask, pos, _ = make_inputs(3, 5, 48, 2, FP32, device)
    with pytest.raises(ValueError, match="want tokens"):
        restore_tokens(tokens[None], source, mask, pos)
    with pytest.raises(ValueError, match="want tokens"):
        restore_tokens(tokens, source.int(), mask, pos)
    with pytest.raises(ValueError, match="want mask token"):
        restore_tokens(tokens, source, mask[:-1], pos)
    with pytest.raises(ValueError, match="want mask token"):
        restore_tokens(tokens, source, mask, pos[:-1])
    with pytest.raises(ValueError, match="want fp32"):
        restore_tokens(tokens.double(), source, mask, pos)
    with pytest.raises(ValueError, match="contiguous"):
        restore_tokens(tokens.T.contiguous().T, source, mask, pos)


@pytest.mark.parametrize(
    ("bad", "message"), [(-2, "want sources in"), (7, "want sources in"), (0, "at most once")]
)
def test_a_wrong_source_is_found_on_the_cpu(bad, message):
    tokens, source, mask, pos, _ = make_inputs(3, 5, 48, 2, FP32, "cpu")
    assert len(tokens) == 7
    source[0, 0], source[2, 4] = 0, bad
    source[1] = -1
    with pytest.raises(ValueError, match=message):
        restore_tokens(tokens, source, mask, pos)
