"""A run resumed on other data, ranks or batches is refused, and the difference is said."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastmim.data import find_images
from fastmim.engine.checkpoint import Checkpoint, CheckpointError
from fastmim.engine.config import make_plan, run_facts
from fastmim.engine.pretrain import images_of, prepare, train
from tests.engine.conftest import tiny_run, write_images


def facts_of(run, world: int = 1):
    images = images_of(run)
    return run_facts(run, make_plan(run, images, world=world, device="cpu"), images)


def refusal(before, after, **options) -> list[str]:
    """What a checkpoint of the one run says to the other."""
    checkpoint = Checkpoint(step=5, path=Path("step-5"), world=1, facts=before)
    with pytest.raises(CheckpointError, match="was saved by a run that differs from this one") as error:
        checkpoint.check_facts(after, **options)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_a_file_more_and_a_file_of_another_size(tmp_path):
    images = write_images(tmp_path / "images", 16)
    run = tiny_run(images, tmp_path / "run", steps=2)
    train(prepare(run))
    again = replace(run, resume=True)
    assert prepare(again).found.step == 2
    file = images / "class0" / "000.jpg"
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="data.fingerprint: checkpoint has [0-9a-f]{64}, this run has"):
        prepare(again)
    file.write_bytes(whole)
    assert prepare(again).found.step == 2
    (images / "class0" / "more.jpg").write_bytes(whole)
    with pytest.raises(CheckpointError, match="data.images: checkpoint has 16, this run has 17"):
        prepare(again)
    (images / "class0" / "more.jpg").rename(
        images / "class0" / "000.jpg"
    )  # the same count, another name gone
    assert prepare(again).found.step == 2
    (images / "class0" / "000.jpg").rename(images / "class0" / "00.jpg")
    with pytest.raises(CheckpointError, match="data.fingerprint"):
        prepare(again)


def test_another_order_of_classes(tmp_path):
    images = write_images(tmp_path / "images", 16)
    names = find_images(images).names
    prints = []
    for order in ("abc", "bac"):
        lines = [f"images/{name}\t{order[int(name[5])]}\n" for name in names]
        (tmp_path / "all.txt").write_text("".join(lines))
        prints.append(facts_of(tiny_run(tmp_path / "all.txt", tmp_path)))
    (line,) = refusal(*prints)
    assert line.startswith("data.fingerprint: checkpoint has ")


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"batch": 4}, ["batch: checkpoint has 8, this run has 4"]),
        ({"accumulate": 2}, ["accumulate: checkpoint has 1, this run has 2"]),
        ({"seed": 1}, ["seed: checkpoint has 0, this run has 1"]),
        ({"augment": "strong"}, ["data.augment: checkpoint has recipe, this run has strong"]),
        ({"decoder": "dali"}, ["data.decoder: checkpoint has pillow, this run has dali"]),
    ],
)
def test_other_batches_orders_and_augmentations(changes, lines, images, tmp_path):
    run = tiny_run(images, tmp_path)
    data = {name: changes[name] for name in ("augment", "decoder") if name in changes}
    other = replace(run, data=replace(run.data, **data)) if data else replace(run, **changes)
    assert refusal(facts_of(run), facts_of(other)) == lines


def test_another_number_of_ranks(images, tmp_path):
    """The data would go on alike on any number, but a checkpoint holds a shard for each."""
    run = tiny_run(images, tmp_path)
    four, two = facts_of(run, world=4), facts_of(run, world=2)
    assert refusal(four, two) == ["world: checkpoint has 4, this run has 2"]
    Checkpoint(step=5, path=Path("step-5"), world=4, facts=four).check_facts(facts_of(run, world=4))


def test_what_changes_no_number_is_no_difference(images, tmp_path):
    run = tiny_run(images, tmp_path)
    other = replace(run, data=replace(run.data, threads=2, prefetch=5, hw_decoder_load=0.5), keep=7)
    assert facts_of(run) == facts_of(other)
