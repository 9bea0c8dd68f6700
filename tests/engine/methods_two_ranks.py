"""What test_methods_train starts on two ranks: every method under ZeRO 3.

python tests/engine/methods_two_ranks.py IMAGES FOLDER METHOD...
"""

import sys
from functools import partial
from pathlib import Path

from fastmim.engine.pretrain import prepare, train
from fastmim.engine.ranks import Ranks
from tests.engine.forked import on_ranks
from tests.engine.teacher_scenarios import shard_more_than_biases
from tests.engine.test_methods_train import small_run


def everything(images: Path, folder: Path, methods: list[str], _: Ranks) -> None:
    shard_more_than_biases()
    for method in methods:
        train(prepare(small_run(method, images, folder / method / "two", zero=3, steps=8, depth=2)))


if __name__ == "__main__":
    images, folder, *methods = sys.argv[1:]
    answers = on_ranks(2, partial(everything, Path(images), Path(folder), methods))
    assert answers == [None, None], answers
