"""What test_validate starts on two ranks: transfers with validation, the encoder sharded where it is trained.

python tests/engine/validate_two_ranks.py IMAGES VAL WEIGHTS FOLDER
"""

import sys
from functools import partial
from pathlib import Path

from fastmim.engine.pretrain import prepare, train
from fastmim.engine.ranks import Ranks
from tests.engine.forked import on_ranks
from tests.engine.teacher_scenarios import shard_more_than_biases
from tests.engine.test_validate import transfer_run


def everything(images: Path, val: Path, weights: Path, folder: Path, _: Ranks) -> None:
    shard_more_than_biases()
    for name, zero in (("finetune", 3), ("linear", 0)):
        train(prepare(transfer_run(name, images, val, weights, folder / name / "two", zero=zero)))


if __name__ == "__main__":
    answers = on_ranks(2, partial(everything, *map(Path, sys.argv[1:])))
    assert answers == [None, None], answers
