"""Crops from decoded images: images per second from a set in memory to uint8 batches on the training device.

python -m benchmarks.pipeline.cached CIFAR10/train

Question   what does a cache of decoded images bring for a set that fits in memory, against decoding each time
           and against the DataLoader that such sets are usually trained from?
Expected   for 32 px images a file costs more than its pixels: several times the rate of `files`; and above
           the baseline, which handles one image at a time in Python.
Baseline   torch.utils.data.DataLoader with a process per core over the same decoded pixels: Pillow crops by
           RandomResizedCrop's law, resizes with its bicubic filter and flips. It stops at uint8.
How        each turn is a process of its own that fills its cache, discards the first batches and counts what
           comes until the time is up. Turns alternate in rounds.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.clock import quantiles
from benchmarks.pipeline.loader import rate
from benchmarks.pipeline.providers import crops_of, random_box
from benchmarks.provenance import DEVICE, RESULTS, ROOT, append, environment
from fastmim.data import why_no_dali
from fastmim.data.config import CacheName
from fastmim.data.decode.choose import DecoderName

# --- the baseline -----------------------------------------------------------------------------------


class DecodedImages(Dataset[Tensor]):
    """Images in memory, cut one at a time."""

    def __init__(self, pixels: Sequence[np.ndarray], size: int):
        self.pixels, self.size = pixels, size

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        from PIL import Image

        image = Image.fromarray(self.pixels[i])
        image = image.crop(random_box(image.height, image.width))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image))


def baseline(folder: Path, batch: int, threads: int, size: int) -> Iterator[Tensor]:
    from PIL import Image

    from fastmim.data import find_images

    images = find_images(folder)
    pixels = [np.asarray(Image.open(BytesIO(images.read(i))).convert("RGB")) for i in range(len(images))]
    loader = DataLoader(
        DecodedImages(pixels, size),
        batch_size=batch,
        sampler=RandomSampler(pixels, replacement=True, num_samples=2**31),
        num_workers=threads,
        pin_memory=DEVICE == "cuda",
    )
    for crops in loader:
        yield crops.to(DEVICE, non_blocking=True)


# --- ours -------------------------------------------------------------------------------------------


def ours(
    cache: CacheName, decoder: DecoderName, folder: Path, batch: int, threads: int, size: int
) -> Iterator[Tensor]:
    from fastmim.data import DataConfig

    yield from crops_of(DataConfig(path=folder, decoder=decoder, cache=cache, threads=threads), batch, size)


DECODER: DecoderName = "pillow" if why_no_dali() else "dali"
PROVIDERS: dict[str, Callable[[Path, int, int, int], Iterator[Tensor]]] = {
    "dataloader": baseline,
    "files": partial(ours, "none", DECODER),
    "ram": partial(ours, "ram", DECODER),
    "device": partial(ours, "device", DECODER),
}

# --- command ----------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a set that fits in memory")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32, help="of a crop, in pixels")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--turn", choices=PROVIDERS, help=argparse.SUPPRESS)  # in a process of its own
    a = parser.parse_args(arguments)
    if a.turn:
        batches = PROVIDERS[a.turn](a.folder, a.batch, a.threads, a.size)
        print(rate(batches, (a.batch, a.size, a.size, 3), a.seconds))
        return 0
    if DEVICE == "cpu" and "device" in a.providers:
        print(f"{'device':>10}  absent: the device is the CPU, where it is the same as ram")
        a.providers = [name for name in a.providers if name != "device"]
    env, failures = environment(), 0
    for name, rates, words in turns(a):
        row = {"provider": name, "batch": a.batch, "threads": a.threads, "image_size": a.size}
        row |= {"decoder": None if name == "dataloader" else DECODER}
        if words:
            row, failures = row | {"failed": words}, failures + 1
        else:
            low, median, high = quantiles(rates)
            row |= {"images_per_s": median, "images_per_s_p20": low, "images_per_s_p80": high}
            words = f"{median:.0f} img/s ({low:.0f} to {high:.0f})"
        append(a.results / "cached.jsonl", row | {"turns": len(rates)} | env)
        print(f"{name:>10}  {words}", flush=True)
    return 1 if failures or not a.providers else 0


def turns(a: argparse.Namespace) -> list[tuple[str, list[float], str]]:
    """Each provider, the rates of its turns, and the last words of one that failed."""
    rates: dict[str, list[float]] = {name: [] for name in a.providers}
    failed: dict[str, str] = {}
    flags = ["--batch", a.batch, "--size", a.size, "--threads", a.threads, "--seconds", a.seconds]
    for turn in range(a.rounds):
        for name in a.providers[:: 1 if turn % 2 == 0 else -1]:
            command = [sys.executable, "-m", "benchmarks.pipeline.cached", a.folder.absolute(), *flags]
            run = subprocess.run(
                [*map(str, command), "--turn", name], cwd=ROOT, capture_output=True, text=True
            )
            if run.returncode:
                failed[name] = (run.stderr.strip().splitlines() or ["no word"])[-1][:200]
            else:
                rates[name].append(float(run.stdout.split()[-1]))
    return [(name, rates[name], failed.get(name, "")) for name in a.providers]


if __name__ == "__main__":
    sys.exit(main())
