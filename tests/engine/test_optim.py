"""Clipping, frozen groups and schedules under DeepSpeed are those of plain torch, in every stage."""

from functools import cache
from pathlib import Path

import pytest
import torch

from fastmim.optim import torch_adamw
from fastmim.optim.groups import parameter_groups
from fastmim.optim.schedule import learning_rate, weight_decay
from fastmim.views import Batch
from tests.engine.forked import scenarios

from .optim_scenarios import ONE, PER_EPOCH, STEPS, TWO, Case, images, plan_of, run_of


@cache
def answers(name: str) -> list:
    return scenarios(Path(__file__).with_name("optim_scenarios.py"), name)[name]


@cache
def plain(case: Case) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same in plain torch on whole batches: weights at the end, norms before clipping."""
    torch.manual_seed(0)
    run, plan = run_of(case), plan_of(case)
    method = run.method.build(run.model)
    groups = parameter_groups(method.named_parameters(), weight_decay=0.1, group=method.group)
    optimizer, norms = torch_adamw(groups, run.optim), []
    for step in range(STEPS):
        ids, epoch = torch.arange(8), step // PER_EPOCH
        optimizer.zero_grad(set_to_none=True)
        method(Batch((images(step),), ids, ids, epoch)).loss.backward()
        frozen = [p for g in optimizer.param_groups if epoch < g["frozen_epochs"] for p in g["params"]]
        for p in frozen:
            p.grad = None
        trained = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trained]).item())
        own = [p for g in optimizer.param_groups if g["clip"] is not None for p in g["params"]]
        others = [p for p in trained if all(p is not q for q in own)]
        if case.clip and case.per == "global":
            torch.nn.utils.clip_grad_norm_(others, case.clip)
        for p in others if case.clip and case.per == "tensor" else ():
            torch.nn.utils.clip_grad_norm_([p], case.clip)
        torch.nn.utils.clip_grad_norm_(own, 0.02)
        for group in optimizer.param_groups:
            rate = learning_rate(
                step,
                peak=plan.peak_lr,
                warmup_steps=2.0,
                total_steps=STEPS,
                schedule=group["schedule"] or "mae",
            )
            group["lr"] = rate * group["lr_scale"]
            if group["decays"]:
                group["weight_decay"] = weight_decay(step, start=0.1, end=0.5, total_steps=STEPS)
        optimizer.step()
    return {name: p.detach() for name, p in method.named_parameters()}, norms


@pytest.mark.parametrize(
    ("name", "case"), [("one_rank", c) for c in ONE] + [("two_ranks", c) for c in TWO], ids=str
)
def test_a_run_is_that_of_plain_torch(name, case):
    cases = ONE if name == "one_rank" else TWO
    ranks = answers(name)
    assert all(isinstance(rank, list) for rank in ranks), ranks
    found = [rank[cases.index(case)] for rank in ranks]
    weights, norms = plain(case._replace(precision="fp32", world=1, accumulate=1, zero=0))
    half = case.precision == "bf16"
    for rank in found:
        torch.testing.assert_close(
            torch.tensor(rank["norms"]), torch.tensor(norms), rtol=0.02 if half else 1e-4, atol=0
        )
        for key, expected in weights.items():
            torch.testing.assert_close(
                rank["end"][key],
                expected,
                rtol=0,
                atol=0.02 if half else 2e-5,
                msg=lambda m, k=key: f"{k}: {m}",
            )
    assert found[0]["norms"] == found[-1]["norms"]


def test_the_limits_matter_in_these_cases():
    """Otherwise the test above would pass without any clipping, freezing or decay."""
    free, clipped = plain(Case(0, clip=0.0))[0], plain(Case(0))[0]
    each = plain(Case(0, "tensor"))[0]
    assert (free["encoder.weight"] - clipped["encoder.weight"]).abs().max() > 1e-3
    assert (each["encoder.weight"] - clipped["encoder.weight"]).abs().max() > 1e-3
    assert min(plain(Case(0))[1]) > 0.05
