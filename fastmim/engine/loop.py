"""The training loop: no method's name, no wait for the device between two log steps.

A step is one optimizer update over `accumulate` micro-batches. Losses, metrics and whether the weights are
finite stay on the device until `metrics.due`, where one small transfer brings a whole interval of them to the
host. Nothing is saved before that transfer has shown it to be finite.

Limits  DeepSpeed itself waits in each step in which it reads the norm of the gradients: with --optim.clip, in
        ZeRO 3, in bf16 in ZeRO 0, and in ZeRO 1 with --accumulate. Otherwise ZeRO 1 and 2 wait for nothing.
"""

from collections.abc import Callable, Iterator

import deepspeed

from fastmim.engine.config import Plan, Run
from fastmim.engine.deepspeed import set_learning_rate
from fastmim.engine.finite import Finite
from fastmim.engine.metrics import Metrics, Stopwatch
from fastmim.engine.teacher import Teacher
from fastmim.optim.schedule import learning_rate
from fastmim.views import Batch


def train_loop(
    engine: deepspeed.DeepSpeedEngine,
    teacher: Teacher,
    batches: Iterator[Batch],
    metrics: Metrics,
    save: Callable[[int], None],
    *,
    run: Run,
    plan: Plan,
    start_step: int,
) -> None:
    """Train from `start_step` finished steps to `plan.total_steps`. Raises `NonFinite` within an interval."""
    engine.train()
    finite = Finite(engine, teacher)
    waiting = Stopwatch()
    for step in range(start_step, plan.total_steps):
        rate = learning_rate(
            step,
            peak=plan.peak_lr,
            warmup_steps=plan.warmup_steps,
            warmup_start=run.optim.warmup_start,
            total_steps=plan.total_steps,
            min_lr=run.optim.min_lr,
        )
        set_learning_rate(engine, rate)
        outputs = []
        for _ in range(run.accumulate):
            with waiting:
                batch = next(batches)
            output = engine(batch)
            engine.backward(output.loss)
            engine.step()  # updates after the last micro-batch only
            outputs.append(output)
        done = step + 1
        teacher.step(done / plan.total_steps)
        engine.module.after_step(done / plan.total_steps)
        saving = done % run.save_every == 0 or done == plan.total_steps
        metrics.add(done, rate, outputs, finite.look(everything=saving))
        if metrics.due(done) or saving:
            metrics.flush(seconds_waiting=waiting.take())  # raises before what is not finite is saved
        if saving:
            save(done)
            metrics.restart_clock()
