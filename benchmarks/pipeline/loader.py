"""The loader alone: images per second from encoded images to batches on the training device.

python -m benchmarks.pipeline.loader FOLDER
python -m benchmarks.pipeline.loader FOLDER --packed SHARDS              and from packed shards
python -m benchmarks.pipeline.loader FOLDER --providers dali --threads 8 16 --hw-decoder-load 0.5 0.65 0.8

Question   how many images per second, and per core, does each choice deliver on this machine, against the
           pipeline that MAE's own code has?
Expected   DALI decodes only the box that is wanted, and resized_crop takes a third of Pillow's time for the
           rest: 2x the baseline on few CPU cores, more with a GPU; 3x from shards of short side 256, which
           `fastmim data pack --short-side 256` writes.
Baseline   dataloader: what main_pretrain.py of facebookresearch/mae has. torch.utils.data.DataLoader with a
           process per core: Pillow decodes the whole image, then torchvision's RandomResizedCrop (bicubic),
           RandomHorizontalFlip, ToTensor and Normalize. It delivers float images, normalized; ours are uint8,
           which `gather_patches` normalizes on the device as it reads them, in the time of the step.
Others     dataloader_uint8 stops before the conversion: the same work as ours. dali_plain is DALI's own
           graph: its reader, its random crop, its bicubic resize, which is another filter than Pillow's.
           `_packed` reads the shards of --packed.
How        each turn is a process of its own that starts its provider, discards the first batches and counts
           what comes until the time is up. Turns alternate in rounds. Per core: of all this process may use.
Left out   JPEG decoding at a fraction of the size (libjpeg's DCT scaling, Pillow's `draft`) is faster, but
           another filter: it could only be a choice that is named, and is none here.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.clock import quantiles
from benchmarks.pipeline.providers import NEEDS, PROVIDERS, SIZE, Turn
from benchmarks.provenance import DEVICE, RESULTS, ROOT, append, environment

CORES = len(os.sched_getaffinity(0))
WARM_UP = 6  # batches: more than any of them prepares ahead
Choice = tuple[str, Turn]


def why_absent(name: str, a: argparse.Namespace) -> str | None:
    if name.endswith("_packed") and a.packed is None:
        return "no --packed shards"
    try:
        found = importlib.util.find_spec(NEEDS[name])
    except ModuleNotFoundError:  # the package around it
        found = None
    return None if found else f"{NEEDS[name]} is not installed"


def take_turn(name: str, turn: Turn, seconds: float) -> float:
    """Images per second of one provider, once it runs."""
    as_float = name == "dataloader"
    shape = (turn.batch, 3, SIZE, SIZE) if as_float else (turn.batch, SIZE, SIZE, 3)
    return rate(PROVIDERS[name](turn), shape, seconds, torch.float32 if as_float else torch.uint8)


def rate(
    batches: Iterator[Tensor], shape: tuple[int, ...], seconds: float, dtype: torch.dtype = torch.uint8
) -> float:
    """Images per second that come, past the first. Checks that they are images."""
    for _ in range(WARM_UP):
        crops = next(batches)
    contrast = 1.0 if dtype == torch.uint8 else 1 / 64
    if crops.shape != shape or crops.dtype != dtype or not crops.float().std() >= contrast:
        raise ValueError(f"want {dtype} images {shape}, got {crops.dtype} {tuple(crops.shape)}")
    synchronize()
    start, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    synchronize()
    return count * shape[0] / (time.perf_counter() - start)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# --- photographs for a machine that has none --------------------------------------------------------


def make_photographs(folder: Path, count: int, height: int = 375, width: int = 500) -> None:
    """`count` JPEG files of ImageNet's usual size and about its bytes, of noise at several scales."""
    from PIL import Image

    def one(i: int) -> None:
        rng = np.random.default_rng(i)
        layers = []
        for cells, weight in ((4, 60.0), (24, 30.0), (240, 20.0)):
            field = (rng.standard_normal((cells, cells, 3)) * weight + 128).clip(0, 255).astype(np.uint8)
            layers.append(
                np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC), float)
            )
        pixels = (np.sum(layers, axis=0) - 256).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=92)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, range(count)))


# --- command ----------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="images, nested or flat")
    p.add_argument("--packed", type=Path, help="the same images in shards, for the providers called _packed")
    p.add_argument("--batch", type=int, default=256 if DEVICE == "cuda" else 32)
    p.add_argument("--threads", type=int, nargs="+", default=[CORES], help="one or several, to compare")
    p.add_argument(
        "--hw-decoder-load", type=float, nargs="+", default=[0.65], metavar="SHARE",
        help="share of JPEGs for a GPU's JPEG decoder: one or several, to compare; DALI on a GPU only",
    )  # fmt: skip
    p.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    p.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    p.add_argument("--make", type=int, metavar="COUNT", help="write so many files there, and stop")
    p.add_argument("--turn", choices=PROVIDERS, help=argparse.SUPPRESS)  # in a process of its own
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    a = parser().parse_args(arguments)
    if a.make:
        make_photographs(a.folder, a.make)
        return 0
    if a.turn:
        turn = Turn(a.folder, a.batch, a.threads[0], a.hw_decoder_load[0])
        print(take_turn(a.turn, turn, a.seconds))
        return 0
    env = environment()
    choices = wanted(a)
    rates, failed = turns(choices, a)
    medians = {choice: quantiles(rates[choice])[1] for choice in choices if choice not in failed}
    for choice in choices:
        row = row_of(choice, a, rates[choice], failed.get(choice), baseline_of(choice, medians))
        append(a.results / "loader.jsonl", row | env)
        print(sentence(row), flush=True)
    return 1 if failed or not choices else 0


def wanted(a: argparse.Namespace) -> list[tuple[str, Turn]]:
    """Every provider that can be had, with every number of threads and, where it matters, every load."""
    choices = []
    for name in a.providers:
        if absent := why_absent(name, a):
            print(f"{name:>16}  absent: {absent}")
            continue
        folder = a.packed if name.endswith("_packed") else a.folder
        loads = a.hw_decoder_load if DEVICE == "cuda" and name.startswith("dali") else a.hw_decoder_load[:1]
        choices += [
            (name, Turn(folder.absolute(), a.batch, threads, load)) for threads in a.threads for load in loads
        ]
    return choices


def baseline_of(choice: Choice, medians: dict[Choice, float]) -> tuple[str, float] | None:
    """Name and rate of the baseline with as many threads; DataLoader to floats, or else to uint8."""
    for name in ("dataloader", "dataloader_uint8"):
        for (other, turn), rate in medians.items():
            if other == name and turn.threads == choice[1].threads:
                return name, rate
    return None


def row_of(
    choice: Choice, a: argparse.Namespace, rates: Sequence[float], failed: str | None,
    baseline: tuple[str, float] | None,
) -> dict[str, Any]:  # fmt: skip
    name, turn = choice
    row: dict[str, Any] = {"provider": name, "batch": a.batch, "threads": turn.threads, "image_size": SIZE}
    if DEVICE == "cuda" and name.startswith("dali"):
        row["hw_decoder_load"] = turn.hw_decoder_load
    row |= {"cores": CORES, "turns": len(rates)}
    if failed:
        return row | {"failed": failed}
    low, median, high = quantiles(rates)
    row |= {"images_per_s": median, "images_per_s_p20": low, "images_per_s_p80": high}
    row["images_per_s_per_core"] = median / CORES
    return row | ({"baseline": baseline[0], "of_baseline": median / baseline[1]} if baseline else {})


def sentence(row: dict[str, Any]) -> str:
    load = f", load {row['hw_decoder_load']:g}" if "hw_decoder_load" in row else ""
    head = f"{row['provider']:>16}  {row['threads']:>3} threads{load}"
    if "failed" in row:
        return f"{head}  {row['failed']}"
    spread = f"{row['images_per_s_p20']:.1f} to {row['images_per_s_p80']:.1f}"
    compared = f"  {row['of_baseline']:.2f} x {row['baseline']}" if "baseline" in row else ""
    rate = f"{row['images_per_s']:.1f} img/s ({spread})  {row['images_per_s_per_core']:.1f} per core"
    return f"{head}  {rate}{compared}"


def turns(
    choices: Sequence[Choice], a: argparse.Namespace
) -> tuple[dict[Choice, list[float]], dict[Choice, str]]:
    """Rates of every turn by choice, and the last words of those that failed."""
    rates: dict[Choice, list[float]] = {choice: [] for choice in choices}
    failed: dict[Choice, str] = {}
    for number in range(a.rounds):
        for choice in list(choices)[:: 1 if number % 2 == 0 else -1]:
            name, turn = choice
            flags = [
                "--batch",
                turn.batch,
                "--threads",
                turn.threads,
                "--hw-decoder-load",
                turn.hw_decoder_load,
            ]
            flags += ["--seconds", a.seconds, "--turn", name]
            command = [sys.executable, "-m", "benchmarks.pipeline.loader", turn.folder, *flags]
            run = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
            if run.returncode:
                failed[choice] = (run.stderr.strip().splitlines() or ["no word"])[-1][:200]
            else:
                rates[choice].append(float(run.stdout.split()[-1]))
    return rates, failed


if __name__ == "__main__":
    sys.exit(main())
