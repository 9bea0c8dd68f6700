"""The probe of a run: its numbers, that it disturbs nothing, on two ranks, resumed; and what it refuses."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmim.data import find_images
from fastmim.data.feed.center import center_crops
from fastmim.engine.config import ProbeConfig
from fastmim.engine.pretrain import prepare, train
from fastmim.engine.probe import modes_kept
from fastmim.evals.features import features_of
from fastmim.evals.knn import knn
from fastmim.interop.encoders import load_encoder
from tests.engine.conftest import tiny_run, write_images
from tests.engine.forked import run_script
from tests.engine.test_methods_train import small_run
from tests.engine.test_resume import assert_same, train_and_resume

STEPS = 12  # of 9 an epoch


def probed_run(method, images, val, run_dir, **changes):
    run = small_run(method, images, run_dir, **{"steps": STEPS, **changes})
    return replace(run, probe=ProbeConfig(data=val, every=1, images=41))


@pytest.fixture(scope="module")
def val(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("probed"), 47)


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["cmae", "data2vec", "mocov3"])
def test_it_looks_after_each_epoch_and_changes_no_loss(method, images, val, tmp_path):
    """With batch norm, a teacher, drop path: all that a mode or a running mean could change."""
    train(prepare(probed_run(method, images, val, tmp_path / "with")))
    train(prepare(small_run(method, images, tmp_path / "without", steps=STEPS)))
    with_it, without = rows_of(tmp_path / "with"), rows_of(tmp_path / "without")
    assert [row["step"] for row in with_it if "knn_cls" in row] == [9, STEPS]
    assert [row["loss"] for row in with_it] == [row["loss"] for row in without]
    assert [row["grad_norm"] for row in with_it] == [row["grad_norm"] for row in without]
    states = [load_file(tmp_path / which / "model.safetensors") for which in ("with", "without")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    found = find_images(val)
    ids = [i * 47 // 41 for i in range(41)]
    crops = center_crops(found, (16, 16), ids=ids)
    x = features_of(load_encoder(tmp_path / "with"), (pixels for pixels, _ in crops), torch.device("cpu"))
    labels = torch.from_numpy(found.labels[ids]).long()
    asked = torch.arange(41) % 5 == 4
    for kind in ("cls", "mean"):
        scores = knn(x[kind][~asked], labels[~asked], x[kind][asked], labels[asked], (20,))
        assert with_it[-1][f"knn_{kind}"] == dict(scores)["knn_20"]
    assert (tmp_path / "with" / "loss.png").stat().st_size > (
        tmp_path / "without" / "loss.png"
    ).stat().st_size


def test_two_sharded_ranks_find_what_one_finds(images, val, tmp_path):
    run_script(Path(__file__).with_name("probe_two_ranks.py"), *map(str, (images, val, tmp_path / "two")))
    train(prepare(probed_run("cmae", images, val, tmp_path / "one")))
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-5)
        assert theirs.get("knn_mean") == pytest.approx(ours.get("knn_mean"), abs=0.13)  # one vote of eight
    assert sum("knn_cls" in row for row in two) == 2


def test_resumed_with_its_rows(images, val, tmp_path):
    make = partial(lambda images, run_dir, **changes: probed_run("cmae", images, val, run_dir, **changes))
    train_and_resume(images, tmp_path, zero=1, total=18, stop=9, make=make)
    assert_same(tmp_path, 18, 9)
    assert [row["step"] for row in rows_of(tmp_path / "resumed") if "knn_cls" in row] == [9, 18]


def test_modes_are_as_they_were():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1).eval(), torch.nn.Dropout())
    with modes_kept(model):
        model.eval()
    assert model.training and not model[0].training and model[1].training


def test_what_cannot_be_probed_is_refused(images, val, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(val.rglob("*.jpg"))[:30]:
        (flat / path.name).write_bytes(path.read_bytes())
    run = tiny_run(images, tmp_path / "run", "mae")
    for config, message in [
        (ProbeConfig(data=flat), "probe.data: want labeled images"),
        (ProbeConfig(data=val, images=24), "want at least 25 images"),
    ]:
        with pytest.raises(Exception, match=message):
            prepare(replace(run, probe=config))
    with pytest.raises(ValueError, match="probe.data: want a method that trains an encoder, got kmeans"):
        prepare(probed_run("kmeans", images, val, tmp_path / "run"))
    with pytest.raises(ValueError, match="probe.every: want at least 1, got 0"):
        ProbeConfig(every=0)
    assert not (tmp_path / "run").exists()
