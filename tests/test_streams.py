"""No two draws of a sample share a stream, and every draw has one in the table."""

import re
from itertools import combinations
from pathlib import Path

import pytest

from fastmim import streams
from fastmim.streams import BLOCK_BIT, BOXES, STREAMS
from fastmim.views import Crop

ROOT = Path(streams.__file__).parent


def test_no_two_overlap():
    for (a, one), (b, two) in combinations(STREAMS.items(), 2):
        ranges = range(one.first, one.first + one.size), range(two.first, two.first + two.size)
        assert not set(ranges[0]) & set(ranges[1]), (a, b)
    assert max(s.first + s.size for s in STREAMS.values()) < BLOCK_BIT


def test_the_table_has_all_of_them():
    named = [value for value in vars(streams).values() if isinstance(value, streams.Stream)]
    assert sorted(named) == sorted(STREAMS.values())


def test_the_numbers_are_those_that_runs_have_been_made_with():
    first = {name: stream.first for name, stream in STREAMS.items()}
    assert first == {
        "mask": 0, "second mask": 1, "more masks": 2, "cutmix": 90, "mixing": 91, "erasing": 92, "boxes": 100,
        "windows": 200, "colors": 300, "rand augment": 400, "gumbel": 600, "drop path": 700,
    }  # fmt: skip


def test_nobody_draws_from_a_number_of_his_own():
    """What is drawn in fastmim/ names a stream of the table, or takes the default, the first mask's."""
    draws = re.compile(r"(draw_uniform|draw_uint32)\(([^()]|\([^()]*\))*\)|stream=[^,)]*\)?")
    for path in ROOT.rglob("*.py"):
        for found in draws.finditer(path.read_text()):
            assert ".of(" in found[0] or found[0] == "stream=stream)", f"{path.name}: {found[0]}"


def test_a_number_beyond_the_range_is_refused():
    assert BOXES.of(99) == 199
    with pytest.raises(ValueError, match="from 0 to 99 of this stream, got 100"):
        BOXES.of(100)
    with pytest.raises(ValueError, match="box and draw from 0 to 99"):
        Crop(size=(8, 8), box=BOXES.size)
