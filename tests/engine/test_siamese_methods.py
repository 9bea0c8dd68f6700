"""C-MAE and CMAE as whole runs: sharded, resumed, on two ranks, and what they leave for others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmim.engine.pretrain import prepare, train
from fastmim.methods import METHODS
from fastmim.models.mae_decoder import DecoderConfig
from tests.engine.conftest import MODEL, tiny_run
from tests.engine.forked import run_script
from tests.engine.test_resume import assert_same, launch, train_and_resume

SIAMESE = ("cmae", "cmae_huang")
SMALL = {
    "cmae": {"hidden": 24, "out": 16},
    "cmae_huang": {
        "hidden": 24, "out": 16, "shift": 3, "feature_depth": 1,
        "decoder": DecoderConfig(width=16, depth=1, heads=2),
    },
}  # fmt: skip


def siamese_run(method):
    def make(images, run_dir, **changes):
        run = tiny_run(images, run_dir, method="mae", **changes)
        return replace(run, method=METHODS[method](**SMALL[method]))

    return make


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("method", SIAMESE)
def test_resumed_in_mid_run_to_the_last_bit(images, tmp_path, method, zero):
    make = siamese_run(method)
    train_and_resume(images, tmp_path, zero=zero, total=9, stop=4, make=make)
    assert_same(tmp_path, 9, 4)
    state = load_file(tmp_path / "whole" / "model.safetensors")
    students = {name: t for name, t in state.items() if name.startswith("projector.")}
    assert students
    for name, student in students.items():  # it followed, and did not become it
        teacher = state[f"target_{name}"]
        if student.ndim > 1:
            assert 0 < (teacher - student).abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cmae", pytest.param("cmae_huang", marks=pytest.mark.long)])
def test_two_sharded_ranks_train_as_one_process(images, tmp_path, method):
    """Negatives, batch norm and teacher are those of the global batch; ZeRO 3 against none."""
    flags = [
        "--method",
        method,
        "--data.path",
        images,
        "--data.decoder",
        "pillow",
        "--batch",
        8,
        "--steps",
        8,
    ]
    flags += ["--optim.lr", "1e-3", "--optim.warmup-epochs", 1, "--log-every", 4, "--model.width", 16]
    flags += ["--model.depth", 2, "--model.heads", 2, "--model.patch", MODEL.patch, "--method.hidden", 24]
    flags += ["--model.image-size", *MODEL.size, "--method.out", 16]
    if method == "cmae_huang":
        flags += ["--method.decoder.width", 16, "--method.decoder.depth", 1, "--method.decoder.heads", 2]
        flags += ["--method.shift", 3]
    flags = [str(flag) for flag in flags]
    script = str(Path(__file__).resolve().parents[2] / "fastmim/train.py")
    launch("--num_gpus", "2", script, *flags, "--zero", "3", "--run-dir", str(tmp_path / "two"))
    run_script(Path(script), *flags, "--zero", "0", "--run-dir", str(tmp_path / "one"))
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    assert len(rows["one"]) == 8
    for ours, theirs in zip(rows["one"], rows["two"], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-5)
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in states[0].items():
        # not biases: softmax and batch norm take some away, whose gradient is rounding, and AdamW its sign
        if name.startswith("target_") and name.endswith("weight"):
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def test_weights_of_a_run_start_another(images, tmp_path, capsys):
    """MAE's encoder serves C-MAE, whose teacher begins as a copy; C-MAE's whole file serves C-MAE."""
    train(prepare(tiny_run(images, tmp_path / "mae", "mae", steps=2, save_every=2)))
    make = siamese_run("cmae")
    p = prepare(make(images, tmp_path / "cmae", steps=2, save_every=2, init_from=tmp_path / "mae"))
    mae = load_file(tmp_path / "mae" / "model.safetensors")
    for encoder in (p.method.encoder, p.method.target_encoder):
        assert torch.equal(encoder.blocks[0].mlp.fc1.weight, mae["blocks.0.mlp.fc1.weight"])
    assert "encoder" in p.weights and "projector" in p.weights
    train(p)
    again = prepare(make(images, tmp_path / "again", steps=2, init_from=tmp_path / "cmae"))
    whole = load_file(tmp_path / "cmae" / "model.safetensors")
    assert torch.equal(again.method.target_encoder.mask_token, whole["target_encoder.mask_token"])
    assert torch.equal(again.method.encoder.mask_token, whole["encoder.mask_token"])
    assert "mask_token" not in load_file(tmp_path / "cmae" / "encoder.safetensors")
