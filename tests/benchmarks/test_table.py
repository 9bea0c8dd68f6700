"""Loader, step and both: what is timed is what trains, and waiting is counted where it happens."""

import json
import time

import pytest
import torch

from benchmarks.pipeline import loader, table
from fastmim.methods import METHODS

pytest.importorskip("PIL")
TINY = "--model vit_tiny --image-size 32 --patch 8 --decoder-size 32 1 2 --batch 4 --steps 2 --rounds 1"


@pytest.fixture
def photographs(tmp_path):
    loader.make_photographs(tmp_path / "photographs", 8, height=60, width=80)
    return tmp_path / "photographs"


def rows(folder):
    return [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]


def test_every_method_has_a_row(photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table, "UNCOUNTED", 1)
    flags = f"{TINY} --engine plain --decoder pillow --threads 1 --results {tmp_path}"
    assert table.main([str(photographs), *flags.split()]) == 0
    found = rows(tmp_path)
    assert [row["method"] for row in found] == list(METHODS)
    for row in found:
        rates = [row[f"{part}_images_per_s"] for part in ("loader", "step", "both")]
        assert min(rates) > 0 and 0 < row["waiting"] < 1 and row["engine"] == "plain"
        assert row["both_of_slower"] == pytest.approx(rates[2] / min(rates[:2]))
    shown = capsys.readouterr().out
    assert all(name in shown for name in METHODS)


class Engine:
    """Takes as long as it is told."""

    name = "asleep"

    def __init__(self, seconds: float):
        self.seconds = seconds

    def forward(self, batch):
        time.sleep(self.seconds)
        return torch.zeros(())

    def backward(self, loss):
        pass

    def update(self):
        pass


def endless(seconds: float):
    while True:
        time.sleep(seconds)
        yield None


@pytest.mark.parametrize(("loading", "stepping"), [(0.08, 0.01), (0.01, 0.08)])
def test_waiting_is_what_a_step_waits_for_its_batch(loading, stepping, monkeypatch):
    monkeypatch.setattr(table, "UNCOUNTED", 1)
    work = table.Work(Engine(stepping), None, endless(loading), None, None)
    a = table.parser().parse_args(["--batch", "4", "--steps", "3", "--rounds", "2"])
    found = table.measure(work, a)
    expected = {"loader": 4 / loading, "step": 4 / stepping, "both": 4 / (loading + stepping)}
    for part, rate in expected.items():  # a busy machine sleeps longer, never shorter
        assert 0.5 * rate < found[f"{part}_images_per_s"] < rate
    assert found["waiting"] == pytest.approx(loading / (loading + stepping), abs=0.1)
    assert found["both_of_slower"] <= 1.1


def test_sizes_without_flags_suit_the_device(monkeypatch):
    monkeypatch.setattr(table, "DEVICE", "cpu")
    assert (table.parser().parse_args([]).model, table.parser().parse_args([]).batch) == ("vit_tiny", 32)
    assert table.parser().parse_args(["--model", "vit_base"]).model == "vit_base"
    monkeypatch.setattr(table, "DEVICE", "cuda")
    assert table.parser().parse_args([]).model == "vit_base"
