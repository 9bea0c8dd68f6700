"""Broken images through both decoders, and that what watches over them sees a crash, a hang, a difference."""

import pytest

from . import fuzz_files

pytest.importorskip("nvidia.dali")


def test_a_hundred_broken_images(tmp_path):
    assert fuzz_files.fuzz(seed=7, first=0, count=104, kept=tmp_path) == []


@pytest.mark.long
def test_two_thousand_broken_images(tmp_path):
    assert fuzz_files.fuzz(seed=0, first=0, count=2000, kept=tmp_path) == []


def test_images_of_a_seed_are_always_the_same_and_broken():
    goods = fuzz_files.originals()
    assert len(goods) >= 14
    some = [fuzz_files.mutated(goods, 3, i) for i in range(60)]
    assert some == [fuzz_files.mutated(fuzz_files.originals(), 3, i) for i in range(60)]
    assert len({data for _, data in some}) == 60
    assert sum(data in goods.values() for _, data in some) < 6


WORKER = """
import json, os, sys, time
seed, first, end = map(int, sys.argv[-3:])
print("{}", flush=True)
for begin in range(first, end, 8):
    print(json.dumps({"begin": begin}), flush=True)
    wrong = []
    if begin <= 10 < min(begin + 8, end):
        FAULT
    print(json.dumps({"done": begin, "outcomes": {"shown": 1}, "wrong": wrong}), flush=True)
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("os.abort()", "SIGABRT"),
        ("time.sleep(100)", "no word for 2 s"),
        ("raise KeyError('of ours')", "of ours"),
        ("wrong = [[10, 'they differ']]", "they differ"),
    ],
)
def test_one_that_ends_the_process_is_named_and_kept(fault, said, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.replace("FAULT", fault))
    monkeypatch.setattr(fuzz_files, "WORKER", [str(worker)])
    monkeypatch.setattr(fuzz_files, "SILENCE_S", 2.0)
    [line] = fuzz_files.fuzz(seed=7, first=0, count=30, kept=tmp_path / "kept")
    assert said in line
    victim = fuzz_files.mutated(fuzz_files.originals(), 7, 10)[1]
    assert (tmp_path / "kept" / "seed7-10.bin").read_bytes() == victim
