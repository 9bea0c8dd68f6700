"""Transfers as whole runs: what is validated after each epoch, resumed, on two ranks; and what is refused."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmim import cli
from fastmim.commands.transfer import for_train
from fastmim.data import DataConfig, find_images
from fastmim.data.feed.center import center_crops
from fastmim.engine.pretrain import prepare, train
from fastmim.interop.metadata import encoder_metadata
from fastmim.methods.transfer import TRANSFERS
from fastmim.models.vit import Encoder
from fastmim.optim import OptimConfig
from fastmim.views import Batch
from tests.engine.conftest import MODEL, tiny_run, write_images
from tests.engine.forked import run_script
from tests.engine.test_resume import assert_same, train_and_resume

PRETRAINED = replace(MODEL, depth=2)
SCALARS = {"finetune": ("top1", "top5", "loss"), "linear": ("cls/top1", "mean/top1", "cls/loss", "mean/loss")}


def transfer_run(name, images, val, weights, run_dir, **changes):
    """Of 72 images in batches of 8: an epoch is 9 steps."""
    config = TRANSFERS[name](classes=3, **({"mix_block": 4} if name == "finetune" else {}))
    model = replace(PRETRAINED, **config.encoder)
    data = DataConfig(path=images, val=val, decoder="pillow", threads=1)
    optim = OptimConfig(lr=1e-3, warmup_epochs=1.0)
    if name == "linear":
        optim = replace(optim, name="lars", lr=1.0)
        changes = {"zero": 0} | changes
    changes = {"steps": 18, "init_from": weights, **changes}
    run = replace(tiny_run(images, run_dir, "mae"), method=config, model=model, data=data)
    return replace(run, optim=optim, **changes)


@pytest.fixture(scope="session")
def val(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("val"), 13)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_file(Encoder(PRETRAINED).state_dict(), path, encoder_metadata(PRETRAINED))
    return path


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", TRANSFERS)
def test_each_epoch_is_validated_and_the_last_row_is_of_the_weights(
    name, images, val, weights, tmp_path, capsys
):
    p = prepare(transfer_run(name, images, val, weights, tmp_path, steps=20))
    assert torch.equal(p.method.start.blocks[1].mlp.fc1.weight, load_file(weights)["blocks.1.mlp.fc1.weight"])
    train(p)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [9, 18, 20] and {row["images"] for row in rows} == {13}
    method = p.run.method.build(p.run.model)
    method.load_state_dict(
        load_file(tmp_path / "model.safetensors") if name == "linear" else under_names(tmp_path)
    )
    if name == "linear":
        method.start.load_state_dict(load_file(weights))
    method.eval()
    found = find_images(val)
    [(pixels, ids)] = center_crops(found, MODEL.size)
    with torch.no_grad():
        wanted = method(Batch((pixels,), ids, ids, 0, torch.from_numpy(found.labels).long())).metrics
    for scalar in SCALARS[name]:
        assert rows[-1][scalar] == pytest.approx(float(wanted[scalar]) / 13, rel=1e-4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalar = next(s for s in SCALARS[name] if s.endswith("top1"))
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(f"val/{scalar}")] == [
        (row["step"], row[scalar]) for row in rows
    ]
    said = capsys.readouterr().out
    assert "13 images in" in said and said.count(" epoch ") >= 3 and "final " in said and "best " in said


def under_names(run_dir):
    from fastmim.interop.mae import bare_part

    flat = load_file(run_dir / "model.safetensors")
    return {f"encoder.{n}" if bare_part(n) == "encoder." else n: t for n, t in flat.items()}


@pytest.mark.parametrize("name", TRANSFERS)
def test_resumed_in_mid_run_to_the_last_bit(name, images, val, weights, tmp_path):
    def make(images, run_dir, **changes):
        return transfer_run(name, images, val, weights, run_dir, **changes)

    zero = 0 if name == "linear" else 1
    train_and_resume(images, tmp_path, zero=zero, total=18, stop=9, make=make)
    assert_same(tmp_path, 18, 9)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(tmp_path / which)]
            for which in ("whole", "resumed")]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_a_look_that_a_stop_prevented_is_made_up_for(images, val, weights, tmp_path):
    """Killed between the last checkpoint and the look at the validation images."""
    make = partial(transfer_run, "finetune", images, val, weights, tmp_path / "run")
    train(prepare(make()))
    path = tmp_path / "run" / "validation.jsonl"
    first, last = path.read_text().splitlines()
    path.write_text(f"{first}\n")
    train(prepare(make(resume=True)))
    again = json.loads(path.read_text().splitlines()[-1])
    assert again | {"seconds": 0} == json.loads(last) | {"seconds": 0}


def test_validation_changes_no_step(images, val, weights, tmp_path):
    losses = {}
    for which in (val, None):
        run_dir = tmp_path / str(which is None)
        run = transfer_run("finetune", images, which, weights, run_dir)
        train(prepare(run))
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        losses[which] = [json.loads(line)["loss"] for line in lines]
    assert losses[val] == losses[None]


def test_two_ranks_see_what_one_sees(images, val, weights, tmp_path):
    """13 images on two ranks: one has a padded one, which does not count. Under ZeRO 3 where it trains."""
    run_script(Path(__file__).with_name("validate_two_ranks.py"), *map(str, (images, val, weights, tmp_path)))
    for name in TRANSFERS:
        train(prepare(transfer_run(name, images, val, weights, tmp_path / name / "one")))
        one, two = rows_of(tmp_path / name / "one"), rows_of(tmp_path / name / "two")
        assert len(one) == len(two) == 2
        for ours, theirs in zip(one, two, strict=True):
            assert theirs["images"] == 13
            for scalar in SCALARS[name]:
                assert theirs[scalar] == pytest.approx(ours[scalar], rel=1e-3)


@pytest.mark.parametrize(("name", "zero"), [("linear", 0), ("finetune", 0), ("finetune", 2)])
def test_in_bf16_it_sees_about_the_same(name, zero, images, val, weights, tmp_path):
    rows = {}
    for precision in ("fp32", "bf16"):
        run_dir = tmp_path / precision
        train(
            prepare(
                transfer_run(name, images, val, weights, run_dir, zero=zero, precision=precision, steps=9)
            )
        )
        [rows[precision]] = rows_of(run_dir)
    for scalar in (scalar for scalar in SCALARS[name] if "loss" in scalar):
        assert rows["bf16"][scalar] == pytest.approx(rows["fp32"][scalar], rel=0.02)


def test_images_that_cannot_be_decoded_are_left_out_and_counted(images, val, weights, tmp_path, capsys):
    import shutil

    shutil.copytree(val, tmp_path / "val")
    broken = sorted((tmp_path / "val" / "class1").iterdir())[0]
    broken.write_bytes(b"\xff\xd8\xff\xe0 no image")
    train(prepare(transfer_run("finetune", images, tmp_path / "val", weights, tmp_path / "run", steps=9)))
    [row] = rows_of(tmp_path / "run")
    assert (row["images"], row["left_out"]) == (12, 1) and "1 left out" in capsys.readouterr().out


def test_first_weights_are_probed_and_resumed(images, val, tmp_path):
    """The encoder is of the seed alone, and in no checkpoint: it must be the same after a stop."""

    def make(images, run_dir, **changes):
        return transfer_run("linear", images, val, None, run_dir, **changes)

    train_and_resume(images, tmp_path, zero=0, total=18, stop=9, make=make)
    assert_same(tmp_path, 18, 9)


def test_what_cannot_be_validated_is_refused(images, val, weights, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in sorted(val.rglob("*.jpg"))[:2]:
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(Exception, match="data.val: want labeled images"):
        prepare(transfer_run("finetune", images, tmp_path / "flat", weights, tmp_path / "run"))
    other = write_images(tmp_path / "other", 2)
    with pytest.raises(Exception, match="want the 3 classes of data.path, got 2; not in both: class2"):
        prepare(transfer_run("finetune", images, other, weights, tmp_path / "run"))
    run = tiny_run(images, tmp_path / "run", "mae")
    with pytest.raises(Exception, match="data.val: want a method with labels, as supervised, got mae"):
        prepare(replace(run, data=replace(run.data, val=val)))
    run = transfer_run("finetune", images, val, weights, tmp_path / "run")
    with pytest.raises(Exception, match="is no encoder of ours: blocks.0.attn.proj.bias is"):
        prepare(replace(run, model=replace(run.model, width=32)))
    assert not (tmp_path / "run").exists()


# --- the commands -----------------------------------------------------------------------------------------


def test_the_command_line_says_what_the_weights_are(images, weights):
    given = for_train(
        "finetune", [str(weights), "--data.path", str(images), "--labels", "50%", "--recipe", "mae_repo"]
    )
    text = " ".join(given)
    for words in (
        f"--method finetune --init-from {weights}", "--model.width 16", "--model.depth 2", "--model.heads 2",
        "--model.positions learned", "--variant mae-repo", "--recipe imagenet", "--data.subset 50%",
        "--method.classes 3",
    ):  # fmt: skip
        assert words in text, words
    assert "--labels" not in text
    linear = " ".join(
        for_train("linear", [str(weights), "--model.image-size", "32", "--method.classes", "9"])
    )
    assert "--model.positions sincos" in linear and "--model.final-norm" in linear
    assert linear.count("image-size") == 1 and "--method.classes 9" in linear
    assert for_train("finetune", ["--from", "scratch", "--epochs", "3"]) == [
        "--method", "finetune", "--epochs", "3",
    ]  # fmt: skip
    assert for_train("linear", ["--from", "scratch"]) == ["--method", "linear"]
    assert for_train("linear", ["--run-dir", "x", "--resume"])[:2] == ["--method", "linear"]
    assert for_train("linear", []) is None


def test_bad_questions_are_a_line(tmp_path, capsys):
    for name, arguments, message in [
        ("finetune", ["--epochs", "3"], "want WEIGHTS or --from scratch, got '--epochs'"),
        ("linear", ["--from", "elsewhere"], "want WEIGHTS or --from scratch, got '--from'"),
        ("finetune", [str(tmp_path / "nothing")], "got nothing at"),
        ("linear", [str(tmp_path / "nothing")], "got nothing at"),
    ]:
        with pytest.raises(SystemExit) as stop:
            for_train(name, arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFERS)
def test_the_commands_train_on_files(name, images, val, weights, tmp_path, monkeypatch, capfd):
    arguments = [name, str(weights), "--data.path", str(images), "--data.val", str(val), "--batch", "8"]
    arguments += [
        "--data.decoder",
        "pillow",
        "--data.threads",
        "1",
        "--epochs",
        "1",
        "--run-dir",
        str(tmp_path / "r"),
    ]
    arguments += ["--labels", "50%"] + (["--method.mix-block", "4"] if name == "finetune" else [])
    monkeypatch.setattr(sys, "argv", ["fastmim", *arguments])
    cli.main()
    said = capfd.readouterr().out
    assert "36 images in" in said and "final " in said
    assert rows_of(tmp_path / "r")[-1]["images"] == 13
    monkeypatch.setattr(
        sys, "argv", ["fastmim", name, "--run-dir", str(tmp_path / "r"), "--resume", "--epochs", "2"]
    )
    cli.main()
    assert [row["epoch"] for row in rows_of(tmp_path / "r")] == [1, 2]
