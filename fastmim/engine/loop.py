"""The training loop: no method's name, no wait for the device between two log steps.

A step is one optimizer update over `accumulate` micro-batches. One whose gradients are not finite leaves the
weights as they were. Losses, metrics and whether the weights are finite stay on the device until
`metrics.due`, where one small transfer brings a whole interval of them to the host. Nothing is saved before
that transfer has shown it to be finite.

Limits  DeepSpeed itself waits in each step in which it reads the norm of the gradients: in ZeRO 3, in bf16 in
        ZeRO 0, and in ZeRO 1 with --accumulate. Otherwise ZeRO 1 and 2 wait for nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed

from fastmim.engine.clip import Gradients
from fastmim.engine.config import Plan, Run
from fastmim.engine.deepspeed import backward, set_rates
from fastmim.engine.finite import Finite
from fastmim.engine.metrics import Metrics, Stopwatch
from fastmim.engine.stop import Agreement, Stopped
from fastmim.engine.teacher import Teacher
from fastmim.engine.watchdog import Watchdog
from fastmim.optim import OptimConfig
from fastmim.optim.schedule import learning_rate, weight_decay
from fastmim.views import Batch


def train_loop(
    engine: deepspeed.DeepSpeedEngine,
    groups: Sequence[Mapping[str, Any]],
    teacher: Teacher,
    batches: Iterator[Batch],
    metrics: Metrics,
    save: Callable[[int], None],
    end_of: Callable[[int], None] = lambda _: None,
    probe: Callable[[int], Mapping[str, float]] = lambda _: {},
    *,
    agreement: Agreement,
    watchdog: Watchdog,
    run: Run,
    plan: Plan,
    start_step: int,
) -> None:
    """Train from `start_step` finished steps to `plan.total_steps`. Raises `NonFinite` within an interval.

    Raises `Stopped` after a save, on all ranks, where one of them was asked to stop.

    What `probe` finds after a step joins its row. `end_of` is told of each step, after it was saved if it was
    to be.
    """
    engine.train()
    finite, gradients = Finite(engine, teacher), Gradients(engine, groups, run.optim)
    waiting, schedules = Stopwatch(), {None, *(group["schedule"] for group in groups)}
    for step in range(start_step, plan.total_steps):
        epoch = step // plan.steps_per_epoch
        rates = {name: rate_at(step, run.optim, plan, name) for name in schedules}
        set_rates(engine, groups, rates, decay_at(step, run.optim, plan), epoch)
        outputs = []
        for micro_step in range(run.accumulate):
            with waiting:
                batch = next(batches)
            output = engine(batch)
            backward(engine, output.loss)
            if micro_step == run.accumulate - 1:
                norm = gradients.clip(epoch=epoch)
                finite.guard(norm)
            engine.step()  # updates after the last micro-batch only
            outputs.append(output)
        done = step + 1
        teacher.step(done / plan.total_steps)
        engine.module.after_step(done / plan.total_steps)
        stopping = agreement.reached() and done < plan.total_steps
        saving = done % run.save_every == 0 or done == plan.total_steps or stopping
        metrics.add(done, rates[None], outputs, norm, *finite.look(everything=saving))
        if found := probe(done):
            metrics.also(done, found)
        if metrics.due(done) or saving:
            metrics.flush(seconds_waiting=waiting.take())  # raises before what is not finite is saved
        if saving:
            with watchdog.during("save"):
                save(done)
            metrics.restart_clock()
        if stopping:
            raise Stopped(f"stopped after step {done}: {agreement.stop.why}", agreement.stop.status)
        end_of(done)
        watchdog.beat()


def rate_at(step: int, config: OptimConfig, plan: Plan, schedule: str | None = None) -> float:
    """Learning rate of the step after `step` finished ones, by this schedule or the run's."""
    return learning_rate(
        step,
        peak=plan.peak_lr,
        warmup_steps=plan.warmup_steps,
        warmup_start=config.warmup_start,
        total_steps=plan.total_steps,
        min_lr=config.min_lr,
        schedule=config.schedule if schedule is None else schedule,  # type: ignore[arg-type]
        milestones=plan.milestones,
        gamma=config.gamma,
    )


def decay_at(step: int, config: OptimConfig, plan: Plan) -> float:
    """Weight decay of the same step."""
    start, end = config.weight_decay, config.weight_decay_end
    return weight_decay(step, start=start, end=end, total_steps=plan.total_steps)
