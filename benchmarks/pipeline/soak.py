"""The loader for many epochs: MiB of memory after each, and what is left of it when it is closed.

python -m benchmarks.pipeline.soak                      20 epochs of the embedded sample set
python -m benchmarks.pipeline.soak FOLDER --epochs 5    of another set

Question   does it leak?
Verdict    memory after the last epoch at most 2 % above that after the warm-up, and after closing neither a
           thread, a process nor an entry of /dev/shm that was not there before. Exit status 1 otherwise.
MiB        resident memory of the process after a garbage collection; on a GPU also what the device has given
           away, to DALI's pools as well as to PyTorch's.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.provenance import DEVICE

GROWTH = 0.02  # of the memory after the warm-up
CLOSING_S = 10.0  # threads that were told to end may finish what they do


@dataclass(frozen=True)
class Held:
    """What a process has of the system, by name."""

    threads: frozenset[str]
    children: frozenset[str]
    shared: frozenset[str]

    @classmethod
    def now(cls) -> "Held":
        tasks = Path("/proc/self/task")
        children = [path.read_text().split() for path in tasks.glob("*/children")]
        shared = Path("/dev/shm")
        return cls(
            frozenset(path.name for path in tasks.iterdir()),
            frozenset(child for pids in children for child in pids),
            frozenset(path.name for path in shared.iterdir()) if shared.is_dir() else frozenset(),
        )

    def left_since(self, before: "Held") -> list[str]:
        """What is here and was not there, in words."""
        return [
            f"{len(new)} {what}: {', '.join(sorted(new)[:5])}"
            for what in ("threads", "children", "shared")
            if (new := getattr(self, what) - getattr(before, what))
        ]


def left_after_closing(before: Held, seconds: float = CLOSING_S) -> list[str]:
    """What is left that was not there before, once all had time to end."""
    deadline = time.monotonic() + seconds
    while (left := Held.now().left_since(before)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    return left


def memory_mib() -> dict[str, float]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"host": pages * os.sysconf("SC_PAGE_SIZE") / 2**20}
    if DEVICE == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["device"] = (total - free) / 2**20
    return found


def soak(folder: Path, a: argparse.Namespace) -> tuple[list[dict[str, float]], list[str]]:
    """Memory after each epoch, and what the closed loader left."""
    from fastmim.data import DataConfig, find_images, open_loader
    from fastmim.views import Crop

    images = find_images(folder)
    batch = min(a.batch, len(images))
    steps = len(images) // batch
    config = DataConfig(path=folder, decoder=a.decoder, threads=a.threads)
    rows = []
    # what the process starts once for all: pools of torch and DALI stay, whoever used them first
    for epochs, keep in ((1, False), (a.epochs, True)):
        before = Held.now()
        loader = open_loader(images, (Crop(size=(a.size, a.size)),), batch, config=config)
        with loader:
            for epoch in range(epochs):
                start = time.perf_counter()
                for _ in range(steps):
                    next(loader)
                if keep:
                    rate = steps * batch / (time.perf_counter() - start)
                    rows.append(memory_mib())
                    sizes = "  ".join(f"{name} {mib:.1f} MiB" for name, mib in rows[-1].items())
                    print(f"epoch {epoch + 1:>3}  {sizes}  {rate:.0f} img/s", flush=True)
        del loader
    return rows, left_after_closing(before)


def growth(rows: Sequence[dict[str, float]], warm_up: int) -> dict[str, float]:
    """How much more is held after the last epoch than after the warm-up, as a fraction."""
    return {name: rows[-1][name] / rows[warm_up - 1][name] - 1 for name in rows[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="images; without it the embedded sample set")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3, help="epochs that may still take memory")
    parser.add_argument("--decoder", choices=["dali", "pillow"], default="dali")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="pixels of a crop")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    a = parser.parse_args(arguments)
    if not 1 <= a.warm_up < a.epochs:
        parser.error(f"want 1 <= warm-up < epochs, got {a.warm_up} and {a.epochs}")
    if a.folder is None:
        from fastmim.data.sources.sample import sample_set

        a.folder = sample_set() / "train"
    rows, left = soak(a.folder, a)
    grown = growth(rows, a.warm_up)
    for name, share in grown.items():
        span = f"from epoch {a.warm_up} to {a.epochs}"
        print(f"{name}: {100 * share:+.2f} % {span}, at most {100 * GROWTH:g} % allowed")
    print(f"left after closing: {'; '.join(left) or 'nothing'}")
    sound = max(grown.values()) <= GROWTH and not left
    print("sound" if sound else "LEAKS")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
