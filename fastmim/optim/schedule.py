"""MAE's learning rate: linear warm-up, then half a cosine, per iteration.

    e < w:   lr (s + (1 - s) e / w)       s the share that warm-up starts from, 0 in MAE
    else     min_lr + (lr - min_lr) (1 + cos(pi (e - w) / (E - w))) / 2

Source  facebookresearch/mae, util/lr_sched.py; e counts fractional epochs there and steps here, which is
        the same as an epoch has a fixed number of steps. MAE's first step has rate 0; CMAE's
        (arXiv:2207.13532, as released) 1e-4 of its peak.
"""

import math


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: float,
    total_steps: int,
    min_lr: float = 0.0,
    warmup_start: float = 0.0,
) -> float:
    """Rate of the step that follows `step` finished ones."""
    if step < warmup_steps:
        return peak * (warmup_start + (1.0 - warmup_start) * step / warmup_steps)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
