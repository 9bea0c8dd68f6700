"""A step that is not finite moves nothing; too many, or weights that are not finite, end the run unsaved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmim.data import SampleOrder, find_images
from fastmim.engine.finite import size_of
from fastmim.engine.judge import Judge, NonFinite
from fastmim.engine.pretrain import prepare, train
from tests.engine.conftest import tiny_run
from tests.engine.finite_scenarios import STAGES, STEPS, Case, Ending, ending, rows_of
from tests.engine.forked import scenarios

OTHERS = [
    Case(1, step=1),  # at a rate of 0
    Case(1, "fp32", step=4),  # in a step that is saved
    Case(1, step=STEPS),  # the last
    Case(0, "fp32", step=STEPS),
    Case(1, value=float("inf")),
    Case(1, value=1e30),  # a number, but its square is none
    Case(1, accumulate=2),  # another optimizer of DeepSpeed's, which leaves the step out
    Case(2, accumulate=2),
    Case(1, clip=1.0),
    Case(2, "fp32", clip=1.0),
    Case(0, "fp32", optimizer="lars"),  # which the host must ask
    Case(1, "fp32", optimizer="sgd"),
    Case(1, step=2, last=3),  # two in a row
]


def assert_left_out(found: Ending, case: Case) -> None:
    bad = list(range(case.step, max(case.step, case.last) + 1))
    assert found == Ending(bad, [step for step in bad if step > 1], True, bad, None), case


@pytest.mark.parametrize("case", [*STAGES, *OTHERS], ids=lambda case: "-".join(map(str, case)))
def test_one_bad_gradient_leaves_weights_and_moments_as_they_were(images, tmp_path, case):
    assert_left_out(ending(images, tmp_path, case, rank=0), case)


def test_without_it_every_step_moves(images, tmp_path):
    assert ending(images, tmp_path, Case(1), rank=-1) == Ending([], [], True, [], None)


def test_one_bad_gradient_on_one_of_two_ranks_is_left_out_on_both():
    answers = scenarios(Path(__file__).with_name("finite_scenarios.py"))["two_ranks"]
    for endings in answers:
        for found, case in zip(endings, STAGES, strict=True):
            assert_left_out(Ending(*found), case)


def test_three_in_a_row_end_the_run_and_their_samples_are_named(images, tmp_path):
    found = ending(images, tmp_path, case := Case(1, step=3, last=5), rank=0)
    assert (found.skipped, found.untouched, found.finite) == ([3, 4, 5], [3, 4, 5], True)
    assert found.message.startswith("gradients are not finite at step 5, the 3rd in a row, ")
    assert "--optim.blr" in found.message and "nonfinite.jsonl" in found.message
    folder = tmp_path / "-".join(map(str, case))
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert saved == ["step-00000002", "step-00000004"]
    assert not list(folder.glob("*.safetensors"))
    rows = rows_of(folder / "nonfinite.jsonl")
    order = SampleOrder(72, 8)
    names = find_images(images).names
    assert [row["samples"] for row in rows] == [[names[i] for i in order.ids(k)[1]] for k in (2, 3, 4)]


def test_a_tenth_of_the_last_hundred_ends_the_run():
    judge, good = Judge(), {"step": 1, "loss": 1.0, "skipped": 0.0, "lr": 0.1}
    rows = [good | {"step": k, "skipped": float(k % 9 == 0)} for k in range(1, 200)]
    with pytest.raises(NonFinite, match="not finite at step 99, nor in 10 of the 98 before"):
        judge(rows, [0.0] * len(rows))
    Judge()([row | {"skipped": float(row["step"] % 10 == 0)} for row in rows], [0.0] * len(rows))


def test_what_is_saved_beside_the_weights_is_looked_at_too(images, tmp_path):
    """A buffer that no loss reads."""
    p = prepare(tiny_run(images, tmp_path, "mae", steps=6, save_every=3))
    p.method.register_buffer("count", torch.zeros(()))
    p.method.after_step = lambda progress: p.method.count.copy_(torch.tensor(float("inf")))
    with pytest.raises(NonFinite, match="not finite at step 3"):
        train(p)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_among_many_shows(bad):
    values = [torch.full((7, 5), 1e30), torch.zeros(0), torch.full((11,), -1e30, dtype=torch.bfloat16)]
    assert size_of(values).isfinite()
    for x in (values[0][3], values[2]):
        kept = x[1].clone()
        x[1] = bad
        assert not size_of(values).isfinite()
        x[1] = kept


def test_a_loss_that_is_not_finite_is_named_as_such(images, tmp_path):
    p = prepare(tiny_run(images, tmp_path, "mae", steps=4, log_every=2))
    forward = p.method.forward
    p.method.forward = lambda batch: replace(output := forward(batch), loss=output.loss * float("nan"))
    with pytest.raises(
        NonFinite, match="^loss is not finite at step 3, the 3rd in a row, with a loss of nan"
    ):
        train(p)
