"""The loader alone: images per second from files to uint8 batches on the training device.

python -m benchmarks.pipeline.loader IMAGENET/train

Question   how many images per second do DALI and Pillow deliver on this machine, against the pipeline that
           MAE's own code has?
Expected   DALI decodes only the box that is wanted, and resized_crop takes a third of Pillow's time for the
           rest: 2x the baseline on few CPU cores, more with a GPU.
Baseline   torch.utils.data.DataLoader with a process per core: Pillow decodes the whole image, then a crop by
           RandomResizedCrop's law, a bicubic resize and a flip. It stops at uint8, which spares it the
           conversion and the normalisation that MAE's code does on the CPU as well.
How        each turn is a process of its own that starts its provider, discards the first batches and counts
           what comes until the time is up. Turns alternate in rounds.
"""

import argparse
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.harness import DEVICE, RESULTS, ROOT, append, environment, quantiles

SIZE = 224
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
WARM_UP = 6  # batches: more than any of them prepares ahead


# --- the baseline -----------------------------------------------------------------------------------


def random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) by RandomResizedCrop's law, from torch's generator."""
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*SCALE).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(RATIO[0]), math.log(RATIO[1])).item())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (1,)))
            left = int(torch.randint(width - w + 1, (1,)))
            return left, top, left + w, top + h
    aspect = width / height
    w = round(height * RATIO[1]) if aspect > RATIO[1] else width
    h = round(width / RATIO[0]) if aspect < RATIO[0] else height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class WholeImages(Dataset[Tensor]):
    """Files decoded whole, one at a time."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        from PIL import Image

        with Image.open(self.paths[i]) as opened:
            image = opened.convert("RGB")
        image = image.crop(random_box(image.height, image.width))
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image))


def baseline(folder: Path, batch: int, threads: int) -> Iterator[Tensor]:
    from fastmim.data import find_images

    images = find_images(folder)
    paths = [images.path(i) for i in range(len(images))]
    loader = DataLoader(
        WholeImages(paths),
        batch_size=batch,
        sampler=RandomSampler(paths, replacement=True, num_samples=2**31),
        num_workers=threads,
        pin_memory=DEVICE == "cuda",
    )
    for views in loader:
        yield views.to(DEVICE, non_blocking=True)


# --- ours -------------------------------------------------------------------------------------------


def ours(decoder: str, folder: Path, batch: int, threads: int) -> Iterator[Tensor]:
    from fastmim.data import DataConfig, Loader, SampleOrder, find_images
    from fastmim.views import View

    images = find_images(folder)
    loader = Loader(
        images,
        (View(size=(SIZE, SIZE)),),
        SampleOrder(len(images), batch),
        config=DataConfig(path=folder, decoder=decoder, threads=threads),
        channels=3,
        seed=0,
        device=torch.device("cuda", torch.cuda.current_device()) if DEVICE == "cuda" else torch.device("cpu"),
        bad_samples=Path(tempfile.mkdtemp()) / "bad_samples.jsonl",
    )
    with loader:
        for found in loader:
            yield found.views[0]


PROVIDERS: dict[str, Callable[[Path, int, int], Iterator[Tensor]]] = {
    "dataloader": baseline,
    "pillow": lambda *arguments: ours("pillow", *arguments),
    "dali": lambda *arguments: ours("dali", *arguments),
}
NEEDS = {"dataloader": "PIL", "pillow": "PIL", "dali": "nvidia.dali"}


def absent(name: str) -> bool:
    try:
        return importlib.util.find_spec(NEEDS[name]) is None
    except ModuleNotFoundError:  # the package around it
        return True


def take_turn(name: str, folder: Path, batch: int, threads: int, seconds: float) -> float:
    """Images per second of one provider, once it runs."""
    return rate(PROVIDERS[name](folder, batch, threads), (batch, SIZE, SIZE, 3), seconds)


def rate(batches: Iterator[Tensor], shape: tuple[int, ...], seconds: float) -> float:
    """Images per second that come, past the first. Checks that they are images."""
    for _ in range(WARM_UP):
        views = next(batches)
    if views.shape != shape or views.dtype != torch.uint8 or views.float().std() < 1:
        raise ValueError(f"want uint8 images {shape}, got {views.dtype} {tuple(views.shape)}")
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
        pixels = (sum(layers) - 256).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=92)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, range(count)))


# --- command ----------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="images, nested or flat")
    parser.add_argument("--batch", type=int, default=256 if DEVICE == "cuda" else 32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--make", type=int, metavar="COUNT", help="write so many files there, and stop")
    parser.add_argument("--turn", choices=PROVIDERS, help=argparse.SUPPRESS)  # in a process of its own
    a = parser.parse_args(arguments)
    if a.make:
        make_photographs(a.folder, a.make)
        return 0
    if a.turn:
        print(take_turn(a.turn, a.folder, a.batch, a.threads, a.seconds))
        return 0
    env = environment()
    wanted = []
    for name in a.providers:
        if absent(name):
            print(f"{name:>10}  absent: {NEEDS[name]} is not installed")
        else:
            wanted.append(name)
    rates, failed = turns(wanted, a)
    for name in wanted:
        row = {"provider": name, "batch": a.batch, "threads": a.threads, "image_size": SIZE}
        if name in failed:
            row["failed"] = failed[name]
        else:
            low, median, high = quantiles(rates[name])
            row |= {"images_per_s": median, "images_per_s_p20": low, "images_per_s_p80": high}
        append(a.results / "loader.jsonl", row | {"turns": len(rates[name])} | env)
        print(
            f"{name:>10}  {failed.get(name) or f'{median:.1f} img/s ({low:.1f} to {high:.1f})'}", flush=True
        )
    return 1 if failed or not wanted else 0


def turns(wanted: Sequence[str], a: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Rates of every turn by provider, and the last words of those that failed."""
    rates: dict[str, list[float]] = {name: [] for name in wanted}
    failed: dict[str, str] = {}
    flags = [a.folder.absolute(), "--batch", a.batch, "--threads", a.threads, "--seconds", a.seconds]
    for turn in range(a.rounds):
        for name in list(wanted)[:: 1 if turn % 2 == 0 else -1]:
            command = [sys.executable, "-m", "benchmarks.pipeline.loader", *map(str, flags), "--turn", name]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if run.returncode:
                failed[name] = (run.stderr.strip().splitlines() or ["no word"])[-1][:200]
            else:
                rates[name].append(float(run.stdout.split()[-1]))
    return rates, failed


if __name__ == "__main__":
    sys.exit(main())
