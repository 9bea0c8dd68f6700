"""What runs a training step, the batches it runs on, the check before it is timed, and the clock.

Engines  deepspeed  that of real training, made by the same function
         plain      bf16 weights, fp32 master copy and moments in torch's fused AdamW: needs PyTorch alone
         autocast   fp32 weights under autocast, as other code trains: what rivals are run by
Check    loss and gradients of a few images, on the device against the reference ops in fp32 on the CPU; then
         the loss of the very step that is timed against the method run eagerly on the same batch. Tolerances
         are relative, of the loss and of the norm of all gradients together.
"""

import argparse
import atexit
import copy
import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
from fastmim_kernels import ema_update, sample_seeds
from torch import Tensor, nn

from benchmarks.provenance import DEVICE, NULL
from fastmim.methods.base import Method, MethodConfig
from fastmim.models.block import Attention
from fastmim.models.vit import ViTConfig
from fastmim.optim import OptimConfig, torch_adamw
from fastmim.optim.groups import parameter_groups
from fastmim.views import Batch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LEARNING_RATE = 1e-4  # constant and small: weights move, and a hundred steps without warm-up diverge nowhere
CHECK_IMAGES = 4
LOSS_TOLERANCE = {"bf16": 1e-2, "fp32": 1e-4}  # of the loss
GRAD_TOLERANCE = {"bf16": 0.1, "fp32": 1e-3}  # of the norm of all gradients together
# where images are compared with one another, behind batch norm: of four, roundings of bf16 move it by 66 %
COUPLED_CHECK_IMAGES = 16
COUPLED_GRAD_TOLERANCE = {"bf16": 0.3, "fp32": 1e-3}


class WrongLoss(RuntimeError):
    """What would have been timed computes something else."""


# --- engines ----------------------------------------------------------------------------------------


class Engine(Protocol):
    """What is timed, in its three stages."""

    name: str

    def forward(self, batch: Batch) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...

    def update(self) -> None: ...


class PlainEngine:
    """Weights in `dtype`; below fp32 a master copy that AdamW updates. Needs PyTorch alone."""

    name = "plain"

    def __init__(self, method: Method, dtype: torch.dtype, optim: OptimConfig):
        self.method = method.to(DEVICE, dtype)
        self.has_master = dtype != torch.float32
        groups = parameter_groups(
            method.named_parameters(), weight_decay=optim.weight_decay, group=method.group
        )
        self.weights = [p for group in groups for p in group["params"]]
        self.masters = self.weights
        if self.has_master:
            self.masters = [p.detach().float().requires_grad_() for p in self.weights]
            masters = iter(self.masters)
            groups = [{**group, "params": [next(masters) for _ in group["params"]]} for group in groups]
            for master in self.masters:
                master.grad = torch.empty_like(master)
        self.optimizer = torch_adamw(groups, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        self.pair_averages()

    def pair_averages(self) -> None:
        """The teacher's weights, what is kept of them in fp32, and what that follows."""
        master_of = {id(weight): master for weight, master in zip(self.weights, self.masters, strict=True)}
        pairs = [
            (t, master_of[id(s)])
            for teacher, student in self.method.averages()
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
            if id(s) in master_of
        ]
        self.teacher, self.followed = ([pair[i] for pair in pairs] for i in range(2))
        self.averaged = [t.detach().float() if self.has_master else t for t in self.teacher]

    def forward(self, batch: Batch) -> Tensor:
        return self.method(batch).loss

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        if self.has_master:
            torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.weights])
        self.optimizer.step()
        if self.has_master:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        if self.teacher:
            ema_update(self.averaged, self.followed, self.method.momentum(0.5))
            if self.has_master:
                torch._foreach_copy_(self.teacher, self.averaged)
        for p in self.weights:
            p.grad = None
        self.method.after_step(0.5)


class DeepSpeedEngine:
    """The engine of real training, made by the same function."""

    name = "deepspeed"

    def __init__(self, method: Method, config: MethodConfig, model: ViTConfig, arguments: argparse.Namespace):
        from fastmim.data import MemoryImages
        from fastmim.engine.clip import Gradients
        from fastmim.engine.config import Run, make_plan
        from fastmim.engine.deepspeed import (
            leave_process_group,
            set_rates,
            start_process_group,
            wrap,
        )
        from fastmim.engine.teacher import Teacher

        self.ranks = start_process_group(DEVICE)
        method.share(self.ranks)
        atexit.register(leave_process_group)
        batch = arguments.batch * self.ranks.world
        run = Run(
            method=config,
            model=model,
            batch=batch,
            steps=1000,
            precision=arguments.precision,
            zero=arguments.zero,
        )
        plan = make_plan(
            run,
            MemoryImages([b""] * batch, labels=[0] * batch),
            world=self.ranks.world,
            device="cuda" if DEVICE == "cuda" else "cpu",
        )
        self.wrapped, groups = wrap(method, run, plan)
        self.teacher = Teacher(self.wrapped, self.ranks)
        self.gradients = Gradients(self.wrapped, groups, run.optim)
        self.wrapped.train()
        schedules = {None, *(group["schedule"] for group in groups)}
        set_rates(self.wrapped, groups, dict.fromkeys(schedules, LEARNING_RATE), run.optim.weight_decay, 0)

    def forward(self, batch: Batch) -> Tensor:
        return self.wrapped(batch).loss

    def backward(self, loss: Tensor) -> None:
        from fastmim.engine.deepspeed import backward

        backward(self.wrapped, loss)

    def update(self) -> None:
        self.gradients.clip(epoch=0)
        self.wrapped.step()
        self.teacher.step(0.5)
        self.wrapped.module.after_step(0.5)


class AutocastEngine:
    """How other code trains: fp32 weights under autocast, fused AdamW. `module(batch)` is the loss."""

    name = "autocast"

    def __init__(self, module: nn.Module, precision: str, optim: OptimConfig):
        self.module = module.to(DEVICE).train()
        self.half = precision == "bf16"
        groups = parameter_groups(module.named_parameters(), weight_decay=optim.weight_decay)
        self.optimizer = torch_adamw(groups, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE

    def forward(self, batch: Batch) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.half):
            return self.module(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        after_update: Any = getattr(self.module, "after_update", None)
        if after_update:  # a teacher of its own
            after_update()


def why_no_deepspeed() -> str | None:
    """What keeps DeepSpeed from being used here, or None. It is imported: no metadata tells."""
    try:
        import fastmim.engine.deepspeed  # noqa: F401
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def make_engine(
    method: Method, config: MethodConfig, model: ViTConfig, arguments: argparse.Namespace
) -> Engine:
    """The engine asked for; `auto` is DeepSpeed, or plain where that cannot be had, and says so."""
    obstacle = None if arguments.engine == "plain" else why_no_deepspeed()
    if arguments.engine == "deepspeed" and obstacle:
        raise ValueError(f"engine: DeepSpeed asked for, but {obstacle}")
    if arguments.engine == "plain" or obstacle:
        if obstacle:
            print(f"engine  plain: {obstacle}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("engine: the plain engine has one rank; several want DeepSpeed")
        return PlainEngine(method, DTYPES[arguments.precision], OptimConfig())
    return DeepSpeedEngine(method, config, model, arguments)


# --- batches ----------------------------------------------------------------------------------------


def synthetic(method: Method, channels: int, size: int, device: str = DEVICE) -> Batch:
    """A batch of noise: no two pixels alike, no value zero for long."""
    rng = torch.Generator(device).manual_seed(0)
    crops = tuple(
        torch.randint(0, 256, (size, *v.size, channels), generator=rng, dtype=torch.uint8, device=device)
        for v in method.crops
    )
    ids = torch.arange(size)
    labels = (ids % 2).to(device) if method.config.labeled else None
    return Batch(crops, sample_seeds(0, 0, ids).to(device), ids, 0, labels)


def first(batch: Batch, size: int, device: str) -> Batch:
    crops = tuple(crop[:size].to(device) for crop in batch.crops)
    labels = None if batch.labels_B is None else batch.labels_B[:size].to(device)
    return Batch(crops, batch.seeds_B[:size].to(device), batch.ids_B[:size], batch.epoch, labels)


def repeated(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


# --- check ------------------------------------------------------------------------------------------


def check_images(method: Method) -> int:
    """How many images are enough for a comparison."""
    return COUPLED_CHECK_IMAGES if method.config.couples_batch else CHECK_IMAGES


def check_method(method: Method, batch: Batch, precision: str) -> dict[str, float]:
    """Loss and gradients of a few images, on the device in `precision` against fp32 on the CPU.

    The CPU runs the references of the ops. Returns the relative errors; raises WrongLoss beyond tolerance.
    """
    results = []
    for device, dtype in (("cpu", torch.float32), (DEVICE, DTYPES[precision])):
        twin = copy.deepcopy(method).to(device, dtype)
        if device == "cpu":
            use_any_attention(twin)
        loss = twin(first(batch, check_images(method), device)).loss
        loss.backward()
        grads = [p.grad.double().cpu().flatten() for p in twin.parameters() if p.grad is not None]
        results.append((loss.item(), torch.cat(grads)))
    (expected, grad), (loss, actual) = results
    errors = {
        "loss_error": relative(loss, expected),
        "grad_error": ((actual - grad).norm() / grad.norm()).item(),
    }
    demand("loss on the device", errors["loss_error"], LOSS_TOLERANCE[precision])
    tolerance = COUPLED_GRAD_TOLERANCE if method.config.couples_batch else GRAD_TOLERANCE
    demand("gradient on the device", errors["grad_error"], tolerance[precision])
    return errors


def use_any_attention(method: Method) -> None:
    """On the CPU the one that serves there, whatever was asked for on the device."""
    for module in method.modules():
        if isinstance(module, Attention):
            module.backend = "auto"


def check_step(engine: Engine, method: Method, batch: Batch, precision: str) -> float:
    """The loss of the step that will be timed, once it is the eager method's own on this batch."""
    with torch.no_grad():
        expected = method.forward(batch).loss.item()  # `forward`, not a call: never the compiled one
    loss = step(engine, batch).item()
    demand("loss of the step", relative(loss, expected), LOSS_TOLERANCE[precision])
    return loss


def relative(actual: float, expected: float) -> float:
    if NULL:
        return 0.0
    return abs(actual - expected) / abs(expected)


def demand(what: str, error: float, tolerance: float) -> None:
    if NULL:  # its values are no one's
        return
    if not error <= tolerance:
        raise WrongLoss(f"{what}: want a relative error of at most {tolerance:g}, got {error:.3g}")


# --- time -------------------------------------------------------------------------------------------


class Clock:
    """Marks on the device's own time line; on a CPU, on the wall's."""

    def mark(self) -> Any:
        if DEVICE == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        return (end - start) * 1e3 if DEVICE == "cpu" else start.elapsed_time(end)


def step(engine: Engine, batch: Batch, mark: Callable[[], None] = lambda: None) -> Tensor:
    loss = engine.forward(batch)
    mark()
    engine.backward(loss)
    mark()
    engine.update()
    return loss.detach()


def time_steps(engine: Engine, batches: Iterator[Batch], count: int) -> list[list[float]]:
    """Milliseconds of each step: whole, waiting for the batch, forward, backward, update."""
    clock, marks = Clock(), []

    def mark() -> None:
        marks.append(clock.mark())

    for _ in range(count):
        mark()
        batch = next(batches)
        mark()
        step(engine, batch, mark)
    mark()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    starts = marks[::4]
    whole = [clock.ms(a, b) for a, b in pairwise(starts)]
    stages = [clock.ms(a, b) for a, b in pairwise(marks)]
    return [whole, *(stages[i::4] for i in range(4))]
