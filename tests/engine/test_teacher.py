"""Teachers follow their students in every ZeRO stage, precision and number of ranks, and survive a stop."""

import json
import math
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastmim.engine.checkpoint import CheckpointError, Checkpoints
from fastmim.engine.pretrain import prepare, train
from fastmim.engine.ranks import Ranks
from fastmim.engine.teacher import check_copies
from fastmim.optim.groups import parameter_groups
from fastmim.optim.schedule import learning_rate
from fastmim.views import Batch
from tests.engine import teacher_scenarios as scenario
from tests.engine.conftest import tiny_run
from tests.engine.forked import scenarios
from tests.engine.siamese import SiameseConfig

CASES = scenario.CASES
WORLDS = {1: "one_rank", 2: "two_ranks", 4: "four_ranks"}
TEACHERS = ("teacher.", "teacher_head.")


@cache
def answers(name: str) -> dict:
    """Of one function of the script, which starts the ranks."""
    return scenarios(Path(__file__).with_name("teacher_scenarios.py"), name)[name]


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """A loop of torch's AdamW on the whole batch in one process, its teacher averaged in fp64."""
    case = scenario.Case(0)
    run, plan = scenario.run_of(case), scenario.plan_of(case, 1)
    torch.manual_seed(0)
    method = run.method.build(run.model)
    method.share(Ranks.single())
    optimizer = torch.optim.AdamW(
        parameter_groups(method.named_parameters(), weight_decay=run.optim.weight_decay),
        betas=run.optim.betas, eps=run.optim.eps,
    )  # fmt: skip
    wide = [(t, t.detach().double(), s) for t, s in pairs(method)]
    for step in range(plan.total_steps):
        rate = learning_rate(
            step, peak=plan.peak_lr, warmup_steps=plan.warmup_steps, total_steps=plan.total_steps, min_lr=0.0
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.arange(scenario.BATCH)
        method(Batch(scenario.images(step), torch.zeros_like(rows), rows, 0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        m = momentum((step + 1) / plan.total_steps)
        for t, t64, s in wide:
            t64.copy_(m * t64 + (1 - m) * s.detach().double())
            t.copy_(t64)
    return method.state_dict()


def pairs(method):
    for teacher, student in ((method.teacher, method.encoder), (method.teacher_head, method.head)):
        yield from zip(teacher.parameters(), student.parameters(), strict=True)


def momentum(progress: float) -> float:
    return 1 - 0.05 * (1 + math.cos(math.pi * progress))


def of(world, case) -> list[dict]:
    """Every rank's answer."""
    ranks = answers(WORLDS[world])
    assert all(isinstance(rank, list) for rank in ranks), ranks
    return [rank[scenario.RANKS[world].index(case)] for rank in ranks]


every = pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(world, case, marks=pytest.mark.long if world == 4 else ())
        for world, cases in scenario.RANKS.items()
        for case in cases
    ],
    ids=lambda x: str(x).replace(" ", ""),
)


@every
def test_the_teacher_is_the_average_of_the_students_masters(plain, world, case):
    ranks = of(world, case)
    end, start = ranks[0]["end"], ranks[0]["start"]
    teachers = [name for name in end if name.startswith(TEACHERS) and not name.endswith("pos_embed")]
    assert len(teachers) == 20
    if case.precision == "fp32":
        wanted = plain
    else:  # weights of bf16 are others for each way to sum: the average of those there were
        wanted = {name: start[name].double() for name in teachers}
        for step, note in enumerate(ranks[0]["notes"]):
            m = momentum((step + 1) / len(ranks[0]["notes"]))
            for name, t in wanted.items():
                t.mul_(m).add_((1 - m) * note["masters"][student_of(name)].double())
    for name in teachers:
        torch.testing.assert_close(end[name].double(), wanted[name].double(), rtol=0, atol=1e-6)
        if name.endswith("weight"):
            assert (end[name] - start[name]).abs().max() > 1e-3  # it has moved, and is not the student
            assert (end[name] - end[student_of(name)]).abs().max() > 1e-3
    assert torch.equal(end["teacher.pos_embed"], end["encoder.pos_embed"])


def student_of(name: str) -> str:
    return name.replace("teacher_head.", "head.").replace("teacher.", "encoder.")


@every
def test_every_rank_uses_the_rounded_average(world, case):
    ranks = of(world, case)
    for rank in ranks:
        for name, weight in rank["used"].items():
            assert torch.equal(rank["end"][name], ranks[0]["end"][name]), name
            assert weight.dtype == (torch.bfloat16 if case.precision == "bf16" else torch.float32)
            assert torch.equal(weight.float(), rank["end"][name].to(weight.dtype).float()), name


@every
def test_one_launch_a_step_in_the_same_memory(world, case):
    steps = scenario.STEPS[case.precision]
    for rank in of(world, case):
        assert [note["launches"] for note in rank["notes"]] == [1] * steps
        assert not any(note["moved"] for note in rank["notes"])
        assert all(note["smallest"] > 0 for note in rank["notes"])  # a grid of no programs is an error
        assert rank["asked"] == [(i + 1) / steps for i in range(steps)]
        assert rank["updates"] == steps


@every
def test_what_a_step_of_the_teacher_sends(world, case):
    """Nothing in fp32; rounded weights in ZeRO 1 and 2; in ZeRO 3 small parameters, and no other is whole."""
    size = {"fp32": 4, "bf16": 2}[case.precision]
    for rank in of(world, case):
        note = rank["notes"][-1]
        if world == 1 and case.zero < 3:
            assert note["traffic"] == 0
        elif case.zero == 3:
            assert note["kept"]
            assert max(note["kept"]) <= scenario.PERSIST
            assert note["resident"] == sum(note["kept"]) < note["whole"] / 4
            padded = sum(-(-count // world) * world for count in note["kept"])
            assert note["traffic"] <= size * padded
        elif case.precision == "bf16" and case.zero:
            assert size * note["whole"] <= note["traffic"] <= 2 * size * note["whole"]
        else:
            assert note["traffic"] == 0


def test_the_optimizers_of_deepspeed_that_are_meant_are_met():
    names = {case: of(2, case)[0]["optimizer"] for case in CASES}
    assert [names[case] for case in CASES] == [
        "AdamW", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3",
        "FP16_UnfusedOptimizer", "FP16_Optimizer", "DeepSpeedZeroOptimizer", "BF16_Optimizer",
        "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3",
    ]  # fmt: skip


@pytest.mark.parametrize("case", scenario.RANKS[1], ids=str)
def test_buffers_stay_as_they_are(case):
    (rank,) = of(1, case)
    assert rank["buffers"]["norm_of_head.running_mean"] == torch.float32
    assert rank["end"]["norm_of_head.num_batches_tracked"].dtype == torch.int64
    steps = scenario.STEPS[case.precision] * case.accumulate
    assert rank["end"]["norm_of_head.num_batches_tracked"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize(("zero", "precision"), scenario.STOPPED)
def test_a_resumed_run_equals_one_never_stopped_to_the_last_bit(world, zero, precision):
    differs, last = answers({1: "resumed_on_one", 2: "resumed_on_two"}[world])[zero, precision]
    assert differs is None  # rows of metrics, and all weights in fp32: the teacher's are its masters
    for whole, again in zip(last["whole"], last["resumed"], strict=True):
        assert whole["updates"] == again["updates"] == scenario.TOTAL
        assert whole["layout"] == again["layout"]
        assert (whole["master"] is None) == (precision == "fp32")
        assert precision == "fp32" or torch.equal(whole["master"], again["master"])


def test_a_checkpoint_without_a_teacher_is_refused_in_a_line_and_kept(images, tmp_path):
    make = partial(scenario.siamese_run, images, tmp_path, steps=2, save_every=2)
    train(prepare(make()))
    (saved,) = (tmp_path / "checkpoints").glob("step-*")
    rows = (tmp_path / "metrics.jsonl").read_text()

    def save_again_without(checkpoint) -> None:
        files = {
            p.name: p.read_bytes() for p in saved.iterdir() if not p.name.startswith(("teacher", "manifest"))
        }
        checkpoints = Checkpoints(tmp_path / "checkpoints", Ranks.single(), keep=1)
        checkpoints.save(
            2, lambda folder: [(folder / n).write_bytes(b) for n, b in files.items()], facts=checkpoint.facts
        )

    save_again_without(Checkpoints(tmp_path / "checkpoints", Ranks.single()).find())
    with pytest.raises(CheckpointError, match="teacher-rank0.pt: the checkpoint was saved without") as caught:
        train(prepare(make(resume=True)))
    assert "\n" not in str(caught.value)
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002.1"]
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_shards_of_another_precision_are_refused(images, tmp_path):
    train(prepare(scenario.siamese_run(images, tmp_path, steps=2)))
    again = scenario.siamese_run(
        images, tmp_path, steps=2, resume=True, precision="bf16", allow_changes=("precision",)
    )
    with pytest.raises(
        CheckpointError, match="20 shards without an fp32 copy, and this run has 20 of them with"
    ):
        train(prepare(again))


def test_the_same_method_starts_from_a_runs_own_file_whole(images, tmp_path):
    train(prepare(scenario.siamese_run(images, tmp_path / "a", steps=3)))
    method = prepare(scenario.siamese_run(images, tmp_path / "b", init_from=tmp_path / "a")).method
    flat, state = load_file(tmp_path / "a/model.safetensors"), method.state_dict()
    assert len(flat) == len(state)
    assert all(
        torch.equal(t, state[name if name in state else f"encoder.{name}"]) for name, t in flat.items()
    )
    assert not torch.equal(method.teacher.norm.bias, method.encoder.norm.bias)
    assert "mask_token" not in str(load_file(tmp_path / "a/encoder.safetensors").keys())


def test_a_teacher_starts_as_the_student_that_came_from_another_method(images, tmp_path, capsys):
    train(prepare(tiny_run(images, tmp_path / "mae", "mae", steps=3)))
    p = prepare(scenario.siamese_run(images, tmp_path / "b", steps=1, init_from=tmp_path / "mae"))
    theirs = load_file(tmp_path / "mae/encoder.safetensors")
    for encoder in (p.method.encoder, p.method.teacher):
        assert all(torch.equal(t, encoder.state_dict()[name]) for name, t in theirs.items())
    assert torch.equal(p.method.teacher_head.weight, p.method.head.weight)
    train(p)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(" weights"))
    assert line == (
        " weights  encoder; not there: encoder.mask_token, teacher, head, teacher_head, norm_of_head; "
        f"left out: decoder, from {tmp_path / 'mae'}"
    )


def test_teachers_that_are_none_are_refused():
    model = scenario.MODEL
    method = SiameseConfig().build(model)
    method.teacher_head.bias.data += 1
    with pytest.raises(ValueError, match="starts as its student, got another teacher_head.bias"):
        check_copies(method)
    method = SiameseConfig().build(model)
    method.teacher_head.bias.requires_grad_()
    with pytest.raises(
        ValueError, match=r"teacher_head: want no gradient in a teacher, got it in \['bias'\]"
    ):
        check_copies(method)
    method.teacher_head = nn.Linear(model.width, 6).requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"want the parameters of its student, got others at \['bias', 'weight'"
    ):
        check_copies(method)


def test_a_diagnosis_is_said_once_and_kept(images, tmp_path, capsys):
    train(prepare(scenario.siamese_run(images, tmp_path, steps=6)))
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(said) == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert said == [f" warning  step 2: target is {rows[1]['target']:.2f} at step 2; try --optim.lr 0"]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert events.count(b"try --optim.lr 0") == 1
