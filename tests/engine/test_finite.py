"""A gradient, a weight or a buffer that is not finite ends the run on all ranks, with nothing of it saved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmim.engine.finite import size_of
from fastmim.engine.metrics import NonFinite
from fastmim.engine.pretrain import prepare, train
from tests.engine.conftest import tiny_run
from tests.engine.finite_scenarios import SAVE_EVERY, STAGES, STEPS, Case, Ending, ending
from tests.engine.forked import scenarios

OTHERS = [
    Case(1, step=1),  # at a rate of 0
    Case(1, "fp32", step=4),  # in the very step that is saved
    Case(1, value=float("inf")),
    Case(1, accumulate=2),  # another optimizer of DeepSpeed's, which leaves the step out
    Case(2, accumulate=2),
    Case(1, clip=1.0),
    Case(2, "fp32", clip=1.0),
]


def assert_stopped(found, case: Case) -> None:
    saved = [f"step-{step:08d}" for step in range(SAVE_EVERY, case.step, SAVE_EVERY)]
    assert found.message is not None, case
    assert found.message.startswith(f"gradients or weights are not finite at step {case.step}, "), case
    assert "No checkpoint was made of it" in found.message and "--optim.blr" in found.message
    assert (found.checkpoints, found.exported) == (saved, False), case


@pytest.mark.parametrize("case", [*STAGES, *OTHERS], ids=lambda case: "-".join(map(str, case)))
def test_one_bad_gradient_on_one_rank(images, tmp_path, case):
    assert_stopped(ending(images, tmp_path, case, rank=0), case)


def test_without_it_the_same_run_goes_through(images, tmp_path):
    found = ending(images, tmp_path, Case(1), rank=-1)
    assert (found.message, found.exported) == (None, True)
    assert len(found.checkpoints) == STEPS // SAVE_EVERY


def test_one_bad_gradient_on_one_of_two_ranks_stops_both():
    answers = scenarios(Path(__file__).with_name("finite_scenarios.py"))["two_ranks"]
    for endings in answers:
        for found, case in zip(endings, STAGES, strict=True):
            assert_stopped(Ending(*found), case)


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
    with pytest.raises(NonFinite, match="^loss is not finite at step 1, with a loss of nan"):
        train(p)
