"""What test_ranks looks at: ranks that talk, wait, fail and die. Each returns every rank's answer."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from fastmim.engine.ranks import RankError, Ranks
from tests.engine.forked import main, on_ranks


def travel(_: Path) -> list:
    def work(ranks: Ranks):
        ranks.barrier()
        gathered = ranks.gather_objects({"rank": ranks.rank, "text": "x" * (1 + 5000 * ranks.rank)})
        told = ranks.broadcast(("from", ranks.rank))
        of_main = ranks.from_main(lambda: f"by {ranks.rank}", "asking")
        own_group = ranks._gloo is not dist.group.WORLD and dist.get_backend(ranks._gloo) == "gloo"
        who = (ranks.rank, ranks.world, ranks.local_rank, ranks.is_main)
        return [(g["rank"], len(g["text"])) for g in gathered], told, of_main, own_group, who

    return on_ranks(3, work)


def rows(_: Path) -> list:
    def work(ranks: Ranks):
        x = (torch.arange(6.0).view(3, 2) + 100 * ranks.rank).requires_grad_()
        gathered = ranks.gather(x.T)  # strided
        return gathered.tolist(), gathered.requires_grad

    return on_ranks(4, work)


def slow_barrier(_: Path) -> list:
    def work(ranks: Ranks):
        ranks.barrier()  # both are up
        start = time.monotonic()
        time.sleep(0.4 * ranks.rank)
        ranks.barrier()
        return time.monotonic() - start

    return on_ranks(2, work)


def failures(_: Path) -> list:
    def fail_on(failing: set[int], ranks: Ranks):
        def fn():
            if ranks.rank in failing:
                raise OSError("no such disk")
            return ranks.rank * 10

        try:
            return ranks.all_succeed(fn, "writing")
        except RankError as error:
            return str(error), type(error.__cause__).__name__

    return on_ranks(2, lambda ranks: [fail_on(failing, ranks) for failing in ({1}, {0, 1}, set())])


def failure_of_main(_: Path) -> list:
    return on_ranks(2, lambda ranks: ranks.from_main(lambda: {}["key"], "looking", raises=LookupError))


def failures_that_do_not_pickle(_: Path) -> list:
    class Local(Exception):
        pass

    def work(ranks: Ranks):
        def fn():
            raise Local(lambda: None) if ranks.rank == 0 else ValueError("other")

        return ranks.all_succeed(fn, "both")

    return on_ranks(2, work)


def killed_peer(_: Path) -> list:
    def work(ranks: Ranks):
        ranks.barrier()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        try:
            ranks.all_succeed(lambda: None, "alone")
        except RuntimeError:
            return time.monotonic() - start

    return on_ranks(2, work)


def no_local_rank(_: Path) -> list:
    def work(ranks: Ranks):
        del os.environ["LOCAL_RANK"]
        return Ranks.from_environment()

    return on_ranks(2, work)


if __name__ == "__main__":
    main(
        [
            travel,
            rows,
            slow_barrier,
            failures,
            failure_of_main,
            failures_that_do_not_pickle,
            killed_peer,
            no_local_rank,
        ]
    )
