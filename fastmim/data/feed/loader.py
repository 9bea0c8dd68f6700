"""Micro-batches of crops, for ever, from any step: order, keys, and a supply of crops put together.

    batch(step, micro_step, rank) = f(images, crops, seed; ids of the order)
    sample id shows image           id % number of images

Nothing is remembered that changes a batch, so a loader that starts at step n gives what one that started at
0 gives from there, 1 or N ranks see the same images cut at the same boxes, and where the pixels come from
(`data.cache`) is not seen. An epoch longer than the set repeats images: each repeat is a sample with a key
of its own, so other crops, colors and masks.

Bad files: the slot of a file that cannot be decoded gets the bytes of the next image (cyclically) that can,
and its label, but keeps the seed of its own.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from fastmim_kernels.philox import sample_seeds
from torch import Tensor

from fastmim.data.augment.draws import check_crops
from fastmim.data.config import DataConfig
from fastmim.data.decode.cut import to_device
from fastmim.data.feed.bad import BadFiles
from fastmim.data.feed.cache import CacheSupply, fill
from fastmim.data.feed.files import FileSupply
from fastmim.data.feed.order import SampleOrder
from fastmim.data.feed.sizes import Sizes
from fastmim.data.feed.supply import Place, Supply
from fastmim.data.sources.source import Images
from fastmim.views import Batch, Crop


class Loader:
    """Iterator over the `Batch`es of one rank. Close it, or use it in a `with`.

    With a cache all images are decoded here, first; `sizes` is what `look_at_sizes` said of them, if it was
    asked before. Batches have labels where these are asked for. BadImages when more files are bad than
    `config` allows; ValueError for labels that the images do not have.
    """

    def __init__(
        self,
        images: Images,
        crops: Sequence[Crop],
        order: SampleOrder,
        *,
        config: DataConfig,
        channels: int,
        seed: int,
        device: torch.device,
        bad_samples: Path,
        start_step: int = 0,
        sizes: Sizes | None = None,
        labeled: bool = False,
    ):
        wanted = config.samples_per_epoch(len(images))
        if order.num_samples != wanted:
            raise ValueError(f"want an order of {wanted} samples, got one of {order.num_samples}")
        self._num_images, self._order, self._seed, self._device = len(images), order, seed, device
        self._labels = labels_of(images) if labeled else None
        crops = check_crops(crops)
        bad = BadFiles(images, config, bad_samples, rank=order.rank)
        self._supply: Supply
        if config.cache == "none":
            self._supply = FileSupply(
                images, crops, bad, config=config, batch=order.micro, channels=channels, device=device
            )
        else:
            cache = fill(
                images, bad, config=config, channels=channels, device=device, sizes=sizes,
                step=start_step, epoch=start_step // order.steps_per_epoch, quiet=order.rank > 0,
            )  # fmt: skip
            self._supply = CacheSupply(cache, crops, device)
        self._served = self._supply.serve(self._places(start_step))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            place, crops, shown_B = next(self._served)
        except BaseException:
            self.close()
            raise
        labels_B = None
        if self._labels is not None:
            labels_B = to_device(self._labels[torch.from_numpy(shown_B)], self._device)
        return Batch(crops, to_device(place.seeds_B, self._device), place.ids_B, place.epoch, labels_B)

    def close(self) -> None:
        """Stop reading and decoding; may be called again."""
        self._supply.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _places(self, step: int) -> Iterator[Place]:
        while True:
            for micro_step in range(self._order.accumulate):
                epoch, ids = self._order.ids(step, micro_step)
                ids_B = torch.from_numpy(ids)
                seeds_B = sample_seeds(self._seed, epoch, ids_B)
                yield Place(step, epoch, ids_B, seeds_B, ids % self._num_images)
            step += 1


def labels_of(images: Images) -> Tensor:
    """The label of each image, int64 `[N]`. ValueError for images without."""
    if images.labels is None:
        raise ValueError(
            f"data.path: want labeled images (a folder for each class, a list with labels, or labels in the "
            f"shards), got {images.root} without"
        )
    return torch.from_numpy(images.labels).long()


def open_loader(
    images: Images,
    crops: Sequence[Crop],
    batch: int,
    *,
    config: DataConfig | None = None,
    channels: int = 3,
    seed: int = 0,
    device: torch.device | None = None,
    bad_samples: Path | None = None,
    labeled: bool = False,
) -> Loader:
    """A loader for one process, as a script wants it: these crops, in micro-batches of `batch` images.

    By default for the current CUDA device if there is one; bad images are named in a temporary file. With
    labels where they are asked for.
    """
    config = config or DataConfig()
    if device is None:
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if bad_samples is None:
        bad_samples = Path(tempfile.mkdtemp(prefix="fastmim-")) / "bad_samples.jsonl"
    order = SampleOrder(config.samples_per_epoch(len(images)), batch, seed=seed)
    return Loader(
        images, crops, order,
        config=config, channels=channels, seed=seed, device=device, bad_samples=bad_samples,
        labeled=labeled,
    )  # fmt: skip
