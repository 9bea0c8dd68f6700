"""Whole training steps: images per second, MFU, memory. Images are synthetic, uint8, in device memory.

python benchmarks/throughput.py --method mae --model vit_base --batch 256 --precision bf16
python benchmarks/throughput.py --method rmae --model vit_base --sweep batch
python benchmarks/throughput.py --method mae rmae cmae --model vit_large --batch 1024 --fit
python benchmarks/throughput.py --recipe sample --batch 64 --method mae simmim dino
deepspeed benchmarks/throughput.py --method mae --model vit_large --batch 256 --zero 2

A step is forward, backward, the optimizer's update and the method's own `after_step`, through the engine of
real training: `deepspeed`, or `plain` where it is not installed (bf16 weights, an fp32 master copy and its
moments in torch's fused AdamW). Before a step is timed, loss and gradients of the method on the device, with
two blocks of this width, are compared with those of the reference ops in fp32 on the CPU, and the loss of the
step as it will be timed with that of the method run eagerly on the same batch.

Rows go to benchmarks/results/throughput.jsonl.
"""

import os
import sys
from pathlib import Path

# Run as a script, this folder is sys.path[0], where a module of ours could hide another package.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import copy_gb_per_s, matmul_tflop_per_s, quantiles, samples
from benchmarks.cost import beside
from benchmarks.engines import (
    DTYPES,
    Engine,
    check_images,
    check_method,
    check_step,
    make_engine,
    repeated,
    step,
    synthetic,
    time_steps,
)
from benchmarks.flops import step_flops
from benchmarks.ledger import ledger
from benchmarks.op_facts import Op
from benchmarks.provenance import DEVICE, RESULTS, append, device_name, environment
from benchmarks.step_rows import attention_served, describe, fractions, rates, sentence, table
from fastmim.engine.ranks import Ranks
from fastmim.methods import METHODS, suited
from fastmim.methods.base import Method, MethodConfig
from fastmim.methods.tokens import TokensConfig
from fastmim.models import VITS
from fastmim.models.mae_decoder import DecoderConfig
from fastmim.models.vit import ViTConfig
from fastmim.views import Batch

CHECK_DEPTH = 2  # blocks of an encoder are alike: twelve would take a CPU six times as long
KNEE = 0.97  # the knee is the smallest batch that reaches this share of the best rate
STEP_OF_FIT = 32  # images
FILLED = 0.92  # of the memory that is free; the allocator wastes some
FLAT = 1.02  # a batch twice the size that gains less has gained nothing


def from_folder(
    folder: Path, method: Method, model: ViTConfig, arguments: argparse.Namespace, stack: ExitStack
) -> Iterator[Batch]:
    """Batches as real training gets them: read, decoded, cropped, on the device."""
    from fastmim.data import DataConfig, find_images, open_loader

    config = DataConfig(path=folder, decoder=arguments.decoder)
    images, batch = find_images(folder), arguments.batch
    loader = open_loader(
        images, method.crops, batch,
        config=config, channels=model.channels, labeled=method.config.labeled,
    )  # fmt: skip
    return iter(stack.enter_context(loader))


def steps_within(engine: Engine, batches: Iterator[Batch], arguments: argparse.Namespace) -> int:
    """Warm up; then how many steps to time: as many as asked for, but no more than fit in the time."""
    warm = time_steps(engine, batches, arguments.warmup)[0]
    return max(5, min(arguments.steps, int(arguments.seconds * 1e3 / min(warm))))


def shapes_ms(
    config: MethodConfig, model: ViTConfig, batch: int, precision: str, engine: str
) -> tuple[float, float]:
    """Milliseconds of a step whose parts each reach their own ceiling: of its products, and of all else.

    Each product of the step is timed by itself with the library, at its shape and in its layout, on random
    values; what else the step does takes its bytes at the rate of a copy; attention and InfoNCE their FLOP at
    that of a large product, if that is more.
    """
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    products = rest = 0.0
    for op in ledger(config, model, batch=batch, precision=precision, engine=engine):
        if op.product:
            products += op.count * quantiles(samples(product(op), 8)[3:])[1]
        else:
            by_flops = op.flops / matmul_tflop_per_s(DTYPES[op.precision]) / 1e9 if op.flops else 0.0
            rest += op.count * max(op.bytes / copy_gb_per_s() / 1e6, by_flops)
    return products, rest


def product(op: Op) -> Callable[[], Tensor]:
    """A call of the library that computes such a product: `x W'`, `g W` or `g' x`."""
    assert op.product is not None
    size, M, N, K = op.product
    make = partial(torch.randn, device=DEVICE, dtype=DTYPES[op.precision])
    a = make(size, K, M).mT if op.role == "weight gradient" else make(size, M, K)
    b = make(size, N, K).mT if op.role == "forward" else make(size, K, N)
    return partial(torch.mm, a[0], b[0]) if size == 1 else partial(torch.bmm, a, b)


def peak_gib() -> float:
    """The most memory held so far: PyTorch's on the GPU, the process's on a CPU."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**20


def forget_peak() -> None:
    """Let `peak_gib` begin anew."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


# --- command ----------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work(p)
    p.add_argument(
        "--method", choices=METHODS, nargs="+", default=["mae"], help="one after another, each by itself"
    )
    p.add_argument(
        "--sweep",
        choices=["batch"],
        help="double the batch from --batch on: knee, end of memory",
    )
    p.add_argument("--fit", action="store_true", help="a smaller batch where this one wants too much memory")
    p.add_argument(
        "--warm",
        action="store_true",
        help="a step of two blocks, which compiles; nothing is checked or timed",
    )
    p.add_argument("--compile", action="store_true", help="the method under torch.compile")
    p.add_argument("--data", type=Path, help="folder of images to read and decode, instead of synthetic ones")
    p.add_argument("--decoder", choices=["dali", "pillow"], default="dali", help="with --data")
    p.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return p


def add_work(p: argparse.ArgumentParser) -> None:
    """The flags that rivals share."""
    p.add_argument("--model", choices=VITS, default="vit_base")
    p.add_argument("--batch", type=int, default=256, help="images per GPU and step")
    p.add_argument("--precision", choices=DTYPES, default="bf16" if DEVICE == "cuda" else "fp32")
    p.add_argument("--attention", choices=["auto", "xformers", "sdpa", "tile", "varlen"], default="auto")
    p.add_argument("--engine", choices=["auto", "deepspeed", "plain"], default="auto")
    p.add_argument("--zero", type=int, choices=range(4), default=1)
    p.add_argument("--recipe", choices=["cifar10", "sample"], help="all sizes as its")
    p.add_argument("--variant", help="with --recipe, another row of the paper's tables")
    p.add_argument("--image-size", type=int)
    p.add_argument("--patch", type=int)
    p.add_argument("--decoder-size", type=int, nargs=3, metavar=("WIDTH", "DEPTH", "HEADS"))
    p.add_argument("--warmup", type=int, default=5)
    p.add_argument("--steps", type=int, default=40, help="timed steps, at most")
    p.add_argument("--seconds", type=float, default=10.0, help="time for them; five are always timed")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")


def configured(arguments: argparse.Namespace, method: str) -> tuple[MethodConfig, ViTConfig]:
    a = arguments
    if a.recipe is not None:
        from fastmim.recipes import METHOD_RECIPES, SCALES, varied  # what a machine with PyTorch alone lacks

        run = METHOD_RECIPES[method]()
        run = SCALES[a.recipe](varied(run, run.method.variants[a.variant]) if a.variant else run)
        tokens = {"tokenizer": None} if isinstance(run.method, TokensConfig) else {}  # any codes take as long
        return replace(run.method, **tokens), replace(run.model, attention=a.attention)
    changes = {"image_size": a.image_size, "patch": a.patch, "attention": a.attention}
    size = replace(VITS[a.model], **{k: v for k, v in changes.items() if v is not None})
    found: tuple[Any, ViTConfig] = suited(method, size)
    config, model = found
    if a.decoder_size and hasattr(config, "decoder"):
        width, depth, heads = a.decoder_size
        config = replace(config, decoder=DecoderConfig(width=width, depth=depth, heads=heads))
    return config, model


def measure(
    engine: Engine, method: Method, batches: Iterator[Batch], batch: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One line of figures for batches of this size. Raises WrongLoss before anything is timed."""
    config, model = configured(arguments, arguments.method)
    forget_peak()
    figures: dict[str, Any] = {}
    if arguments.zero < 3 or engine.name == "plain":  # of ZeRO 3 the eager method holds no weights
        figures["loss"] = check_step(engine, method, next(batches), arguments.precision)
    whole, *stages = time_steps(engine, batches, steps_within(engine, batches, arguments))
    figures |= rates(whole, batch)
    names = ("waiting", "forward", "backward", "update")
    figures |= {f"ms_{name}": quantiles(times)[1] for name, times in zip(names, stages, strict=True)}
    tflop_per_s = figures["images_per_s"] * step_flops(config, model) / 1e12
    figures |= {"peak_gib": peak_gib(), "tflop_per_s": tflop_per_s}
    figures |= fractions(tflop_per_s, arguments.precision)
    figures |= {"attention": attention_served(model, arguments.precision)}
    what = {"batch": batch, "precision": arguments.precision, "engine": engine.name}
    products, rest = shapes_ms(config, model, **what)
    figures |= {"library_products_ms": products, "shapes_ms": products + rest}
    figures |= {"mfu_of_shapes": figures["shapes_ms"] / figures["ms"]}
    return figures | beside(config, model, device=device_name(), **what)


def fitting(engine: Engine, method: Method, channels: int, asked: int) -> tuple[int, str | None]:
    """The batch asked for, or what of it memory holds: a multiple of `STEP_OF_FIT`, and why.

    The memory of a step grows with its batch in a line; two small steps give it.
    """
    if DEVICE == "cpu":
        return asked, None
    step(engine, synthetic(method, channels, STEP_OF_FIT))  # what is made once: moments, buffers
    peaks = []
    for batch in (STEP_OF_FIT, 2 * STEP_OF_FIT):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step(engine, synthetic(method, channels, batch))
        peaks.append(torch.cuda.max_memory_allocated())
    each = max(1.0, (peaks[1] - peaks[0]) / STEP_OF_FIT)
    torch.cuda.empty_cache()
    room = FILLED * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated())
    most = int((room - peaks[0]) / each) + STEP_OF_FIT
    if most >= asked:
        return asked, None
    wanted = (peaks[0] + (asked - STEP_OF_FIT) * each) / 2**30
    batch = max(STEP_OF_FIT, most // STEP_OF_FIT * STEP_OF_FIT)
    return batch, f"{asked} want {wanted:.0f} GiB of {room / 2**30:.0f}"


def batch_sizes(arguments: argparse.Namespace, found: list[tuple[int, float]]) -> Iterator[int]:
    """The batch asked for, or ever larger ones: until memory ends; on a CPU, until nothing is gained.

    One that was found to fit and does not, for what is free may lie in pieces, gives way to smaller ones.
    """
    batch = arguments.batch
    yield batch
    while arguments.fit and not found and batch > 2 * STEP_OF_FIT:
        batch = batch * 3 // 4 // STEP_OF_FIT * STEP_OF_FIT
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        yield batch
    while arguments.sweep:
        gains = [b[1] / a[1] for a, b in pairwise(found)]
        if DEVICE == "cpu" and len(gains) >= 2 and max(gains[-2:]) < FLAT:
            return
        batch *= 2
        yield batch


def knee(found: Sequence[tuple[int, float]]) -> int:
    """The smallest batch that reaches `KNEE` of the best rate."""
    best = max(rate for _, rate in found)
    return next(batch for batch, rate in sorted(found) if rate >= KNEE * best)


def main(command: Sequence[str] | None = None) -> int:
    p = parser()
    a = p.parse_args(command)
    if min(a.batch, a.warmup, a.steps) < 1:
        p.error(f"want batch, warmup and steps of 1 or more, got {a.batch}, {a.warmup}, {a.steps}")
    if sum((a.data is not None, a.sweep is not None, a.fit)) > 1:
        p.error("want one of --data, --sweep and --fit, got more")
    if a.recipe is not None and (a.image_size or a.patch or a.decoder_size):
        p.error("want --recipe, or --image-size, --patch and --decoder-size, got both")
    for name in a.method if a.variant else ():
        if a.recipe is None or a.variant not in METHODS[name].variants:
            known = ", ".join(METHODS[name].variants) or "none"
            p.error(f"variant: of {name}, with --recipe, there are {known}; got {a.variant}")
    each = [argparse.Namespace(**vars(a) | {"method": name}) for name in a.method]
    rows = [one_method(one) if len(each) == 1 else tried(one) for one in each]
    if len(each) > 1 and os.environ.get("RANK", "0") == "0":
        print(table([found[-1] for found in rows if found]))
    return 0 if all(rows) else 1


def tried(a: argparse.Namespace) -> list[dict[str, Any]]:
    """One of several: what goes wrong with it is said, and the next one has its turn."""
    try:
        return one_method(a)
    except Exception as error:
        print(f"{a.method}: {type(error).__name__}: {' '.join(str(error).split())[:400]}", flush=True)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return []


def built(config: MethodConfig, model: ViTConfig) -> Method:
    """The method alone on this rank: the engines give it theirs."""
    torch.manual_seed(0)
    method = config.build(model)
    method.share(Ranks.single())
    return method


def shallow_of(model: ViTConfig) -> ViTConfig:
    return replace(model, depth=min(CHECK_DEPTH, model.depth))


def checked(config: MethodConfig, model: ViTConfig, precision: str) -> tuple[Method, dict[str, float]]:
    """The method, and how far loss and gradients of a shallow one are from the CPU's. Raises WrongLoss."""
    shallow = built(config, shallow_of(model))
    images = synthetic(shallow, model.channels, check_images(shallow), "cpu")
    errors = check_method(shallow, images, precision)
    return built(config, model), errors


def one_method(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Check it, time it, write its rows; those with figures. WrongLoss before anything is timed."""
    env = environment()
    config, model = configured(a, a.method)
    if a.warm:
        method, shallow = built(config, shallow_of(model)), shallow_of(model)
        step(make_engine(method, config, shallow, a), synthetic(method, model.channels, a.batch))
        return [{}]
    method, errors = checked(config, model, a.precision)
    if a.compile:
        method.compile(dynamic=False)
    engine = make_engine(method, config, model, a)
    why_batch = None
    if a.fit:
        a.batch, why_batch = fitting(engine, method, model.channels, a.batch)
    head = {
        "provider": engine.name + (" compiled" if a.compile else ""),
        "world": int(os.environ.get("WORLD_SIZE", "1")),
        **describe(config, model, a),
        "zero": a.zero if engine.name == "deepspeed" else None,
        "why_batch": why_batch,
        "images": "synthetic" if a.data is None else f"{a.decoder} from a folder",
        **errors,
    }
    found: list[tuple[int, float]] = []
    timed: list[dict[str, Any]] = []
    for batch in batch_sizes(a, found):
        row = head | one_batch(engine, method, batch, a)
        if os.environ.get("RANK", "0") == "0":
            append(a.results / "throughput.jsonl", row | env)
            print(sentence(row), flush=True)
        if "failed" not in row:
            found.append((batch, row["images_per_s"]))
            timed.append(row)
        elif not a.fit:
            break
    if a.sweep and found:
        print(f"knee at batch {knee(found)}; {row.get('failed', f'stopped at {batch}: nothing was gained')}")
    del engine, method
    gc.collect()  # the next one has all memory
    return timed


def one_batch(engine: Engine, method: Method, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one batch size, or that it does not fit."""
    model = configured(arguments, arguments.method)[1]
    try:
        with ExitStack() as stack:
            batches = (
                repeated(synthetic(method, model.channels, batch))
                if arguments.data is None
                else from_folder(arguments.data, method, model, arguments, stack)
            )
            return {"batch": batch} | measure(engine, method, batches, batch, arguments)
    except torch.cuda.OutOfMemoryError:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        return {"batch": batch, "failed": f"batch {batch} does not fit in {total:.0f} GiB"}


if __name__ == "__main__":
    sys.exit(main())
