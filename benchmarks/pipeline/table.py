"""Where the time goes, per method: the loader alone, the step alone, and both as they train.

python -m benchmarks.pipeline.table                    the embedded sample set, sizes for this device
python -m benchmarks.pipeline.table FOLDER --model vit_base --batch 512 --methods mae

Question   does the loader keep up with the step, and what does a step wait for?
Expected   both = the slower of the two, less what they take from one another: on a CPU they share its
           cores, on a GPU a decoder on the same device.
How        all in one process, in turns whose order is turned in each round. loader: batches of the method's
           own crops, taken as fast as they come. step: the engine of real training on one batch that is
           there. both: the engine on the batches of the loader; `waiting` is the share of the time of these
           steps that is spent in asking for a batch. Queues are emptied, or filled, by batches that do not
           count.
Rows       benchmarks/results/table.jsonl
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as fastmim/train.py; read when torch starts OpenMP

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import quantiles
from benchmarks.engines import Engine, make_engine, repeated, synthetic, time_steps
from benchmarks.provenance import DEVICE, append, environment
from benchmarks.throughput import add_work, configured
from fastmim.engine.ranks import Ranks
from fastmim.methods import METHODS
from fastmim.methods.base import Method
from fastmim.models.vit import ViTConfig
from fastmim.views import Batch

UNCOUNTED = 6  # batches: more than the loader prepares ahead
CPU_SIZE = {"model": "vit_tiny", "image_size": 64, "patch": 8, "decoder_size": [96, 2, 3], "batch": 32}


@dataclass(frozen=True)
class Work:
    """One method, ready to run."""

    engine: Engine
    method: Method
    batches: Iterator[Batch]
    ready: Batch
    model: ViTConfig


def open_work(name: str, folder: Path, a: argparse.Namespace, stack: ExitStack) -> Work:
    from fastmim.data import DataConfig, find_images, open_loader

    if not hasattr(METHODS[name](), "decoder"):
        a = argparse.Namespace(**{**vars(a), "decoder_size": None})
    config, model = configured(a, name)
    torch.manual_seed(0)
    method = config.build(model)
    method.share(Ranks.single())  # the DeepSpeed engine has its own
    engine = make_engine(method, config, model, a)
    data = DataConfig(path=folder, decoder=a.decoder, threads=a.threads)
    loader = open_loader(find_images(folder), method.crops, a.batch, config=data, channels=model.channels)
    batches: Iterator[Batch] = iter(stack.enter_context(loader))
    if config.labeled:  # which ones takes no time: any folder serves
        zeros = torch.zeros(a.batch, dtype=torch.int64, device=DEVICE)
        batches = (replace(batch, labels_B=zeros) for batch in batches)
    return Work(engine, method, batches, synthetic(method, model.channels, a.batch), model)


def loader_alone(work: Work, steps: int) -> tuple[float, float]:
    """Seconds of `steps` batches, and none of waiting for another part."""
    for _ in range(UNCOUNTED):
        next(work.batches)
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        next(work.batches)
    synchronize()
    return time.perf_counter() - start, 0.0


def step_alone(work: Work, steps: int) -> tuple[float, float]:
    return steps_on(work, repeated(work.ready), steps)


def both(work: Work, steps: int) -> tuple[float, float]:
    return steps_on(work, work.batches, steps)


def steps_on(work: Work, batches: Iterator[Batch], steps: int) -> tuple[float, float]:
    """Seconds of `steps` steps, and those of them that were spent in waiting for the batch."""
    time_steps(work.engine, batches, UNCOUNTED)
    whole, waiting, *_ = time_steps(work.engine, batches, steps)
    return sum(whole) / 1e3, sum(waiting) / 1e3


PARTS: dict[str, Callable[[Work, int], tuple[float, float]]] = {
    "loader": loader_alone, "step": step_alone, "both": both,
}  # fmt: skip


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(work: Work, a: argparse.Namespace) -> dict[str, Any]:
    """Images per second of each part, and the share of waiting in both."""
    times: dict[str, list[tuple[float, float]]] = {part: [] for part in PARTS}
    for number in range(a.rounds):
        for part in list(PARTS)[:: 1 if number % 2 == 0 else -1]:
            times[part].append(PARTS[part](work, a.steps))
    figures: dict[str, Any] = {}
    for part, taken in times.items():
        low, median, high = quantiles([a.steps * a.batch / seconds for seconds, _ in taken])
        figures |= {f"{part}_images_per_s": median, f"{part}_p20": low, f"{part}_p80": high}
    figures["waiting"] = sum(w for _, w in times["both"]) / sum(s for s, _ in times["both"])
    slower = min(figures["loader_images_per_s"], figures["step_images_per_s"])
    return figures | {"both_of_slower": figures["both_images_per_s"] / slower}


def sentence(row: dict[str, Any]) -> str:
    rates = "".join(f"{row[f'{part}_images_per_s']:>10.1f}" for part in PARTS)
    return f"{row['method']:<12}{rates}{100 * row['waiting']:>9.1f} %{100 * row['both_of_slower']:>12.1f} %"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, nargs="?", help="images; without it the embedded sample set")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--decoder", choices=["dali", "pillow"], default="dali")
    p.add_argument("--threads", type=int, help="decoding threads; without it all cores")
    p.add_argument("--rounds", type=int, default=3)
    add_work(p)
    p.set_defaults(steps=20, **(CPU_SIZE if DEVICE == "cpu" else {}))
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    a = p.parse_args(arguments)
    if min(a.batch, a.steps, a.rounds) < 1:
        p.error(f"want batch, steps and rounds of 1 or more, got {a.batch}, {a.steps}, {a.rounds}")
    if a.folder is None:
        from fastmim.data.sources.sample import sample_set

        a.folder = sample_set() / "train"
    env = environment()
    print(f"{'img/s':<12}{'loader':>10}{'step':>10}{'both':>10}{'waiting':>11}{'of slower':>14}")
    for name in a.methods:
        with ExitStack() as stack:
            work = open_work(name, a.folder, a, stack)
            row = {
                "method": name, "model": a.model, "image_size": work.model.size, "patch": work.model.patch,
                "engine": work.engine.name, "precision": a.precision, "batch": a.batch, "decoder": a.decoder,
                "steps": a.steps * a.rounds, **measure(work, a),
            }  # fmt: skip
        append(a.results / "table.jsonl", row | env)
        print(sentence(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
