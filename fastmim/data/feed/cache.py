"""Decode once: all images decoded in one buffer, and every crop cut from there.

    image i = buffer[start_i : start_i + height_i * width_i * C]  as [height_i, width_i, C]

Decoded whole by the decoder that the run names and cut by the ops that cut without a cache: the pixels are
the same. Each rank keeps a copy of the whole set, since the order deals every image to every rank.

Bytes   height * width * C for each image, in the memory of the host (`ram`; not pinned: the crops are) or on
        the device that trains (`device`, which cuts there).
Limits  A bad image is found when the buffer is filled and named by the step and epoch of the start. What
        shows in its place is what would show without a cache (bad.py).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmim.data.augment.draws import draw_crops
from fastmim.data.config import DataConfig
from fastmim.data.decode.choose import make_decoder
from fastmim.data.decode.cut import cut_crops, to_device
from fastmim.data.feed.bad import BadFiles
from fastmim.data.feed.sizes import Sizes, bar, bytes_as_text, cache_device, look_at_sizes
from fastmim.data.feed.supply import Place, Served
from fastmim.data.feed.whole import decode_all
from fastmim.data.sources.images import Images
from fastmim.views import Crop

CHUNK = 64  # images decoded at a time


@dataclass(frozen=True)
class Cache:
    """Decoded images by number; where one is bad, the entries are those of the image that shows for it."""

    buffer: Tensor  # uint8
    starts_N: np.ndarray  # int64: bytes before each
    sizes_N2: np.ndarray  # int64 (height, width)
    shown_N: np.ndarray  # int64: which image each entry is
    channels: int

    def images(self, images_B: np.ndarray) -> list[Tensor]:
        """Crops uint8 `[H_b, W_b, C]` of the buffer."""
        C, buffer = self.channels, self.buffer
        rows = zip(self.sizes_N2[images_B].tolist(), self.starts_N[images_B].tolist(), strict=True)
        return [buffer.as_strided((h, w, C), (w * C, C, 1), start) for (h, w), start in rows]


class CacheSupply:
    """`supply.Supply` of decoded images."""

    def __init__(self, cache: Cache, crops: Sequence[Crop], device: torch.device):
        self._cache: Cache | None = cache
        self._crops, self._device = crops, device

    def serve(self, places: Iterator[Place]) -> Iterator[Served]:
        while self._cache is not None:
            place = next(places)
            draws = draw_crops(place.seeds_B, self._cache.sizes_N2[place.images_B], self._crops)
            crops = cut_crops(self._crops, self._cache.images(place.images_B), draws)
            crops = tuple(to_device(crop, self._device) for crop in crops)
            yield Served(place, crops, self._cache.shown_N[place.images_B])

    def close(self) -> None:
        self._cache = None


def fill(
    images: Images,
    bad: BadFiles,
    *,
    config: DataConfig,
    channels: int,
    device: torch.device,
    step: int,
    epoch: int,
    sizes: Sizes | None = None,
    quiet: bool = False,
) -> Cache:
    """Decode everything. ValueError if there is no room for it, BadImages if too much of it is bad.

    How far it is stands on stderr, unless `quiet`.
    """
    if sizes is None:
        sizes = look_at_sizes(images, config=config, channels=channels, device=device, quiet=quiet)
    where, threads = cache_device(config, device), config.num_threads()
    if not quiet and not sys.stderr.isatty():  # where no bar is shown
        print(
            f"decoding {len(images):,} images into {bytes_as_text(sizes.total)} on {where}", file=sys.stderr
        )
    starts_N = sizes.bytes_N.cumsum() - sizes.bytes_N
    buffer = torch.empty(sizes.total, dtype=torch.uint8, device=where)
    cache = Cache(buffer, starts_N, sizes.sizes_N2, np.arange(len(images)), channels)
    with closing(
        make_decoder(
            config.decoder,
            (),
            batch=CHUNK,
            channels=channels,
            threads=threads,
            depth=1,
            device=device,
            hw_decoder_load=config.hw_decoder_load,
        )
    ) as decoder:
        decoded = decode_all(decoder, images, chunk=CHUNK, threads=threads, max_pixels=config.max_pixels)
        for image_id, image in bar(decoded, len(images), "decoding", quiet=quiet):
            [place] = cache.images(np.array([image_id]))
            if isinstance(image, Tensor) and image.shape != place.shape:
                image = f"its header says {tuple(place.shape)}, but it is {tuple(image.shape)}"
            if isinstance(image, str):
                bad.report(image_id, image, epoch=epoch, step=step)
            else:
                place.copy_(image)
    shown_N = np.array([bad.replacement(image_id) for image_id in range(len(images))])
    return Cache(buffer, starts_N[shown_N], sizes.sizes_N2[shown_N], shown_N, channels)
