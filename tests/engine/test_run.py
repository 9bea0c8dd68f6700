"""A whole run in one process: what it leaves, what it refuses, and methods the engine has never heard of."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fastmim.engine.config import make_plan
from fastmim.engine.deepspeed import deepspeed_dictionary
from fastmim.engine.judge import NonFinite
from fastmim.engine.loop import rate_at
from fastmim.engine.pretrain import images_of, prepare, train
from tests.engine.conftest import tiny_run
from tests.engine.siamese import SiameseConfig


@pytest.mark.parametrize(("method", "decoder"), [("mae", "dali"), ("rmae", "pillow")])
def test_what_a_run_leaves(images, tmp_path, method, decoder):
    run = tiny_run(images, tmp_path, method)
    run = replace(run, data=replace(run.data, decoder=decoder))
    train(prepare(run), arguments=["--method", method])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[0]["lr"] == 0.0
    assert all(0 < row["loss"] < 10 for row in rows)
    assert {"images_per_s", "data_wait", "seconds"} <= rows[1].keys()
    if method == "rmae":
        assert rows[0]["loss"] == pytest.approx(rows[0]["distance"] + rows[0]["anchor"], rel=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["run"]["method"]["name"] == method
    assert config["plan"]["steps_per_epoch"] == 9
    assert config["arguments"] == ["--method", method]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-00000005",
        "step-00000010",
    ]
    assert list((tmp_path / "tensorboard").glob("events.*"))
    for name in ("loss.png", "reconstruction.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 50
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert "blocks.0.attn.qkv.weight" in file.keys()  # noqa: SIM118
        assert not any(name.startswith("decoder") for name in file.keys())  # noqa: SIM118
        assert file.metadata()["patch"] == "4"


def test_accumulation_gives_the_same_steps(images, tmp_path):
    losses = []
    for accumulate in (1, 4):
        folder = tmp_path / str(accumulate)
        train(prepare(tiny_run(images, folder, accumulate=accumulate, zero=0)))
        losses.append(
            [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_init_from_a_run_and_what_it_costs_to_be_another_model(images, tmp_path):
    train(prepare(tiny_run(images, tmp_path / "a", steps=3)))
    p = prepare(tiny_run(images, tmp_path / "b", "mae", init_from=tmp_path / "a"))
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert torch.equal(p.method.encoder.norm.bias, file.get_tensor("norm.bias"))
        assert p.method.encoder.norm.bias.any()
    run = tiny_run(images, tmp_path / "c", init_from=tmp_path / "a")
    with pytest.raises(Exception, match="is a checkpoint of another model or method"):
        prepare(replace(run, model=replace(run.model, depth=2)))


def test_dictionary_for_deepspeed_is_whole(images, tmp_path):
    run = tiny_run(images, tmp_path)
    plan = make_plan(run, images_of(run), world=1, device="cpu")
    written = deepspeed_dictionary(run, plan)
    assert written["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1.0
    assert written["zero_optimization"]["stage"] == 1
    assert written["bf16"]["enabled"] is False
    cuda = make_plan(run, images_of(run), world=4, device="cuda")
    assert (cuda.precision, cuda.micro_batch) == ("bf16", 2)
    assert deepspeed_dictionary(run, cuda)["bf16"] == {"enabled": True, "check_grad_overflow": False}


@pytest.mark.parametrize(
    ("zero", "changes", "world", "norm", "buckets"),
    [
        (1, {}, 1, False, False),
        (2, {}, 2, False, True),
        (1, {"accumulate": 2}, 1, True, False),  # DeepSpeed's BF16_Optimizer takes the norm in any case
        (2, {"accumulate": 2}, 1, False, False),
        (0, {}, 2, True, True),  # ZeRO 0 and 3 refuse to go without
        (3, {}, 1, True, False),
        (1, {"clip": 1.0}, 1, False, False),  # clipping is ours
    ],
)
def test_deepspeed_does_nothing_that_nobody_asked_for(images, tmp_path, zero, changes, world, norm, buckets):
    """No search for overflow, no norm, no timer that waits, no buckets with nobody to send them to."""
    run = tiny_run(images, tmp_path, zero=zero, precision="bf16", accumulate=changes.get("accumulate", 1))
    run = replace(run, optim=replace(run.optim, clip=changes.get("clip", 0.0)))
    plan = make_plan(run, images_of(run), world=world, device="cpu")
    written = deepspeed_dictionary(run, plan)
    stage = written["zero_optimization"]
    assert written["timers"] == {"throughput": {"enabled": False, "synchronized": False}}
    assert written["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert stage["compute_grad_norm"] is norm
    assert stage["contiguous_gradients"] is stage["reduce_scatter"] is buckets


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"batch": 10}, 4, r"want a multiple of ranks \* accumulate = 4 \* 1, got 10"),
        ({"batch": 8, "accumulate": 3}, 1, r"1 \* 3, got 8"),
        ({"batch": 73}, 1, "want at most the 72 images there are, got 73"),
    ],
)
def test_batches_that_do_not_fit_are_refused(images, tmp_path, changes, world, message):
    run = tiny_run(images, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        make_plan(run, images_of(run), world=world, device="cpu")


def test_nothing_is_left_out_or_changed_in_silence(images, tmp_path):
    run = tiny_run(images, tmp_path, batch=7, steps=20)
    plan = make_plan(run, images_of(run), world=1, device="cpu")
    assert plan.left_out == 2
    assert any("2 of 72 images" in note for note in plan.notes)
    run = tiny_run(images, tmp_path, steps=5)
    plan = make_plan(run, images_of(run), world=1, device="cpu")
    assert plan.warmup_steps == 1.0
    assert any("warm-up of 1 epochs does not fit in 5 steps" in note for note in plan.notes)


def test_milestones_beyond_the_end_are_moved_in_proportion_and_said_so(images, tmp_path):
    """Of 72 images 8 at a time an epoch has 9 steps."""
    run = tiny_run(images, tmp_path, steps=80)
    for epochs, steps in (((4.0, 8.0), (36.0, 72.0)), ((5.0, 10.0), (35.0, 70.0))):
        there = replace(run, optim=replace(run.optim, schedule="multistep", milestones=epochs))
        plan = make_plan(there, images_of(run), world=1, device="cpu")
        assert plan.milestones == steps
        assert any("milestones at epoch 5 10 do not fit" in n for n in plan.notes) == (epochs == (5.0, 10.0))
        rates = [
            rate_at(step, there.optim, plan) / plan.peak_lr for step in (int(steps[0]) - 1, int(steps[0]), 79)
        ]
        assert rates == pytest.approx([1.0, 0.1, 0.01])


# --- methods the engine has never heard of ------------------------------------------------------------


def test_views_teacher_and_metrics_of_an_unknown_method(images, tmp_path):
    p = prepare(tiny_run(images, tmp_path, method="mae", zero=1))
    run = replace(p.run, method=SiameseConfig())
    p = replace(p, run=run, method=run.method.build(run.model))
    before = p.method.teacher.blocks[0].mlp.fc1.weight.clone()
    train(p)
    assert p.method.progress == pytest.approx([(i + 1) / 10 for i in range(10)])
    after = p.method.teacher.blocks[0].mlp.fc1.weight
    assert not torch.equal(before, after)
    assert not torch.equal(p.method.encoder.blocks[0].mlp.fc1.weight, after)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "target" in rows[-1]
    assert (tmp_path / "encoder.safetensors").exists()
    assert not (tmp_path / "reconstruction.png").exists()  # it predicts no pixels


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(images, tmp_path):
    p = prepare(tiny_run(images, tmp_path, method="mae"))
    forward = p.method.forward

    def breaks(batch):
        output = forward(batch)
        if p.method.training and breaks.calls >= 6:
            output = replace(output, loss=output.loss * float("nan"))
        breaks.calls += 1
        return output

    breaks.calls = 0
    p.method.forward = breaks
    with pytest.raises(NonFinite, match=r"loss is not finite at step 9, .* \(seen at step 10\)"):
        train(p)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000005"]
