"""What test_probe starts on two ranks under ZeRO 3: a run with a probe.

python tests/engine/probe_two_ranks.py IMAGES VAL RUN_DIR
"""

import sys
from functools import partial
from pathlib import Path

from fastmim.engine.pretrain import prepare, train
from fastmim.engine.ranks import Ranks
from tests.engine.forked import on_ranks
from tests.engine.teacher_scenarios import shard_more_than_biases
from tests.engine.test_probe import probed_run


def everything(images: Path, val: Path, run_dir: Path, _: Ranks) -> None:
    shard_more_than_biases()
    train(prepare(probed_run("cmae", images, val, run_dir, zero=3)))


if __name__ == "__main__":
    answers = on_ranks(2, partial(everything, *map(Path, sys.argv[1:])))
    assert answers == [None, None], answers
