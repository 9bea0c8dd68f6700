"""norm_pix_loss: the kernel against the fp64 definition, then the op against PyTorch's checks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastmim_kernels import norm_pix_loss
from fastmim_kernels.norm_pix_loss import DISTANCES, launch_backward, launch_forward, norm_pix_loss_reference
from fastmim_kernels.testing import assert_no_worse

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# 48 is a 4x4 patch, 43 of them are no whole number of programs; 588 = 14x14x3 (ViT-H/14); 768 = 16x16x3 fills
# no power of two, 147 are scored; 1024 is one; 64 = a gray 8x8 patch; one patch; 8192 is the most
SHAPES = [(43, 48), (37, 588), (147, 768), (3, 1024), (5, 64), (1, 256), (2, 8192)]


def make_inputs(M, D, dtype, device):
    rng = torch.Generator().manual_seed(0)
    pred, target, dloss = (torch.randn(*s, generator=rng) for s in [(M, D), (M, D), (M,)])
    target[0] = 0.5  # a flat patch: variance 0, only eps keeps it finite
    return pred.to(device, dtype), target.to(device, dtype), dloss.to(device)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("M", "D"), SHAPES)
def test_kernel_matches_definition(M, D, dtype, normalize, device):
    pred, target, dloss = make_inputs(M, D, dtype, device)

    def forward_backward(cast):
        p, t = pred.to(cast).requires_grad_(), target.to(cast).requires_grad_()
        loss = norm_pix_loss_reference(p, t, normalize)
        return loss.detach(), *torch.autograd.grad(loss, (p, t), dloss.to(cast))

    oracle, naive = forward_backward(torch.float64), forward_backward(FP32)
    assert_no_worse("loss", launch_forward(pred, target, normalize, 1e-6), oracle[0], naive[0])
    dpred, dtarget = launch_backward(dloss, pred, target, normalize, 1e-6, (True, not normalize))
    assert dpred.dtype == dtype
    assert_no_worse("dpred", dpred, oracle[1], naive[1].to(dtype))
    if not normalize:
        assert dtarget.dtype == dtype
        assert_no_worse("dtarget", dtarget, oracle[2], naive[2].to(dtype))


@pytest.mark.parametrize("beta", [0.3, 2.0])  # data2vec's is 2
@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("normalize", [True, False])
def test_other_distances_match_their_definition(normalize, dtype, distance, beta, device):
    pred, target, dloss = make_inputs(9, 588, dtype, device)
    target[1] = pred[1]  # no distance: a slope of zero, on both sides

    def forward_backward(cast):
        p, t = pred.to(cast).requires_grad_(), target.to(cast).requires_grad_()
        loss = norm_pix_loss_reference(p, t, normalize, 1e-6, DISTANCES[distance], beta)
        return loss.detach(), *torch.autograd.grad(loss, (p, t), dloss.to(cast))

    oracle, naive = forward_backward(torch.float64), forward_backward(FP32)
    form = distance, beta
    assert_no_worse("loss", launch_forward(pred, target, normalize, 1e-6, *form), oracle[0], naive[0])
    grads = launch_backward(dloss, pred, target, normalize, 1e-6, (True, not normalize), *form)
    assert_no_worse("dpred", grads[0], oracle[1], naive[1].to(dtype))
    if not normalize:
        assert_no_worse("dtarget", grads[1], oracle[2], naive[2].to(dtype))
        assert not grads[0][1].any() and not grads[1][1].any()


def test_the_distances_are_those_of_torch(device):
    pred, target, _ = make_inputs(9, 48, FP32, device)
    for distance, f in (("l1", F.l1_loss), ("smooth_l1", partial(F.smooth_l1_loss, beta=2.0))):
        p = [pred.clone().requires_grad_() for _ in range(2)]
        loss = norm_pix_loss(p[0], target, normalize=False, distance=distance, beta=2.0).mean()
        expected = f(p[1], target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, y)[0] for x, y in zip((loss, expected), p, strict=True))
        )


def test_the_formula_in_plain_numbers():
    pred, target = (
        torch.tensor([[0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 2.0, 3.0]]),
    )  # variance 1 unbiased, 2/3 biased
    assert norm_pix_loss(pred, target).item() == pytest.approx(2 / 3, abs=1e-5)
    assert norm_pix_loss(pred, target, normalize=False).item() == pytest.approx(14 / 3, abs=1e-5)
    assert norm_pix_loss(pred, target, eps=3.0).item() == pytest.approx(2 / 3 / 4, abs=1e-5)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_the_distance_of_two_predictions_teaches_whom_it_should(needs, device):
    a, b, dloss = make_inputs(9, 48, FP32, device)
    b = b.to(BF16)  # two dtypes: each gradient comes in its own
    grads = launch_backward(dloss, a, b, False, 1e-6, needs)
    assert [len(g) for g in grads] == [9 * need for need in needs]
    a, b = (x.requires_grad_(need) for x, need in zip((a, b), needs, strict=True))
    norm_pix_loss(a, b, normalize=False).backward(dloss)
    expected = 2 / 48 * dloss[:, None] * (a.detach() - b.detach().float())
    for x, sign, need, grad in zip((a, b), (1, -1), needs, grads, strict=True):
        if need:
            assert x.grad.dtype == x.dtype
            torch.testing.assert_close(x.grad, (sign * expected).to(x.dtype))
            torch.testing.assert_close(grad, (sign * expected).to(x.dtype))
        else:
            assert x.grad is None


@pytest.mark.filterwarnings("ignore:var_mean")  # of no values
def test_strided_rows_and_no_rows(device):
    pred, target, dloss = make_inputs(8, 768, FP32, device)
    rows = pred[::2], torch.cat([target, target], 1)[1::2, :768]  # two strides, neither of them D
    for normalize in (True, False):
        torch.testing.assert_close(
            launch_forward(*rows, normalize, 1e-6), norm_pix_loss_reference(*rows, normalize)
        )
    spread = torch.stack([dloss, dloss], 1)[::2, 0]  # a gradient with gaps
    torch.testing.assert_close(
        launch_backward(spread, *rows, True, 1e-6, (True, False))[0],
        launch_backward(dloss[::2].contiguous(), *(x.contiguous() for x in rows), True, 1e-6, (True, False))[
            0
        ],
    )
    assert launch_forward(pred[:0], target[:0], True, 1e-6).shape == (0,)
    assert launch_backward(dloss[:0], pred[:0], target[:0], True, 1e-6, (True, False))[0].shape == (0, 768)
    assert norm_pix_loss(pred[:0], target[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_op_is_registered_right(dtype, device):
    pred, target, dloss = make_inputs(5, 48, dtype, device)
    op, op_backward = (
        torch.ops.fastmim.norm_pix_loss.default,
        torch.ops.fastmim.norm_pix_loss_backward.default,
    )
    for needs in ((True, False), (True, True)):
        torch.library.opcheck(op_backward, (dloss, pred, target, False, 1e-6, *needs))
    torch.library.opcheck(op, (pred.requires_grad_(), target, True, 1e-6))
    torch.library.opcheck(op, (pred, target.requires_grad_(), False, 1e-6))


@pytest.mark.parametrize("compiled", [False, True])
def test_public_op_matches_reference_and_compiles_to_one_graph(compiled, device):
    def both(loss_of, p, t):
        return loss_of(p, t.detach()).mean() + 2 * loss_of(p, t, normalize=False).mean()

    def fused(p, t):
        return both(norm_pix_loss, p, t)

    pred, target, _ = make_inputs(5, 48, FP32, device)
    step = torch.compile(fused, fullgraph=True) if compiled else fused
    results = []
    for loss_of in (step, lambda p, t: both(norm_pix_loss_reference, p, t)):  # never the op against itself
        p, t = pred.clone().requires_grad_(), target.clone().requires_grad_()
        loss = loss_of(p, t)
        results.append((loss.detach(), *torch.autograd.grad(loss, (p, t))))
    torch.testing.assert_close(results[0], results[1])


def test_rejects_what_it_cannot_do(device):
    pred, target, _ = make_inputs(4, 48, FP32, device)
    with pytest.raises(ValueError, match="want two"):
        norm_pix_loss(pred, target[:3])
    with pytest.raises(ValueError, match="contiguous"):
        norm_pix_loss(pred.T.contiguous().T, target)
    with pytest.raises(ValueError, match="want 2 <= D"):
        norm_pix_loss(pred[:, :1], target[:, :1])
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        norm_pix_loss(pred.double(), target)
    with pytest.raises(ValueError, match="want a distance of"):
        norm_pix_loss(pred, target, distance="huber")
    for beta in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="want 0 < beta"):
            norm_pix_loss(pred, target, distance="smooth_l1", beta=beta)
    with pytest.raises(ValueError, match="gets no gradient"):
        norm_pix_loss(pred, target.requires_grad_())
    with torch.no_grad():
        assert norm_pix_loss(pred, target).isfinite().all()  # nobody asks for one
