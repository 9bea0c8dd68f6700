"""What a set takes when it is decoded, known from the headers of its files; and whether there is room for it.

    bytes = sum over the images of height * width * channels, times the ranks that keep them in one memory

Free memory of the host is what Linux says can be taken without swapping, or what is left of the limit of a
control group of this process (a container's, a job's) if that is less.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from fastmim.data.config import DataConfig, ranks_of_node
from fastmim.data.feed.bad import try_read
from fastmim.data.sources.images import Images
from fastmim.data.sources.scan import in_order

T = TypeVar("T")
SHARE = 0.9  # of what is free: the model and its activations want some too
MEMINFO, CGROUP, CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Sizes:
    """Headers of N images, of which some may be bad."""

    sizes_N2: np.ndarray  # int64 (height, width); 0 where the header is bad
    channels: int

    @property
    def bytes_N(self) -> np.ndarray:
        """What each takes decoded, int64."""
        return self.sizes_N2.prod(1) * self.channels

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return int(self.bytes_N.sum())


def cache_device(config: DataConfig, device: torch.device) -> torch.device:
    """Where the decoded images are kept; `device` is the one that trains, be it a CPU."""
    return device if config.cache == "device" else torch.device("cpu")


def look_at_sizes(
    images: Images, *, config: DataConfig, channels: int, device: torch.device, quiet: bool = False
) -> Sizes:
    """Read every header. ValueError, as early as it is known, if there is no room for the decoded images."""
    where = cache_device(config, device)
    room, copies = room_for(where)
    sizes_N2, taken = np.zeros((len(images), 2), np.int64), 0
    headers = in_order(partial(_header, images, config.max_pixels), range(len(images)), config.num_threads())
    for image_id, size in enumerate(bar(headers, len(images), "headers", quiet=quiet)):
        sizes_N2[image_id] = size
        taken += size[0] * size[1] * channels * copies
        if taken > room:
            seen = image_id + 1
            height, width = sizes_N2[:seen].sum(0) / np.count_nonzero(sizes_N2[:seen, 0])
            wanted, got = bytes_as_text(taken * len(images) // seen), bytes_as_text(room)
            raise ValueError(
                f"data.cache: want about {wanted} for {len(images)} decoded images{_times(copies)}, got {got}"
                f" {_on(where)}, which the first {seen} fill, of {height:.0f} x {width:.0f} px on average;"
                " fewer images would fit, or smaller ones: fastmim data pack --short-side"
            )
    return Sizes(sizes_N2, channels)


def _header(images: Images, max_pixels: int, image_id: int) -> tuple[int, int]:
    read = try_read(images, image_id, max_pixels)
    return (0, 0) if isinstance(read, str) else read[1]


def room_for(where: torch.device) -> tuple[int, int]:
    """Bytes that a cache may take of the memory of a device, and how many ranks each put a copy there."""
    if where.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(where)[0]), 1
    return int(SHARE * min(_free_memory())), ranks_of_node()


def _free_memory() -> Iterator[int]:
    """Bytes free by each limit that holds for this process; file pages that can be dropped count as free."""
    yield next(int(x.split()[1]) * 1024 for x in MEMINFO.read_text().splitlines() if "MemAvailable" in x)
    lines = CGROUP.read_text().splitlines() if CGROUP.exists() else []
    for own in [CGROUPS / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for group in (own, *own.parents):
            file = group / "memory.max"
            limit = file.read_text().strip() if file.exists() else "max"
            if limit != "max":
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
                yield max(0, int(limit) - used)


def _times(copies: int) -> str:
    return f" {copies} times, once for each rank of this node" if copies > 1 else ""


def _on(where: torch.device) -> str:
    return f"of {where}" if where.type == "cuda" else "of memory"


def bytes_as_text(count: int) -> str:
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} bytes"


def bar(items: Iterable[T], total: int, what: str, *, quiet: bool) -> Iterable[T]:
    """The items, and on a terminal how far they are; `quiet` leaves that to another rank."""
    return tqdm(items, total=total, desc=what, unit="img", disable=quiet or None, file=sys.stderr)
