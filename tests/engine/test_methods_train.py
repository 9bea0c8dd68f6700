"""Every method that is more than MAE as whole runs: resumed, sharded on two ranks, and what they leave."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmim.engine.config import Run
from fastmim.engine.pretrain import prepare, train
from fastmim.methods import METHODS
from fastmim.methods.tokenizers import TRAININGS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.recipes import geometry
from tests.engine.conftest import MODEL, tiny_run
from tests.engine.forked import run_script
from tests.engine.test_resume import assert_same, train_and_resume

OTHERS = tuple(name for name in METHODS if name not in ("mae", "rmae"))  # theirs is test_resume
KINDS = {"dvae": 4, "vq": 4, "kmeans": 4, "dvae_large": 8}  # of tokenizers, and their strides
CHANGES = {
    "supervised": {"classes": 3, "mix_block": 4},
    "cmae": {"hidden": 24, "out": 16},
    "cmae_huang": {"hidden": 24, "out": 16, "shift": 3, "feature_depth": 1},
}
# a part of the student, and the teacher that is its average
TEACHERS = {
    "cmae": ("projector.", "target_projector."),
    "cmae_huang": ("projector.", "target_projector."),
    "ibot": ("head.", "teacher_head."),
    "data2vec": ("encoder.", "teacher."),
    "mocov3": ("projector.", "key_projector."),
    "dino": ("head.", "teacher_head."),
}


def small_run(method: str, images: Path, run_dir: Path, *, depth: int = 1, **changes) -> Run:
    """The method as its paper has it, fitted to a tiny encoder with all its parts; or a tiny tokenizer."""
    run = tiny_run(images, run_dir, method="mae", **changes)
    if method in KINDS:
        config, sizes = TRAININGS[method](), {"codes": 16, "hidden": 8, "code_width": 8, "blocks": 1}
        small = {name: size for name, size in sizes.items() if hasattr(config, name)}
        return replace(run, method=replace(config, **small), model=geometry(16, KINDS[method]))
    model = replace(MODEL, depth=depth, **METHODS[method].encoder)
    config = METHODS[method]().fit(model, DecoderConfig(width=16, depth=1, heads=2))
    return replace(run, method=replace(config, **CHANGES.get(method, {})), model=model)


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("method", OTHERS)
def test_resumed_in_mid_run_to_the_last_bit(images, tmp_path, method, zero):
    """A teacher, a center, frozen codes, dropped paths: all goes on as it would have."""
    train_and_resume(images, tmp_path, zero=zero, total=12, stop=4, make=partial(small_run, method))
    assert_same(tmp_path, 12, 4)
    if method not in TEACHERS:
        return
    of_student, of_teacher = TEACHERS[method]
    state = load_file(tmp_path / "whole" / "model.safetensors")
    students = {name: t for name, t in state.items() if name.startswith(of_student)}
    assert students
    for name, student in students.items():  # it followed, and did not become it
        teacher = state[of_teacher + name.removeprefix(of_student)]
        if student.ndim > 1 and not name.endswith("weight_g"):
            assert 0 < (teacher - student).abs().max() < 0.1, name


@pytest.fixture(scope="module")
def on_two_ranks(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_script(Path(__file__).with_name("methods_two_ranks.py"), str(images), str(folder), *OTHERS, *KINDS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", [*OTHERS, *KINDS])
def test_two_sharded_ranks_train_as_one_process(images, on_two_ranks, method):
    """Negatives, batch norm, center, codes and teacher are of the global batch; ZeRO 3 against none."""
    folder = on_two_ranks / method
    train(prepare(small_run(method, images, folder / "one", steps=8, depth=2)))
    rows = {
        name: [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    assert len(rows["one"]) == 8
    for ours, theirs in zip(rows["one"], rows["two"], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-5)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
    states = [load_file(folder / name / "model.safetensors") for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    _, of_teacher = TEACHERS.get(method, ("", ""))
    for name, tensor in states[0].items():
        # not biases: softmax and batch norm take some away, whose gradient is rounding, and AdamW its sign
        if name.startswith(of_teacher) and name.endswith("weight"):
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("method", OTHERS)
def test_in_bf16_under_zero_2(images, tmp_path, method):
    """Losses near those of fp32 and none, weights that moved, all in fp32 when it is over."""
    losses = {}
    for precision, zero in (("fp32", 0), ("bf16", 2)):
        run_dir = tmp_path / precision
        train(
            prepare(small_run(method, images, run_dir, steps=3, precision=precision, zero=zero, log_every=1))
        )
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses[precision] = [row["loss"] for row in rows]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    states = [load_file(tmp_path / precision / "model.safetensors") for precision in losses]
    assert all(tensor.dtype != torch.bfloat16 for tensor in states[1].values())


def test_weights_of_a_run_start_another(images, tmp_path, capsys):
    """MAE's encoder serves C-MAE, whose teacher begins as a copy; C-MAE's whole file serves C-MAE."""
    train(prepare(tiny_run(images, tmp_path / "mae", "mae", steps=2, save_every=2)))
    make = partial(small_run, "cmae")
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
