"""Where the images are and how they are decoded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastmim.data.decode.choose import HW_DECODER_LOAD, DecoderName
from fastmim.data.decode.header import MAX_PIXELS
from fastmim.views import Augmentation

MAX_THREADS, MAX_PREFETCH = 1024, 256
CacheName = Literal["none", "ram", "device"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how they are decoded."""

    path: Path | None = None
    """Folder of images, list of paths, or tar or Parquet shards (file, folder or pattern). Without it: the
    embedded sample set."""
    val: Path | None = None
    """Labeled images, for methods with labels: what is right of their central crops, after each epoch"""
    subset: str | None = None
    """Part of the images alone: 10% (of each class), 1000, 1000/one-class, 1000/per-class, or a list file"""
    decoder: DecoderName = "dali"
    """What decodes: DALI, or Pillow where there is no DALI. Never one for the other in silence."""
    augment: Augmentation = "recipe"
    """recipe: the crops of the method as published; strong: smaller boxes, and colors where it has none"""
    cache: CacheName = "none"
    """Decode every image once, at the start, and cut all crops from that: kept in memory (ram), or on the
    device that trains (device). Each rank keeps the whole set; the pixels are those without a cache."""
    epoch_images: int | None = None
    """Samples in an epoch: the set is repeated to so many, each repeat with crops, colors and masks of its
    own. Without it: every image once. Of ImageNet's length: 1281167."""
    threads: int | None = None
    """Decoding threads of each rank. Without it: this machine's cores shared among its ranks."""
    hw_decoder_load: float = HW_DECODER_LOAD
    """Share of JPEG files that DALI gives to the GPU's own JPEG decoder, where it has one; CUDA cores take
    the others. Of no effect on a CPU."""
    prefetch: int = 2
    """Micro-batches decoded ahead; as many again are read ahead."""
    max_pixels: int = 2**26
    """Pixels of the largest image that is decoded, 67 million: a larger one counts as bad. A small file may
    hold far more, and take all memory"""
    max_bad_fraction: float = 0.01
    """Stop when a rank met more undecodable files than this share of all (ten are always borne)."""

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(f"data.threads: want 1 to {MAX_THREADS}, got {self.threads}")
        if not 1 <= self.prefetch <= MAX_PREFETCH:
            raise ValueError(f"data.prefetch: want 1 to {MAX_PREFETCH}, got {self.prefetch}")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise ValueError(f"data.max-pixels: want 1 to {MAX_PIXELS}, got {self.max_pixels}")
        if self.epoch_images is not None and self.epoch_images < 1:
            raise ValueError(f"data.epoch-images: want at least 1, got {self.epoch_images}")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"data.hw-decoder-load: want a share in [0, 1], got {self.hw_decoder_load}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max-bad-fraction: want a share in [0, 1], got {self.max_bad_fraction}")

    def num_threads(self) -> int:
        """`threads`, or the cores this process may use, divided by the ranks launched on this node."""
        if self.threads is not None:
            return self.threads
        return max(1, len(os.sched_getaffinity(0)) // ranks_of_node())

    def samples_per_epoch(self, num_images: int) -> int:
        """`epoch_images`, or one for each image. ValueError if images would never be seen."""
        if self.epoch_images is None:
            return num_images
        if self.epoch_images < num_images:
            raise ValueError(
                f"data.epoch-images: want at least the {num_images} images there are, got"
                f" {self.epoch_images}, which leaves out the same ones always; a list of paths names fewer"
            )
        return self.epoch_images

    def bad_limit(self, num_samples: int) -> int:
        """Undecodable files that a rank bears: the fraction, but at least ten, or half of a smaller set."""
        return max(min(10, num_samples // 2), int(self.max_bad_fraction * num_samples))


def ranks_of_node() -> int:
    """Ranks launched on this node, which share its cores and its memory."""
    # torchrun and DeepSpeed name it differently
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
