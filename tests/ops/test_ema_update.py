"""ema_update: the kernel against the fp64 definition, then the op against PyTorch's checks."""

from importlib import import_module

import pytest
import torch
from fastmim_kernels import ema_update
from fastmim_kernels.ema_update import CHUNK, ema_update_reference, launch
from fastmim_kernels.testing import assert_no_worse

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(FP32, FP32), (FP32, BF16), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, BF16)]
# a class token, a projection with a chunk that is not full, a bias, a number, nothing, one chunk to the last
# value, one value more
SHAPES = [(1, 1, 192), (192, 48), (384,), (), (0, 5), (CHUNK,), (CHUNK + 1,)]


def make_inputs(dtypes, device):
    rng = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(s, generator=rng) for s in SHAPES] for _ in range(2)]
    return tuple([v.to(device, d) for v in side] for side, d in zip(pairs, dtypes, strict=True))


def copies(tensors):
    return [v.clone() for v in tensors]


@pytest.mark.parametrize("momentum", [0.996, 0.3, 0.9999])
@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("update", [launch, ema_update])
def test_kernel_matches_definition(update, dtypes, momentum, device):
    teacher, student = make_inputs(dtypes, device)
    oracle, naive, moved, read = (
        [v.double() for v in teacher],
        copies(teacher),
        copies(teacher),
        copies(student),
    )
    ema_update_reference(oracle, [v.double() for v in student], momentum)
    ema_update_reference(naive, student, momentum)
    update(moved, student, momentum)
    for i, (t, true, plain) in enumerate(zip(moved, oracle, naive, strict=True)):
        if t.numel():
            assert_no_worse(f"{i}: {tuple(t.shape)}", t, true, plain)
    assert all(torch.equal(a, b) for a, b in zip(student, read, strict=True))
    # the step itself, not only where it leads: at 0.9999 a teacher left alone is within a rounding of bf16
    if dtypes[0] == FP32:
        for t, before, true in zip(moved, teacher, oracle, strict=True):
            torch.testing.assert_close(t - before, (true - before.double()).float(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("update", [launch, ema_update])
def test_the_ends_are_exact_and_an_equal_teacher_rests(update, device):
    for dtypes in ((FP32, FP32), (FP32, BF16)):
        teacher, student = make_inputs(dtypes, device)
        for momentum, expected in ((1.0, teacher), (0.0, student)):
            moved = copies(teacher)
            update(moved, student, momentum)
            for a, b in zip(moved, expected, strict=True):
                assert torch.equal(a, b.float())
    teacher, _ = make_inputs((FP32, FP32), device)
    same = copies(teacher)
    for momentum in (0.9996, 0.7, 0.5, 0.1):
        update(same, copies(teacher), momentum)
    assert all(torch.equal(a, b) for a, b in zip(same, teacher, strict=True))


@pytest.mark.parametrize("update", [launch, ema_update])
def test_dtypes_and_alignments_mix_and_neighbors_stay(update, device):
    """Parameters side by side in one flat buffer, at odd addresses, and next to what is none of ours."""
    sizes = [5, 4096, 8197, 3]
    flat, teacher, student, expected = [], [], [], []
    for dtypes in ((FP32, FP32), (BF16, FP32)):
        t, s = (torch.randn(7 + sum(sizes) + 7).to(device, dtype) for dtype in dtypes)
        teacher += t[7:-7].split(sizes)
        student += s[7:-7].split(sizes)
        flat.append(t)
        expected.append(t.clone())
        ema_update_reference([expected[-1][7:-7]], [s[7:-7]], 0.9)
    update(teacher, student, 0.9)
    for t, want in zip(flat, expected, strict=True):
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if t.dtype == BF16 else {}
        torch.testing.assert_close(t, want, **tolerance)
        assert torch.equal(t[:7], want[:7]) and torch.equal(t[-7:], want[-7:])


def test_the_table_is_made_once_and_never_stale(device):
    table = import_module("fastmim_kernels.ema_update")._table
    table.cache_clear()
    teacher, student = make_inputs((FP32, FP32), device)
    for _ in range(3):
        launch(teacher, student, 0.9)
    assert (table.cache_info().misses, table.cache_info().hits) == (1, 2)
    expected = copies(teacher)
    student[1] = student[1] + 1  # another tensor: another table
    ema_update_reference(expected, student, 0.9)
    launch(teacher, student, 0.9)
    assert table.cache_info().misses == 2
    torch.testing.assert_close(teacher, expected)
    halves = [v.view(-1)[: v.numel() // 2] for v in teacher], [v.view(-1)[: v.numel() // 2] for v in student]
    rest = [v.view(-1)[v.numel() // 2 :].clone() for v in teacher]
    launch(*halves, 0.9)  # the same addresses, other sizes
    assert all(torch.equal(v.view(-1)[v.numel() // 2 :], r) for v, r in zip(teacher, rest, strict=True))


def test_vectors_are_promised_only_where_both_addresses_allow_them(device):
    """The interpreter cannot break this promise: a load of 16 bytes at an odd address is a fault on a GPU."""
    module = import_module("fastmim_kernels.ema_update")
    flat = torch.zeros(64, device=device)
    assert flat.data_ptr() % 16 == 0
    for teacher, student in ((0, 0), (4, 8), (0, 1), (1, 0), (2, 2)):
        places = [module._places([flat[at : at + 16]]) for at in (teacher, student)]
        _, _, kinds = module._table(*places, flat.device)
        assert [kind % 2 for kind in kinds] == [teacher % 4 == 0 and student % 4 == 0]


def test_sixteen_bits_are_rounded_once(device):
    """The reference cannot show it, it is the same code: the student must not be rounded first."""
    student = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(device)
    for dtype in (BF16, FP16):
        teacher = student.flip(0).to(dtype)
        exact = 0.3 * teacher.double() + 0.7 * student.double()
        ema_update([teacher], [student], 0.3)
        half_a_digit = torch.finfo(dtype).eps / 2
        assert ((teacher - exact).abs() <= 1.001 * half_a_digit * exact.abs() + 1e-6).all()


def test_parameters_that_learn_and_no_tensors(device):
    teacher, student = (torch.nn.Linear(48, 5, device=device) for _ in range(2))
    expected = copies(teacher.parameters())
    ema_update_reference([v.detach() for v in expected], [v.detach() for v in student.parameters()], 0.9)
    versions = [v._version for v in teacher.parameters()]
    ema_update(list(teacher.parameters()), list(student.parameters()), 0.9)
    torch.testing.assert_close([*teacher.parameters()], expected)
    assert [v._version for v in teacher.parameters()] > versions  # autograd knows that they moved
    assert all(v.requires_grad and v.grad_fn is None for v in teacher.parameters())
    ema_update([], [], 0.9)
    nothing = torch.empty(0, device=device)
    launch([nothing], [nothing.clone()], 0.9)


def test_op_is_registered_right(device):
    for dtypes in PAIRS[:2]:
        torch.library.opcheck(torch.ops.fastmim.ema_update.default, (*make_inputs(dtypes, device), 0.9))


@pytest.mark.parametrize("dtypes", PAIRS[:2])
def test_compiles_to_one_graph_with_what_comes_before_and_after(dtypes, device):
    teacher, student = make_inputs(dtypes, device)
    expected = copies(teacher)

    def step(update, teacher, student):
        doubled = [2 * s for s in student]
        update(teacher, doubled, 0.9)
        return sum(t.sum() for t in teacher)  # reads what was written

    compiled = torch.compile(lambda t, s: step(ema_update, t, s), fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(
            compiled(teacher, student), step(ema_update_reference, expected, student), rtol=1e-4, atol=1e-3
        )
    torch.testing.assert_close(teacher, expected)


def test_rejects_what_it_cannot_do(device):
    teacher, student = make_inputs((FP32, FP32), device)
    before = copies(teacher)
    for momentum in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="want a momentum"):
            ema_update(teacher, student, momentum)
    with pytest.raises(ValueError, match="as many"):
        ema_update(teacher, student[:-1], 0.9)
    with pytest.raises(ValueError, match="want equal shapes.* at 1"):
        ema_update(teacher, [student[0], student[1].T, *student[2:]], 0.9)
    with pytest.raises(ValueError, match="want fp32"):
        ema_update(teacher, [v.double() for v in student], 0.9)
    with pytest.raises(ValueError, match="want all on"):
        ema_update(teacher, [*student[:-1], student[-1].to("meta")], 0.9)
    for t, s in ((teacher[1].T, student[1].T.contiguous()), (teacher[1].T.contiguous(), student[1].T)):
        with pytest.raises(ValueError, match="want contiguous"):
            ema_update([t], [s], 0.9)
    last = teacher[1].view(-1)[-1:]
    for shared in ([teacher[1], teacher[1]], [teacher[1], last], [last, teacher[0], teacher[1]]):
        with pytest.raises(ValueError, match="overlapping"):
            ema_update(shared, copies(shared), 0.9)
    assert all(torch.equal(a, b) for a, b in zip(teacher, before, strict=True))
