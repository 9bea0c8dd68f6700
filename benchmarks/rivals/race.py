"""A rival against our method: the same work, the same batch, in turns, in one process.

The rival is built with the weights of our method and shown the same patches of the same images: its loss must
then be ours, in fp32 on the CPU and in the precision of the race on the device. Only then is it timed, as its
users train it: fp32 weights under autocast, torch's fused AdamW, its own random masks; eager and compiled,
and with `--apply` both again with the ops that `fastmim_kernels.apply` puts in, checked in the same way.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastmim_kernels import apply, split_patches
from torch import Tensor, nn

from benchmarks.engines import (
    LOSS_TOLERANCE,
    AutocastEngine,
    Engine,
    WrongLoss,
    check_images,
    check_method,
    check_step,
    demand,
    first,
    make_engine,
    relative,
    repeated,
    step,
    synthetic,
    time_steps,
    use_any_attention,
)
from benchmarks.flops import step_flops
from benchmarks.provenance import DEVICE, append, environment, import_torchvision, module_exists
from benchmarks.step_rows import describe, fractions, rates, sentence
from benchmarks.throughput import add_work, configured, peak_gib
from fastmim.engine.ranks import Ranks
from fastmim.methods.cmae import CMAE
from fastmim.methods.mae import MAE
from fastmim.models.vit import ViTConfig
from fastmim.optim import OptimConfig
from fastmim.views import Batch

ROUNDS = 4
MASK_TOLERANCE = 5e-2  # of the loss of 32 images or more, between two draws of their masks


class Pixels(nn.Module):
    """The float image that other code wants, of the uint8 one that ours reads."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: ViTConfig):
        super().__init__()
        self.register_buffer("mean", torch.tensor(model.pixel_mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(model.pixel_std).view(1, -1, 1, 1))

    def forward(self, image_BHWC: Tensor) -> Tensor:
        return (image_BHWC.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


class Rival(nn.Module):
    """A rival of MAE, `net(pixels, noise)`, as what is raced: `(batch, noise) -> loss`."""

    def __init__(self, net: nn.Module, model: ViTConfig):
        super().__init__()
        self.net, self.pixels = net, Pixels(model)

    def forward(self, batch: Batch, noise_BN: Tensor | None = None) -> Tensor:
        return self.net(self.pixels(batch.crops[0]), noise_BN)


def noise_that_shows(method: MAE | CMAE, batch: Batch) -> Tensor:
    """Noise whose K smallest values are at the patches that our method sees. `[B, N]`"""
    seen_BK, _ = split_patches(batch.seeds_B, method.model.num_patches, method.num_seen)
    noise = torch.ones(len(seen_BK), method.model.num_patches, device=seen_BK.device)
    return noise.scatter_(1, seen_BK, 0.0)


@torch.no_grad()
def check_rival(rival: nn.Module, method: MAE | CMAE, batch: Batch, precision: str) -> float:
    """Its loss on the device, against ours in fp32 on the CPU, from the same weights and the same masks.

    `method` and `batch` are on the CPU. Returns the relative error; raises WrongLoss beyond tolerance.
    """
    twin = copy.deepcopy(method)
    use_any_attention(twin)
    expected = twin(batch).loss.item()
    on_cpu = copy.deepcopy(rival)(batch, noise_that_shows(method, batch)).item()
    demand("loss of the rival in fp32", relative(on_cpu, expected), LOSS_TOLERANCE["fp32"])
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
        noise = noise_that_shows(method, batch).to(DEVICE)
        error = relative(rival.to(DEVICE)(first(batch, len(noise), DEVICE), noise).item(), expected)
    demand("loss of the rival on the device", error, LOSS_TOLERANCE[precision])
    return error


def check_whole_batch(
    provider: str, engine: AutocastEngine, batch: Batch, noise_BN: Tensor, expected: float, precision: str
) -> None:
    """The rival's first loss on the batch that is timed, before its weights move, against our first one.

    Eager it is shown our masks, and both may be off by their tolerance. Compiled it draws its own, which is
    what will be timed: the same graph with masks given would be compiled anew for minutes.
    """
    if provider.endswith(" eager"):
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            loss, tolerance = engine.module(batch, noise_BN), 2 * LOSS_TOLERANCE[precision]
    else:
        loss, tolerance = step(engine, batch), MASK_TOLERANCE * max(1.0, 32 / len(noise_BN)) ** 0.5
    demand(f"loss of {provider} on the whole batch", relative(loss.item(), expected), tolerance)


def unable(
    rivals: dict[str, AutocastEngine],
    batch: Batch,
    noise_BN: Tensor,
    expected: float,
    arguments: argparse.Namespace,
) -> dict[str, dict[str, str]]:
    """Check every rival on the whole batch and warm it up; takes out those that cannot run, and says why."""
    failed = {}
    for provider, engine in list(rivals.items()):
        try:
            check_whole_batch(provider, engine, batch, noise_BN, expected, arguments.precision)
            time_steps(engine, repeated(batch), arguments.warmup)
        except WrongLoss:
            raise
        except Exception as error:  # out of memory, or a compiler that gives up: the others race on
            said = (str(error).strip().splitlines() or [""])[0][:200]
            failed[provider] = {"failed": f"{type(error).__name__}: {said}"}
            del rivals[provider]
        if provider in failed and DEVICE == "cuda":
            torch.cuda.empty_cache()
    return failed


def race(
    engines: dict[str, Engine], batch: Batch, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Figures of each, timed in rounds whose order is turned each time."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    peaks = {}
    count = max(2, arguments.steps // ROUNDS)
    for turn in range(ROUNDS):
        for name in list(engines)[:: 1 if turn % 2 == 0 else -1]:
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[name] += time_steps(engines[name], repeated(batch), count)[0]
            peaks[name] = peak_gib()
    return {name: rates(taken, arguments.batch) | {"peak_gib": peaks[name]} for name, taken in times.items()}


def main(
    name: str,
    package: str,
    build: Callable[[Any], nn.Module],
    command: Sequence[str] | None = None,
    *,
    of: str = "mae",
) -> int:
    """Race `build(method)` of `package`, a map of (batch, noise) to the loss. 3 where that is absent."""
    parser = argparse.ArgumentParser(description=f"{of} by {name} against ours")
    add_work(parser)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled, too"
    )
    parser.add_argument("--apply", action="store_true", help="patched by fastmim_kernels, too")
    a = parser.parse_args(command)
    if not module_exists(package):
        print(f"skipped: {package} is not installed")
        return 3
    if module_exists("torchvision"):
        import_torchvision()  # timm and transformers do
    env = environment()
    torch.manual_seed(0)
    config, model = configured(a, of)
    method: Any = config.build(model)
    method.share(Ranks.single())
    small = synthetic(method, model.channels, check_images(method), "cpu")
    errors: dict[str, float] = {}
    rivals: dict[str, AutocastEngine] = {}
    for variant in (name, f"{name} patched") if a.apply else (name,):
        for mode in ("eager", "compiled") if a.compile else ("eager",):
            rival = build(method)
            if variant != name:
                apply(rival)
            if mode == "eager":
                errors[f"{variant} eager"] = check_rival(rival, method, small, a.precision)
            else:
                rival.compile(dynamic=False)
            rivals[f"{variant} {mode}"] = AutocastEngine(rival, a.precision, OptimConfig())
    own_error = check_method(method, small, a.precision)["loss_error"]
    batch = synthetic(method, model.channels, a.batch)
    noise = noise_that_shows(method, batch)
    ours = make_engine(method, config, model, a)
    errors[ours.name] = own_error
    expected = check_step(ours, method, batch, a.precision)  # of the weights that the rivals still have
    failed = unable(rivals, batch, noise, expected, a)
    time_steps(ours, repeated(batch), a.warmup)
    contestants: dict[str, Engine] = {**rivals, ours.name: ours}
    head = describe(config, model, a) | {"batch": a.batch, "race": name}
    for provider, figures in (race(contestants, batch, a) | failed).items():
        row = head | {"provider": provider, "loss_error": errors.get(provider)} | figures
        if "failed" not in row:
            tflop_per_s = figures["images_per_s"] * step_flops(config, model) / 1e12
            row |= {"tflop_per_s": tflop_per_s} | fractions(tflop_per_s, a.precision)
        if provider != ours.name:
            kernels = "fastmim_kernels.apply" if " patched " in provider else "the rival's own"
            row |= {"attention": "the rival's own", "kernels": kernels}
        append(a.results / "rivals.jsonl", row | env)
        print(sentence(row), flush=True)
    return 0
