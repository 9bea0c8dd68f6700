"""Ranks: objects travel, and a failure on one rank is a failure on all, with its reason."""

from pathlib import Path

import pytest
import torch.distributed as dist

from fastmim.engine.ranks import RankError, Ranks
from tests.engine.forked import scenarios


@pytest.fixture(scope="module")
def answers() -> dict:
    return scenarios(Path(__file__).with_name("ranks_scenarios.py"))


def test_one_process_needs_no_process_group(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # another test's group may be there
    monkeypatch.setattr(dist, "new_group", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.from_environment()
    assert ranks == Ranks.single() == Ranks(rank=0, world=1, local_rank=0)
    ranks.barrier()
    assert ranks.is_main
    assert ranks.gather_objects({"a": 1}) == [{"a": 1}]
    assert ranks.broadcast("x") == "x"
    assert ranks.all_succeed(lambda: 7, "counting") == 7
    assert ranks.from_main(lambda: 8, "counting") == 8
    with pytest.raises(RankError, match="^counting failed: ZeroDivisionError: division by zero$") as caught:
        ranks.all_succeed(lambda: 1 / 0, "counting")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_rows_are_gathered_in_rank_order_without_gradient(answers):
    x = [[0, 2, 4], [1, 3, 5]]
    rows = [[100 * rank + v for v in row] for rank in range(4) for row in x]
    assert answers["rows"] == [(rows, False)] * 4


@pytest.mark.parametrize("fields", [(2, 2, 0), (-1, 1, 0), (0, 1, -1)])
def test_impossible_ranks_are_refused(fields):
    with pytest.raises(ValueError, match="want 0 <= rank < world"):
        Ranks(*fields)


def test_a_launched_rank_without_a_group_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but no process group"):
        Ranks.from_environment()


def test_a_rank_that_does_not_know_its_device_is_refused(answers):
    assert [answer[:2] for answer in answers["no_local_rank"]] == [("raised", "ValueError")] * 2


def test_objects_travel_in_order_and_over_a_group_of_their_own(answers):
    for rank, (gathered, told, of_main, own_group, who) in enumerate(answers["travel"]):
        assert gathered == [(0, 1), (1, 5001), (2, 10001)]
        assert told == ("from", 0)
        assert of_main == "by 0"
        assert own_group  # never the default one, which may be NCCL
        assert who == (rank, 3, rank, rank == 0)


def test_barrier_waits_for_the_slowest(answers):
    assert min(answers["slow_barrier"]) >= 0.39


def test_one_failure_is_raised_everywhere_and_the_ranks_stay_in_step(answers):
    one = "writing failed on rank 1 of 2: OSError: no such disk"
    both = "writing failed on ranks 0, 1 of 2: OSError: no such disk"
    assert answers["failures"] == [
        [(one, "NoneType"), (both, "OSError"), 0],
        [(one, "OSError"), (both, "OSError"), 10],
    ]


def test_an_error_of_rank_0_reaches_all_as_the_type_asked_for(answers):
    text = "looking failed on rank 0 of 2: KeyError: 'key'"
    assert answers["failure_of_main"] == [("raised", "LookupError", text)] * 2


def test_errors_that_do_not_pickle_still_travel(answers):
    first, second = answers["failures_that_do_not_pickle"]
    assert first == second
    assert first[1] == "RankError"
    assert "both failed on rank 0 of 2: Local: " in first[2]
    assert first[2].endswith("on rank 1 of 2: ValueError: other")


def test_a_killed_rank_does_not_leave_the_other_waiting(answers):
    seconds, killed = answers["killed_peer"]
    assert killed is None
    assert seconds < 10
