"""Which samples come when: a function of (seed, epoch, position), of no rank and of no history.

    epoch, s       = divmod(step, steps_per_epoch)
    permutation    = ids sorted by the words of philox(key=(seed, epoch))
    rank's samples = permutation[s * batch + (micro_step * world + rank) * micro :][:micro]

The samples of a step are the same set whatever the number of ranks and micro-steps. What does not fill a
step at the end of an epoch is left out of it, other samples in every epoch.
"""

import numpy as np


class SampleOrder:
    """`batch` is the effective batch, over all ranks and micro-steps of one optimizer step."""

    def __init__(
        self,
        num_samples: int,
        batch: int,
        *,
        accumulate: int = 1,
        world: int = 1,
        rank: int = 0,
        seed: int = 0,
    ):
        if min(batch, accumulate, world) < 1 or not 0 <= rank < world:
            got = f"{batch=}, {accumulate=}, {world=}, {rank=}"
            raise ValueError(f"want counts >= 1 and a rank below world, got {got}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"want 0 <= seed < 2**64, got {seed}")
        if batch > num_samples:
            raise ValueError(f"want a batch of at most the {num_samples} samples there are, got {batch}")
        parts = world * accumulate
        if batch % parts:
            near = (batch // parts * parts, (batch // parts + 1) * parts)
            fits = " or ".join(str(n) for n in near if 0 < n <= num_samples)
            raise ValueError(
                f"want a batch divisible by {world} ranks x {accumulate} micro-steps = {parts}, got {batch};"
                f" {fits or f'no batch of at most {num_samples} samples'} would fit"
            )
        self.num_samples, self.batch, self.seed = num_samples, batch, seed
        self.accumulate, self.world, self.rank = accumulate, world, rank
        self.micro = batch // parts
        self.steps_per_epoch = num_samples // batch
        self.left_out = num_samples % batch  # samples per epoch
        self._permutation: tuple[int, np.ndarray] | None = None

    def ids(self, step: int, micro_step: int = 0) -> tuple[int, np.ndarray]:
        """Epoch and sample ids, int64 `[micro]`, of this rank's micro-step."""
        if step < 0 or not 0 <= micro_step < self.accumulate:
            raise ValueError(f"want step >= 0 and micro_step < {self.accumulate}, got {step=}, {micro_step=}")
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.batch + (micro_step * self.world + self.rank) * self.micro
        return epoch, self._permuted(epoch)[start : start + self.micro].astype(np.int64)

    def _permuted(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            # sorted raw words and not Generator.permutation: NumPy keeps the words of a bit generator
            # across versions, but not what its Generator makes of them
            words = np.random.Philox(key=[self.seed, epoch]).random_raw(self.num_samples)
            self._permutation = epoch, np.argsort(words, kind="stable").astype(np.int32)
        return self._permutation[1]
