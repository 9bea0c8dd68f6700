"""info_nce: kernels and CPU form against the fp64 definition, then what any InfoNCE must satisfy."""

import math
import sys

import pytest
import torch
from fastmim_kernels import info_nce
from fastmim_kernels.info_nce import cpu_backward, cpu_forward, info_nce_reference
from fastmim_kernels.info_nce_triton import launch_backward_keys, launch_forward
from fastmim_kernels.testing import assert_no_worse
from torch.profiler import ProfilerActivity, profile

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# B, G, N, D: the last of three ranks; 70 and 150 are no whole tiles of rows and keys, 100 no whole chunk;
# ViT-B's 768 is twelve; one query whose key is alone in the second tile; one without a negative; 1000 leaves
# its last chunk part empty and takes another tile; 256 is the width of CMAE's heads
CASES = [
    (7, 21, 3, 48),
    (70, 150, 2, 100),
    (33, 40, 1, 768),
    (1, 33, 2, 16),
    (1, 1, 2, 64),
    (18, 20, 1, 1000),
]
CASES += [(65, 130, 2, 256)]


def make_inputs(B, G, N, D, dtype, device):
    """Queries that lie near their keys, so that the positive of some rows is nearly all of the softmax."""
    rng = torch.Generator().manual_seed(0)
    k, noise, dloss = (torch.randn(*s, generator=rng) for s in [(G, N, D), (B, N, D), (B, N)])
    offset = G - B  # the last rank
    q = k[offset:] * torch.linspace(0, 2, B)[:, None, None] + noise
    return q.to(device, dtype), k.to(device, dtype), dloss.to(device), offset


def definition(q, k, dloss, cast, *settings):
    q, k = (x.detach().to(cast).requires_grad_() for x in (q, k))
    loss, lse = info_nce_reference(q, k, *settings)
    return loss.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k), dloss.to(cast))


def triton_form(q, k, dloss, *settings):
    loss, lse, rate, pull, norm = launch_forward(q, k, *settings, True)
    assert pull.dtype == q.dtype
    dq = (pull * (rate * dloss)[..., None]).to(q.dtype)
    return loss, lse, dq, launch_backward_keys(dloss, q, k, lse, rate, norm, *settings)


def cpu_form(q, k, dloss, *settings):
    loss, lse = cpu_forward(q, k, *settings)
    return loss, lse, *cpu_backward(dloss, q, k, lse, *settings, True, True)


def slack(actual):
    """Tensor cores cut off what they add, and do not round: on an H100 cosines stray by 3e-6, all one way."""
    return 12.0 if actual.is_cuda else 2.0


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", [triton_form, cpu_form])
def test_matches_definition(form, case, dtype, normalize, device, monkeypatch):
    if (
        form is cpu_form
    ):  # blocks as small as the cases: several positions, several blocks of rows, the last short
        module = sys.modules["fastmim_kernels.info_nce"]
        monkeypatch.setattr(module, "CHUNK", 2048)
        monkeypatch.setattr(module, "MIN_ROWS", 16)
    q, k, dloss, offset = make_inputs(*case, dtype, device if form is triton_form else "cpu")
    dloss = dloss.to(q.device)
    settings = 0.2 if normalize else 8.0, offset, normalize
    oracle = definition(q, k, dloss, torch.float64, *settings)
    naive = definition(q, k, dloss, FP32, *settings)
    for name, a, o, n in zip(
        ("loss", "lse", "dq", "dk"), form(q, k, dloss, *settings), oracle, naive, strict=True
    ):
        want = dtype if name in ("dq", "dk") else FP32
        assert a.dtype == want, name
        assert_no_worse(name, a, o, n.to(want), slack(a))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("case", [(7, 21, 3, 48), (70, 150, 2, 100), (33, 40, 1, 768)])
@pytest.mark.parametrize("form", [triton_form, cpu_form])
def test_labels_name_the_positive(form, case, dtype, device, monkeypatch):
    """Any key, one of several queries too, whose place is in another tile or block than the query's own."""
    if form is cpu_form:
        module = sys.modules["fastmim_kernels.info_nce"]
        monkeypatch.setattr(module, "CHUNK", 2048)
        monkeypatch.setattr(module, "MIN_ROWS", 16)
    q, k, dloss, _ = make_inputs(*case, dtype, device if form is triton_form else "cpu")
    dloss, (B, G, N, _) = dloss.to(q.device), case
    labels = torch.randint(0, G, (B, N), generator=torch.Generator().manual_seed(1))
    labels[0], labels[-1], labels[B // 2] = G - 1, G - 1, 0
    labels = labels.T.contiguous().T.to(q.device)  # strides of another order
    settings = 0.2, 0, True, labels
    oracle = definition(q, k, dloss, torch.float64, *settings)
    naive = definition(q, k, dloss, FP32, *settings)
    pieces = zip(("loss", "lse", "dq", "dk"), form_with_labels(form)(q, k, dloss, *settings), strict=True)
    for (name, a), o, n in zip(pieces, oracle, naive, strict=True):
        assert_no_worse(name, a, o, n.to(dtype if name in ("dq", "dk") else FP32), slack(a))


def form_with_labels(form):
    """The same, with labels behind the flags that stand between."""

    def triton_labeled(q, k, dloss, temperature, offset, normalize, labels):
        settings = temperature, offset, normalize
        loss, lse, rate, pull, norm = launch_forward(q, k, *settings, True, labels)
        dk = launch_backward_keys(dloss, q, k, lse, rate, norm, *settings, labels)
        return loss, lse, (pull * (rate * dloss)[..., None]).to(q.dtype), dk

    def cpu_labeled(q, k, dloss, temperature, offset, normalize, labels):
        settings = temperature, offset, normalize
        loss, lse = cpu_forward(q, k, *settings, labels)
        return loss, lse, *cpu_backward(dloss, q, k, lse, *settings, True, True, labels)

    return triton_labeled if form is triton_form else cpu_labeled


def test_two_queries_may_share_a_positive_and_every_key_stays_a_candidate():
    """What CutMix asks: of two images whose patch is the second's, both have its key; by hand."""
    q, k = torch.tensor([[0.6, 0.8], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss, lse = info_nce(q, k, temperature=0.5, labels=torch.tensor([1, 1]))
    expected = [math.log1p(math.exp((0.6 - 0.8) / 0.5)), math.log1p(math.exp(2.0))]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)
    assert lse.tolist() == pytest.approx([expected[0] + 1.6, expected[1]], abs=1e-6)


def test_the_formula_in_plain_numbers():
    q = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    k = torch.tensor([[0.0, 7.0], [2.0, 0.0], [1.0, 1.0]])  # cosines 0, 1, r and 1, 0, r with r = 1 / sqrt(2)
    e = [math.exp(x / 0.5) for x in (0, 1, 2**-0.5)]
    for offset, right in ((0, e[0]), (1, e[1])):
        loss, lse = info_nce(q[:1], k, temperature=0.5, label_offset=offset)
        assert lse.item() == pytest.approx(math.log(sum(e)), abs=1e-6)
        assert loss.item() == pytest.approx(math.log(sum(e) / right), abs=1e-6)
    plain = info_nce(q[1:], k, temperature=2.0, normalize=False)  # logits 7/4, 0, 1/4
    assert plain[1].item() == pytest.approx(math.log(math.exp(1.75) + 1 + math.exp(0.25)), abs=1e-6)


def test_a_small_loss_and_its_gradient_keep_their_digits(device):
    """lse - positive would leave 0 of this loss: fp32 steps by 1e-6 at 14."""
    q = torch.eye(8, 16)[:, None].to(device)
    loss, _, rate, pull, _ = launch_forward(q, q, 0.07, 0, True, True)
    exact = math.log1p(7 * math.exp(-1 / 0.07))
    assert loss[0, 0].item() == pytest.approx(exact, rel=1e-4)
    d = pull * rate[..., None]  # toward each negative p- / 7 / tau
    assert d[0, 0, 1].item() == pytest.approx(-math.expm1(-exact) / 7 / 0.07, rel=1e-4)
    assert abs(d[0, 0, 0].item()) < 1e-6 * d[0, 0, 1].item()  # nothing along the query


@pytest.mark.parametrize("form", [triton_form, cpu_form])
def test_rows_of_zeros_and_rows_of_any_size(form, device):
    q, k, dloss, _ = make_inputs(4, 6, 2, 16, FP32, device if form is triton_form else "cpu")
    q[1], k[3], k[4] = 0, 0, k[4] * 1e-6
    q[2], k[5] = q[2] * 1e-13, k[5] * 1e6  # below eps: the divisor is eps and no longer the norm
    settings = 0.2, 1, True
    oracle = definition(q, k, dloss, torch.float64, *settings)
    ours = form(q, k, dloss.to(q.device), *settings)
    torch.testing.assert_close(ours[0], oracle[0].float())
    assert ours[0][1].tolist() == pytest.approx([math.log(6)] * 2)
    for a, o in zip(ours[2:], oracle[2:], strict=True):
        for row, expected in zip(a, o.float(), strict=True):  # each beside its own size
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_key_of_zeros_leaves_the_others_their_weight(device):
    """In fp16 weights of 1e-12 would be none; it has no direction, and its own weight is exp(0)."""
    q, k, dloss, _ = make_inputs(4, 6, 2, 16, FP16, device)
    k[5] = 0
    settings = 0.2, 1, True
    oracle = definition(q, k, dloss, torch.float64, *settings)
    naive = definition(q, k, dloss, FP32, *settings)
    for name, a, o, n in zip(
        ("loss", "lse", "dq"), triton_form(q, k, dloss, *settings), oracle, naive, strict=False
    ):
        assert_no_worse(name, a, o, n.to(a.dtype), slack(a))


def test_half_precision_keeps_tiny_gradients_and_large_rows(device):
    q, k, dloss, offset = make_inputs(5, 40, 2, 32, FP16, device)
    q, k, dloss = q * 100, k * 1000, dloss * 1e-3
    settings = 0.2, offset, True
    oracle = definition(q, k, dloss, torch.float64, *settings)
    loss, lse, rate, pull, norm = launch_forward(q, k, *settings, True)
    dq = pull.double() * (rate * dloss)[..., None]
    assert_no_worse("loss", loss, oracle[0], definition(q, k, dloss, FP32, *settings)[0], slack(loss))
    assert (dq - oracle[2]).abs().max() <= 2e-3 * oracle[2].abs().max()
    dk = launch_backward_keys(dloss * 1e6, q, k, lse, rate, norm, *settings).double() / 1e6
    assert (dk - oracle[3]).abs().max() <= 2e-3 * oracle[3].abs().max()


@pytest.mark.parametrize("form", [triton_form, cpu_form])
def test_strides_do_not_matter(form, device):
    q, k, dloss, offset = make_inputs(6, 9, 3, 32, FP32, device if form is triton_form else "cpu")
    dloss = dloss.to(q.device)
    expected = form(q, k, dloss, 0.2, offset, True)
    tokens = torch.cat([q[:, :1], q, q], 1)[:, 1:4]  # the class token cut off
    swapped = k.transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(form(tokens, swapped, dloss.T.contiguous().T, 0.2, offset, True), expected, strict=True):
        torch.testing.assert_close(a, b)
    one = torch.ones((), device=q.device).expand(6, 3)  # what sum() sends back
    for a, b in zip(
        form(q, k, one, 0.2, offset, True), form(q, k, one.clone(), 0.2, offset, True), strict=True
    ):
        assert torch.equal(a, b)


def test_no_queries_no_positions(device):
    q, k, dloss, _ = make_inputs(4, 6, 2, 16, FP32, device)
    for form in (triton_form, cpu_form) if device == "cpu" else (triton_form,):
        loss, lse, dq, dk = form(q[:0], k, dloss[:0], 0.2, 0, True)
        assert (loss.shape, lse.shape, dq.shape) == ((0, 2), (0, 2), (0, 2, 16))
        assert dk.shape == k.shape and not dk.any()
        assert [x.numel() for x in form(q[:, :0], k[:, :0], dloss[:, :0], 0.2, 0, True)] == [0] * 4
    loss, lse = info_nce(q[:0].requires_grad_(), k, temperature=0.2)
    loss.sum().backward()
    assert loss.shape == lse.shape == (0, 2)
    assert info_nce(q[:0, 0], k[:0, 0], temperature=0.2)[0].shape == (0,)


# --- the op -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True), (False, False)])
def test_only_the_gradients_that_are_asked_for(needs, device):
    q, k, dloss, offset = make_inputs(5, 9, 2, 32, FP32, device)
    expected = definition(q, k, dloss, FP32, 0.2, offset, True)
    q.requires_grad_(needs[0])
    k.requires_grad_(needs[1])
    loss, lse = info_nce(q, k, temperature=0.2, label_offset=offset)
    assert loss.requires_grad == any(needs) and not lse.requires_grad
    torch.testing.assert_close((loss, lse), expected[:2])
    if any(needs):
        loss.backward(dloss)
    for x, need, grad in zip((q, k), needs, expected[2:], strict=True):
        if need:
            torch.testing.assert_close(x.grad, grad)
        else:
            assert x.grad is None


@pytest.mark.parametrize("normalize", [True, False])
def test_op_is_registered_right(normalize, device):
    q, k, dloss, offset = make_inputs(5, 9, 2, 32, FP32, device)
    settings = 0.2, offset, normalize
    op, back = torch.ops.fastmim.info_nce.default, torch.ops.fastmim.info_nce_backward.default
    kept = op(q, k, *settings, True)[1:]
    for needs in ((True, False), (False, True), (True, True)):
        torch.library.opcheck(back, (dloss, q, k, *kept, *settings, *needs))
    torch.library.opcheck(op, (q, k, *settings, False))
    torch.library.opcheck(op, (q.requires_grad_(), k, *settings, True))
    torch.library.opcheck(op, (q, k.requires_grad_(), *settings, True))
    labels = torch.arange(10, device=device).view(5, 2) % 9
    torch.library.opcheck(op, (q, k, 0.2, 0, normalize, True, labels))
    torch.library.opcheck(back, (dloss, q.detach(), k.detach(), *kept, 0.2, 0, normalize, True, True, labels))


@pytest.mark.parametrize("compiled", [False, True])
def test_public_op_matches_reference_and_compiles_to_one_graph(compiled, device):
    def both(loss_of, q, k):
        """A teacher's keys get no gradient, and then they do, over all tokens."""
        one = loss_of(q, k.detach(), 0.2, 4)[0].mean()
        loss, lse = loss_of(q.flatten(0, 1), k.flatten(0, 1), 0.5, 3)
        named = loss_of(q, k, 0.3, 0, labels=labels)[0].mean()
        return one + named + loss.square().sum(), lse.detach()

    def fused(q, k, temperature, offset, labels=None):
        return info_nce(q, k, temperature=temperature, label_offset=offset, labels=labels)

    def step(q, k):
        return both(fused, q, k)

    q, k, _, _ = make_inputs(5, 9, 2, 32, FP32, device)
    labels = torch.arange(10, device=device).view(5, 2) % 9
    results = []
    run = torch.compile(step, fullgraph=True) if compiled else step
    for loss_of in (run, lambda q, k: both(info_nce_reference, q, k)):  # never the op against itself
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        loss, lse = loss_of(*leaves)
        results.append((loss.detach(), lse, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[0], results[1])


def test_a_gradient_may_be_asked_for_twice(device):
    q, k, dloss, offset = make_inputs(5, 9, 2, 32, BF16, device)
    loss, _ = info_nce(q.requires_grad_(), k, temperature=0.2, label_offset=offset)
    first, second = (torch.autograd.grad(loss, q, dloss, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# --- what any InfoNCE must satisfy --------------------------------------------------------------------


def losses_of(device, q, k, offset=0, temperature=0.2):
    """By the public op, and on the CPU by the interpreted kernel as well."""
    yield info_nce(q, k, temperature=temperature, label_offset=offset)
    if device == "cpu":
        yield launch_forward(q, k, temperature, offset, True, False)[:2]


def test_invariant_to_size_and_to_the_order_of_the_batch(device):
    q, k, _, _ = make_inputs(12, 12, 3, 32, FP32, device)
    sizes = torch.logspace(-3, 3, 12, device=device)[:, None, None]
    order = torch.randperm(12, device=device)
    plain = losses_of(device, q, k)
    scaled = losses_of(device, q * sizes, k * sizes.flip(0))
    shuffled = losses_of(device, q[order], k[order])
    for a, b, c in zip(plain, scaled, shuffled, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, tuple(x[order] for x in a))


def test_chance_is_the_log_of_the_candidates(device):
    q, k, _, _ = make_inputs(64, 64, 4, 1024, FP32, device)
    q = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    for loss, _ in losses_of(device, q, k, temperature=1.0):  # a cosine of 1/32 at most times a few
        assert loss.mean().item() == pytest.approx(math.log(64), abs=0.01)


def test_two_ranks_see_what_one_sees(device):
    q, k, _, _ = make_inputs(12, 12, 3, 32, FP32, device)
    for whole, *halves in zip(
        losses_of(device, q, k), losses_of(device, q[:6], k), losses_of(device, q[6:], k, 6), strict=True
    ):
        for name, a, b in zip(("loss", "lse"), whole, zip(*halves, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(b), a, msg=name)


def test_positions_alone_solve_an_image_and_never_a_batch(device):
    """Features that know their position and no content: what position embeddings give for nothing."""
    N, G, tau = 196, 8, 0.2
    simplex = torch.eye(N) - 1 / N  # the farthest that 196 directions can be apart
    floor = math.log1p((N - 1) * math.exp(-N / (N - 1) / tau))
    assert floor == pytest.approx(0.82, abs=0.005)
    tokens_GND = simplex.to(device).expand(G, N, N)
    image_N2D = tokens_GND[:2].transpose(0, 1)
    for loss, _ in losses_of(device, image_N2D, image_N2D):
        expected = torch.full_like(loss, floor)  # the positions of one image
        torch.testing.assert_close(loss, expected, rtol=0, atol=5e-5 if loss.is_cuda else 1e-5)
    for loss, _ in losses_of(device, tokens_GND[:, :9], tokens_GND[:, :9]):
        chance = torch.full_like(loss, math.log(G))  # one position of the batch
        torch.testing.assert_close(loss, chance, rtol=0, atol=5e-5 if loss.is_cuda else 1e-5)
    loss, _ = info_nce(tokens_GND[0], tokens_GND[0], temperature=tau)  # the 2-D form says the same
    torch.testing.assert_close(
        loss, torch.full_like(loss, floor), rtol=0, atol=5e-5 if loss.is_cuda else 1e-5
    )


def test_log_sum_exp_less_the_positive_is_the_loss(device):
    q, k, _, offset = make_inputs(7, 20, 3, 48, FP32, device)
    positive = torch.nn.functional.cosine_similarity(q, k[offset:], dim=-1) / 0.2
    for loss, lse in losses_of(device, q, k, offset):
        torch.testing.assert_close(lse - positive, loss)


# --- memory -------------------------------------------------------------------------------------------


def peak_bytes(run) -> int:
    """The most that was allocated at once during `run`, over what there was before."""
    live = peak = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del result
    return peak


def test_the_logits_are_never_there():
    q, k = torch.randn(1024, 12, 16).requires_grad_(), torch.randn(1024, 12, 16)

    def step(loss_of):
        return lambda: torch.autograd.grad(loss_of(q, k)[0].mean(), q)

    logits = 4 * 12 * 1024 * 1024
    eager = peak_bytes(step(lambda q, k: info_nce_reference(q, k, 0.2)))
    assert eager > logits  # the profiler does see them
    assert peak_bytes(step(lambda q, k: info_nce(q, k, temperature=0.2))) < logits / 10


def test_a_launch_allocates_what_it_says(monkeypatch, device):
    sizes, real = [], torch.empty

    def empty(*size, **kwargs):
        out = real(*size, **kwargs)
        sizes.append(out.numel() * out.element_size())
        return out

    q, k, dloss, _ = make_inputs(40, 40, 2, 16, BF16, device)
    monkeypatch.setattr(torch, "empty", empty)
    _, lse, rate, _, norm = launch_forward(q, k, 0.2, 0, True, True)
    assert sum(sizes) == 40 * 2 * (2 * 16 + 4 * 4)  # pull; loss, lse, rate and the norms of the keys
    launch_backward_keys(dloss, q, k, lse, rate, norm, 0.2, 0, True)
    assert sum(sizes) == 40 * 2 * (2 * 2 * 16 + 5 * 4)  # dk and the norms of the queries


def test_rejects_what_it_cannot_do(device):
    q, k, _, _ = make_inputs(4, 6, 2, 16, FP32, device)
    labels = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 0]], device=device)
    bad = [
        ("want \\[B, N, D\\]", (q, k[:, :1]), {}),
        ("want \\[B, N, D\\]", (q, k[..., :8]), {}),
        ("want \\[B, N, D\\]", (q[:, 0], k), {}),
        ("want \\[B, N, D\\]", (q[None], k[None]), {}),
        ("want \\[B, N, D\\]", (q[0, 0], k[0, 0]), {}),
        ("want one dtype", (q.double(), k.double()), {}),
        ("want one dtype", (q.bfloat16(), k), {}),
        ("want one device", (q, k.to("meta")), {}),
        ("want 1 <= D", (q[..., :0], k[..., :0]), {}),
        ("want 1 <= D", (q.repeat(1, 1, 65), k.repeat(1, 1, 65)), {}),
        ("contiguous", (q.transpose(1, 2).contiguous().transpose(1, 2), k), {}),
        ("want a positive temperature, got 0", (q, k), {"temperature": 0.0}),
        ("want a positive temperature, got -1", (q, k), {"temperature": -1.0}),
        ("want a positive temperature, got nan", (q, k), {"temperature": float("nan")}),
        ("want a key for each of 4 queries from row 3 on, got 6", (q, k), {"label_offset": 3}),
        ("from row -1 on", (q, k), {"label_offset": -1}),
        ("want a key for each of 6 queries", (k, q), {}),
        (
            "want int64 labels \\(4, 2\\)",
            (q, k),
            {"labels": torch.zeros(4, dtype=torch.int64, device=device)},
        ),
        ("want int64 labels", (q, k), {"labels": torch.zeros(4, 2, dtype=torch.int32, device=device)}),
        ("labels or a label_offset", (q, k), {"labels": labels, "label_offset": 1}),
        *([("want labels in \\[0, 6\\), got 0 .. 6", (q, k), {"labels": labels})] if device == "cpu" else []),
    ]
    for message, tensors, settings in bad:
        with pytest.raises(ValueError, match=message):
            info_nce(*tensors, **{"temperature": 0.2, **settings})
    assert sys.modules["fastmim_kernels.info_nce"].MAX_D == 1024
