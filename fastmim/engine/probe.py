"""How well neighbors read the encoder while it trains: kNN on frozen features, every few epochs.

    knn_cls, knn_mean   share of every fifth image of a labeled set that 20 neighbors among the other four
                        fifths name rightly, by the class token and by the mean of the patches

It draws nothing at random, touches no running mean and leaves each module in the mode it was in: the losses
of the run are the same to the last bit. Numbers join the row of their step in metrics.jsonl, the events and
loss.png.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmim.data import Images, find_images
from fastmim.data.feed.center import center_crops, spread_ids
from fastmim.engine.config import ProbeConfig
from fastmim.engine.ranks import Ranks
from fastmim.engine.validate import share_of
from fastmim.evals.features import Feature, features_in_batches
from fastmim.evals.knn import knn
from fastmim.models.swin import SwinEncoder

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger("fastmim")

K = 20
ASKED = 5  # one image of so many is asked for
MOST_OF_TIME = 0.03  # above which a line says so


def probed_images(config: ProbeConfig) -> Images | None:
    """The labeled set, if there is one. ValueError for one without labels, or with too few images."""
    if config.data is None:
        return None
    images = find_images(config.data)
    if images.labels is None:
        raise ValueError(
            f"probe.data: want labeled images, a folder of each class, got none in {images.root}"
        )
    if min(len(images), config.images) < K + ASKED:
        raise ValueError(f"probe.data, probe.images: want at least {K + ASKED} images, got {len(images)}")
    return images


class Probe:
    """Looks at the encoder on all ranks together."""

    def __init__(
        self, config: ProbeConfig, images: Images, ranks: Ranks, *, size: tuple[int, int], channels: int,
        batch: int, threads: int, device: torch.device, steps_per_epoch: int, total_steps: int,
    ):  # fmt: skip
        assert images.labels is not None
        self.images, self.ranks, self.device = images, ranks, device
        self.size, self.channels, self.batch, self.threads = size, channels, batch, threads
        self.period, self.total_steps = config.every * steps_per_epoch, total_steps
        self.ids = spread_ids(len(images), config.images)
        self.labels_N = torch.from_numpy(images.labels[self.ids]).long().to(device)
        self.crops: list[tuple[Tensor, Tensor]] | None = None  # of this rank, decoded once
        self.seconds, self.began = 0.0, time.perf_counter()
        self.warned = False

    def due(self, step: int) -> bool:
        return step % self.period == 0 or step == self.total_steps

    def __call__(self, engine: "DeepSpeedEngine") -> Mapping[str, float]:
        """The share of right votes for each feature; a call for all ranks at once."""
        start = time.perf_counter()
        encoder = engine.module.encoder
        found = self.features(encoder)
        asked_N = torch.arange(len(self.ids), device=self.device) % ASKED == ASKED - 1
        row = {}
        for kind, x_ND in found.items():
            scores = knn(x_ND[~asked_N], self.labels_N[~asked_N], x_ND[asked_N], self.labels_N[asked_N], (K,))
            row[f"knn_{kind}"] = dict(scores)[f"knn_{K}"]
        self.seconds += time.perf_counter() - start
        share = self.seconds / (time.perf_counter() - self.began)
        if share > MOST_OF_TIME and not self.warned:
            log.warning(
                "the probe took %.0f %% of the time so far: --probe.every makes it rarer", 100 * share
            )
            self.warned = True
        return row

    def features(self, encoder: nn.Module) -> dict[Feature, Tensor]:
        """Features of all images, in the order of the ids, on every rank."""
        kinds: tuple[Feature, ...] = ("mean",) if isinstance(encoder, SwinEncoder) else ("cls", "mean")
        share, _ = share_of(self.ids, self.ranks)
        if self.crops is None:
            self.crops = list(
                center_crops(
                    self.images, self.size, ids=share, channels=self.channels, batch=self.batch,
                    threads=self.threads, bad=lambda *_: None,
                )
            )  # fmt: skip
        parts: dict[Feature, list[Tensor]] = {kind: [] for kind in kinds}
        with modes_kept(encoder), torch.no_grad():
            for _, found in features_in_batches(encoder, self.crops, self.device, kinds):  # type: ignore[arg-type]
                for kind in kinds:
                    parts[kind].append(found[kind])
        world, N = self.ranks.world, len(self.ids)
        whole = {}
        for kind, values in parts.items():
            x_RD = self.ranks.gather(torch.cat(values).contiguous())
            whole[kind] = x_RD.view(world, -1, x_RD.shape[1]).transpose(0, 1).flatten(0, 1)[:N]
        return whole


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards each module within is in training, or not, as it was before."""
    modes = [(one, one.training) for one in module.modules()]
    try:
        yield
    finally:
        for one, training in modes:
            one.training = training
