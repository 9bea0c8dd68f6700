"""What test_everywhere looks at in processes of their own: digests of all that ranks of a gloo group saw."""

import hashlib
from pathlib import Path

import torch

from fastmim.data import DataConfig, Loader, MemoryImages, SampleOrder, why_no_dali
from fastmim.engine.ranks import Ranks
from tests.data.conftest import encode
from tests.data.test_everywhere import CROPS, STEPS, parts_of
from tests.engine.forked import main, on_ranks

COUNT = 24


def seen(ranks: Ranks, decoder: str, folder: Path, start: int) -> dict:
    """A digest by (step, sample id) of what this rank saw, together with that of the others."""
    images = MemoryImages([encode(i, size=(40 + 3 * i, 64 - i)) for i in range(COUNT)])
    crops = [*CROPS["windows of a master"], *CROPS["several crops of two sizes"]]
    crops = [v for v in crops if v.scale == crops[0].scale or v.box]  # one box for crop 0
    digests = {}
    loader = Loader(
        images, crops, SampleOrder(COUNT, 8, world=ranks.world, rank=ranks.rank, seed=3),
        config=DataConfig(decoder=decoder, threads=1), channels=3, seed=3, device=torch.device("cpu"),
        bad_samples=folder / "bad_samples.jsonl", start_step=start,
    )  # fmt: skip
    with loader:
        for step in range(start, STEPS):
            batch = next(loader)
            for slot, sample_id in enumerate(batch.ids_B.tolist()):
                digest = hashlib.sha256(str(batch.epoch).encode())
                for part in parts_of(batch):
                    digest.update(part[slot].contiguous().numpy().tobytes())
                digests[step, sample_id] = digest.hexdigest()
    everyone = ranks.gather_objects(digests)
    assert sum(map(len, everyone)) == (STEPS - start) * 8
    return {place: digest for part in everyone for place, digest in part.items()}


def digests(folder: Path) -> dict:
    found = {}
    for decoder in ("pillow", "dali") if why_no_dali() is None else ("pillow",):
        found[decoder] = {
            name: agreed(on_ranks(world, lambda ranks, d=decoder, s=start: seen(ranks, d, folder, s)))
            for name, world, start in (("one", 1, 0), ("four", 4, 0), ("four from 4", 4, 4))
        }
    return found


def agreed(answers: list) -> dict:
    """The answer of every rank, which is one."""
    assert all(answer == answers[0] for answer in answers) and isinstance(answers[0], dict), answers[:2]
    return answers[0]


if __name__ == "__main__":
    main([digests])
