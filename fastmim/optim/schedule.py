"""Learning rate and weight decay as functions of progress: of the steps that are done, of how many.

    mae        e < w: lr (s + (1 - s) e / w), else min + (lr - min) (1 + cos(pi (e - w) / (E - w))) / 2
    beit       warm-up from s lr to lr in w equal steps, both ends among them; then half a cosine over the
               rest, of which the last step lies one before its end
    simmim     warm-up as mae's; then min + (lr - min) (1 + cos(pi e / E)) / 2: the cosine counts from the
               first step, and the rate falls a little where warm-up ends
    multistep  warm-up as mae's; then lr gamma^n after n of the milestones
    decay      end + (start - end) (1 + cos(pi e / E)) / 2, without a warm-up

e steps are done of E, the first w of which warm up; s is the share that warm-up starts from, 0 in MAE.

Source  mae: facebookresearch/mae, util/lr_sched.py; e counts fractional epochs there and steps here, which is
        the same as an epoch has a fixed number of steps. MAE's first step has rate 0; that of CMAE as
        released (arXiv:2207.13532) 1e-4 of its peak. beit: cosine_scheduler of microsoft/unilm/beit and
        facebookresearch/dino, also for weight decay. simmim, multistep: microsoft/SimMIM, which leaves the
        former to timm.
"""

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["mae", "beit", "simmim", "multistep"]
SCHEDULES: tuple[Schedule, ...] = ("mae", "beit", "simmim", "multistep")


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: float,
    total_steps: int,
    min_lr: float = 0.0,
    warmup_start: float = 0.0,
    schedule: Schedule = "mae",
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """Rate of the step that follows `step` finished ones. `milestones` are numbers of steps."""
    if schedule == "beit":
        return beit_rate(step, peak, warmup_steps, total_steps, min_lr, warmup_start)
    if step < warmup_steps:
        return peak * (warmup_start + (1.0 - warmup_start) * step / warmup_steps)
    if schedule == "multistep":
        return peak * gamma ** sum(step >= milestone for milestone in milestones)
    if schedule == "simmim":
        progress = step / max(total_steps, 1)
    else:
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def beit_rate(
    step: int, peak: float, warmup_steps: float, total_steps: int, min_lr: float, warmup_start: float
) -> float:
    """Whole steps of warm-up, the first at its start and the last at the peak; then half a cosine."""
    warmup = round(warmup_steps)
    if step < warmup:
        share = step / (warmup - 1) if warmup > 1 else 0.0
        return peak * (warmup_start + (1.0 - warmup_start) * share)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def weight_decay(step: int, *, start: float, end: float | None, total_steps: int) -> float:
    """Decay of the step that follows `step` finished ones: constant without an end, else half a cosine."""
    if end is None:
        return start
    progress = min(step / max(total_steps, 1), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
