"""What test_cmae_ranks looks at: a step of C-MAE on two ranks of a gloo group, and on one."""

from pathlib import Path

import torch

from fastmim.engine.ranks import Ranks
from fastmim.views import Batch
from tests.engine.forked import main, on_ranks
from tests.methods.test_cmae import make_cmae, make_pair

CHOICES = {
    "bn": {"head_norm": "bn"},
    "ragged": {"mask_token": False, "t2": "independent"},
    "all": {"negatives": "all", "symmetric": True},
    "cutmix": {"cutmix": True},
}


def steps(ranks: Ranks) -> dict:
    """Loss, and gradients of this rank's share, by choice."""
    answers = {}
    for name, changes in CHOICES.items():
        cmae, whole = make_cmae(**changes), make_pair(8)
        cmae.share(ranks)
        size = 8 // ranks.world
        own = slice(ranks.rank * size, (ranks.rank + 1) * size)
        batch = Batch(tuple(v[own] for v in whole.crops), whole.seeds_B[own], whole.ids_B[own], 0)
        loss = cmae(batch).loss
        (loss / ranks.world).backward()
        grads = [p.grad.flatten() for p in cmae.parameters() if p.grad is not None]
        answers[name] = loss.item(), torch.cat(grads).tolist()
    return answers


def one(_: Path) -> list:
    return on_ranks(1, steps)


def two(_: Path) -> list:
    return on_ranks(2, steps)


if __name__ == "__main__":
    main([one, two])
