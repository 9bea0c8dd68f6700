"""code_loss: three back ends against fp64, and DINO's loop over pairs of crops."""

import math

import pytest
import torch
import torch.nn.functional as F
from fastmim_kernels import code_loss, native
from fastmim_kernels.code_loss import code_loss_reference, cpu_backward, cpu_forward
from fastmim_kernels.code_loss_triton import launch_backward, launch_forward
from fastmim_kernels.testing import assert_no_worse

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
T_S, T_T = 0.1, 0.04
# rows, teachers, codes, pairs: one of each; a block and one code more; codes of no even number; one pair of
# each row, as iBOT has it; more teachers than the C++ keeps; more pairs than fill a power of two
SHAPES = [(1, 1, 1, 1), (6, 4, 1025, 2), (5, 3, 37, 2), (20, 20, 300, 1), (3, 300, 64, 2), (4, 6, 2049, 5)]


def make_inputs(R, U, K, J, dtype, device, size=1.0):
    """Logits as cosines are, in rows of a wider tensor; pairs of which a third are none."""
    rng = torch.Generator().manual_seed(R + K)
    student, teacher = (torch.rand(n, K + 3, generator=rng).mul_(2 * size).sub_(size) for n in (R, U))
    center = 0.1 * torch.randn(K, generator=rng)
    pairs = torch.randint(-1, U, (R, J), generator=rng)
    pairs[torch.rand(R, J, generator=rng) < 0.2] = -1
    pairs[0, 0] = U - 1
    dloss = torch.randn(R, J, generator=rng)
    student, teacher = (x.to(device, dtype)[:, :K] for x in (student, teacher))
    return student, teacher, center.to(device), pairs.to(device), dloss.to(device)


def definition(student, teacher, center, pairs, dloss, cast):
    leaf = student.detach().to(cast).requires_grad_()
    loss, entropy = code_loss_reference(leaf, teacher.to(cast), center.to(cast), pairs, T_S, T_T)
    (grad,) = torch.autograd.grad(loss, leaf, dloss.to(cast))
    return loss.detach(), entropy, grad


def by_parts(forward, backward):
    def run(student, teacher, center, pairs, dloss):
        loss, lse_r, lse_u, entropy = forward(student, teacher, center, pairs, T_S, T_T)
        grad = backward(dloss, student, teacher, center, pairs, lse_r, lse_u, T_S, T_T)
        return loss, entropy, grad

    return run


def by_op(student, teacher, center, pairs, dloss):
    leaf = student.detach().requires_grad_()
    loss, entropy = code_loss(leaf, teacher, center, pairs, student_temperature=T_S, teacher_temperature=T_T)
    (grad,) = torch.autograd.grad(loss, leaf, dloss)
    return loss.detach(), entropy, grad


FORMS = {
    "Triton": by_parts(launch_forward, launch_backward),
    "definition in rows": by_parts(cpu_forward, cpu_backward),
    "op": by_op,  # on the CPU the C++
}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_back_end_matches_the_definition(form, shape, dtype, device):
    if form == "definition in rows":
        device = "cpu"
    if form == "op" and device == "cpu" and not native.ready():
        pytest.skip("no compiler")
    inputs = make_inputs(*shape, dtype, device)
    oracle, naive = definition(*inputs, torch.float64), definition(*inputs, FP32)
    actual = FORMS[form](*inputs)
    for name, a, o, n in zip(("loss", "entropy", "gradient"), actual, oracle, naive, strict=True):
        assert a.shape == o.shape
        if name == "gradient":
            assert a.dtype == dtype and a.is_contiguous()
            n = n.to(dtype)
        if o.abs().max() > 1e-12:
            assert_no_worse(name, a, o, n, 6.0)
        else:
            assert a.abs().max() < 1e-5
    assert not actual[0][inputs[3] < 0].any()


def dino(student, teacher, center, crops):
    """DINO's loss as its loop has it: chunks of crops, each pair of a teacher's crop and another one."""
    p = [F.softmax((t - center) / T_T, dim=-1) for t in teacher.chunk(2)]
    total, terms = 0.0, 0
    for i, probabilities in enumerate(p):
        for j, logits in enumerate((student / T_S).chunk(crops)):
            if i != j:
                total = total + (-probabilities * F.log_softmax(logits, dim=-1)).sum(-1).mean()
                terms += 1
    assert terms == 2 * crops - 2
    return total / terms


@pytest.mark.parametrize("small", [0, 8])
def test_dinos_loss_and_gradient(small, device):
    B, K, S = 3, 500, 2 + small
    student, teacher, center, *_ = make_inputs(S * B, 2 * B, K, 2, FP32, device)
    leaf = student.double().requires_grad_()
    expected = dino(leaf, teacher.double(), center.double(), S)
    expected.backward()
    image = torch.arange(B, device=device)
    crop, of = torch.arange(S, device=device).repeat_interleave(B), image.repeat(S)
    pairs = torch.stack([torch.where(crop == t, -1, t * B + of) for t in range(2)], 1)
    ours = student.detach().requires_grad_()
    losses, _ = code_loss(ours, teacher, center, pairs, student_temperature=T_S, teacher_temperature=T_T)
    loss = losses.sum() / (pairs >= 0).sum()
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), leaf.grad, rtol=1e-4, atol=1e-9)


def test_uniform_student_and_teacher_have_the_loss_of_chance(device):
    K = 4096
    zero = torch.zeros(2, K, device=device)
    pairs = torch.zeros(2, 1, dtype=torch.int64, device=device)
    loss, entropy = code_loss(
        zero, zero, torch.zeros(K, device=device), pairs, student_temperature=T_S, teacher_temperature=T_T
    )
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(K)))
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(K)))


@pytest.mark.parametrize("form", FORMS)
def test_large_logits_stay_finite_and_what_is_not_is_seen(form, device):
    device = "cpu" if form == "definition in rows" else device
    inputs = make_inputs(4, 3, 100, 2, FP32, device, size=1e3)
    assert all(x.isfinite().all() for x in FORMS[form](*inputs))
    for poisoned in (0, 1):
        broken = [x.clone() for x in inputs]
        broken[poisoned][-1 if poisoned else 0, 7] = torch.nan
        loss, _, grad = FORMS[form](*broken)
        assert loss[0, 0].isnan() and grad[0].isnan().any()


def test_opcheck_and_one_graph(device):
    from fastmim_kernels.code_loss import _op

    student, teacher, center, pairs, _ = make_inputs(6, 4, 40, 2, FP32, device)
    torch.library.opcheck(_op, (student.detach().requires_grad_(), teacher, center, pairs, T_S, T_T))

    def step(student, teacher):
        return code_loss(student, teacher, center, pairs, student_temperature=T_S, teacher_temperature=T_T)[0]

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(student, teacher), step(student, teacher))


def test_the_teacher_and_the_center_get_no_gradient(device):
    student, teacher, center, pairs, _ = make_inputs(2, 2, 8, 1, FP32, device)
    how = {"student_temperature": T_S, "teacher_temperature": T_T}
    for wrong in ((teacher.detach().requires_grad_(), center), (teacher, center.clone().requires_grad_())):
        with pytest.raises(ValueError, match="get no gradient: detach them"):
            code_loss(student, *wrong, pairs, **how)
        with torch.no_grad():
            code_loss(student, *wrong, pairs, **how)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_UK": torch.zeros(2, 9)}, r"want student \[R, K\] and teacher \[U, K\]"),
        ({"center_K": torch.zeros(7)}, r"want a center fp32 \(8,\)"),
        ({"center_K": torch.zeros(8, dtype=BF16)}, "want a center fp32"),
        ({"pairs_RJ": torch.zeros(3, 1, dtype=torch.int64)}, r"want pairs int64 \[2, J\]"),
        ({"pairs_RJ": torch.zeros(2, 1)}, "want pairs int64"),
        ({"pairs_RJ": torch.zeros(2, 17, dtype=torch.int64)}, "J at most 16"),
        ({"pairs_RJ": torch.full((2, 1), 2)}, "want pairs from -1 to 1, got 2 to 2"),
        ({"teacher_UK": torch.zeros(2, 8, dtype=BF16)}, "want one of fp32, bf16, fp16"),
        ({"student_RK": torch.zeros(8, 2).T}, "the last dim must be contiguous"),
        ({"student_temperature": 0.0}, "want temperatures above 0"),
    ],
)
def test_bad_calls_are_refused(change, message):
    good = {
        "student_RK": torch.zeros(2, 8), "teacher_UK": torch.zeros(2, 8), "center_K": torch.zeros(8),
        "pairs_RJ": torch.zeros(2, 1, dtype=torch.int64), "student_temperature": T_S,
        "teacher_temperature": T_T,
    }  # fmt: skip
    arguments = good | change
    tensors = [arguments.pop(name) for name in ("student_RK", "teacher_UK", "center_K", "pairs_RJ")]
    with pytest.raises(ValueError, match=message):
        code_loss(*tensors, **arguments)
