"""Few images, cached and repeated to an epoch, through a whole run: its length, its pixels, its resume."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastmim.engine.checkpoint import CheckpointError
from fastmim.engine.config import as_dict, make_plan, run_facts
from fastmim.engine.pretrain import images_of, prepare, train
from fastmim.engine.ranks import RankError
from tests.engine.conftest import tiny_run, write_images
from tests.engine.test_resume import assert_same, train_and_resume


@pytest.fixture(scope="module")
def one_image(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("one"), count=1)


def repeated(images: Path, folder: Path, *, epoch_images: int | None = 40, cache: str = "ram", **changes):
    run = tiny_run(images, folder, **changes)
    return replace(run, data=replace(run.data, epoch_images=epoch_images, cache=cache))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_image_is_trained_on_for_epochs_of_many(one_image, tmp_path, capsys):
    run = repeated(one_image, tmp_path, steps=None, epochs=2.0)
    (one_image / "notes.txt").write_text("")
    train(prepare(run))
    plan = json.loads((tmp_path / "config.json").read_text())["plan"]
    assert (plan["num_samples"], plan["steps_per_epoch"], plan["total_steps"]) == (40, 5, 10)
    assert len(set(losses(tmp_path))) == 10
    said = capsys.readouterr().out
    assert "2.3 kB of decoded images, in the memory of each rank" in said and "5 per 40 images" in said
    assert said.count("left out  1 file that is no image by its name (.txt 1)\n") == 1


def test_a_cache_changes_no_number_of_a_run(images, tmp_path):
    for cache in ("none", "ram", "device"):
        train(prepare(repeated(images, tmp_path / cache, epoch_images=None, cache=cache, steps=3)))
    found = [losses(tmp_path / cache) for cache in ("none", "ram", "device")]
    assert found[0] == found[1] == found[2]
    weights = [load_file(tmp_path / cache / "model.safetensors") for cache in ("none", "ram")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_a_repeated_image_is_resumed_in_mid_epoch(one_image, tmp_path):
    train_and_resume(one_image, tmp_path, zero=1, total=12, stop=7, make=repeated)  # 5 steps are an epoch
    assert_same(tmp_path, 12, 7)


def test_another_epoch_is_another_run_and_another_cache_is_not(one_image, images, tmp_path):
    run = repeated(one_image, tmp_path, steps=4, save_every=2)
    train(prepare(run))
    prepare(repeated(one_image, tmp_path, steps=4, cache="none", resume=True))
    with pytest.raises(CheckpointError, match="data.epoch_images: checkpoint has 40, this run has 48"):
        prepare(repeated(one_image, tmp_path, steps=4, epoch_images=48, resume=True))
    run = tiny_run(images, tmp_path)  # nothing to say of a set that is not repeated: as older checkpoints
    facts = [
        run_facts(replace(run, data=replace(run.data, epoch_images=n)), plan, images_of(run))
        for n in (None, 72)
        if (plan := make_plan(run, images_of(run), world=1, device="cpu"))
    ]
    assert facts[0] == facts[1] and "epoch_images" not in facts[0]["data"]
    assert as_dict(run)["data"]["cache"] == "none"


def test_lengths_and_sizes_that_cannot_be_are_refused_at_the_start(one_image, images, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="batch: want at most the 7 samples of an epoch, got 8"):
        prepare(repeated(one_image, tmp_path, epoch_images=7))
    with pytest.raises(ValueError, match="want at least the 72 images there are, got 71"):
        prepare(repeated(images, tmp_path, epoch_images=71))
    monkeypatch.setattr("fastmim.data.feed.sizes.room_for", lambda where: (1000, 1))
    with pytest.raises(RankError, match="data.cache: want about 165.9 kB for 72 decoded images"):
        prepare(repeated(images, tmp_path, epoch_images=None))
    assert not list(tmp_path.iterdir())
