"""Where the images are and how they are decoded."""

import os
from dataclasses import dataclass
from pathlib import Path

from fastmim.data.decoder import DecoderName

# mean and standard deviation of ImageNet's pixels in [0, 1]; grey values are those that grey ViTs use
NORMALISATION = {
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: ((0.449,), (0.226,)),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how they are decoded."""

    path: Path | None = None
    """Folder of images, nested or flat. Without it: the embedded sample set."""
    decoder: DecoderName = "dali"
    """What decodes: DALI, or Pillow where there is no DALI. Never one for the other in silence."""
    threads: int | None = None
    """Decoding threads of each rank. Without it: this machine's cores shared among its ranks."""
    prefetch: int = 2
    """Micro-batches decoded ahead; as many again are read ahead."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, of pixels in [0, 1]. Without it: ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, of pixels in [0, 1]. Without it: ImageNet's."""
    max_bad_fraction: float = 0.01
    """Stop when a rank met more undecodable files than this share of all (ten are always borne)."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"want data.threads >= 1, got {self.threads}")
        if self.prefetch < 1:
            raise ValueError(f"want data.prefetch >= 1, got {self.prefetch}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"want 0 <= data.max_bad_fraction <= 1, got {self.max_bad_fraction}")
        if self.std is not None and min(self.std, default=0.0) <= 0:
            raise ValueError(f"want data.std > 0, got {self.std}")

    def num_threads(self) -> int:
        """`threads`, or the cores this process may use, divided by the ranks launched on this node."""
        if self.threads is not None:
            return self.threads
        # torchrun and DeepSpeed name it differently
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        return max(1, len(os.sched_getaffinity(0)) // ranks)

    def normalisation(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel. ValueError if their number is not `channels`."""
        mean, std = NORMALISATION.get(channels, (None, None))
        mean, std = self.mean or mean, self.std or std
        if mean is None or std is None or len(mean) != channels or len(std) != channels:
            raise ValueError(f"want data.mean and data.std of {channels} channels, got {mean} and {std}")
        return mean, std

    def bad_limit(self, num_samples: int) -> int:
        """Undecodable files that a rank bears: the fraction, but at least ten, or half of a smaller set."""
        return max(min(10, num_samples // 2), int(self.max_bad_fraction * num_samples))
