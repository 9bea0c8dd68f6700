"""Crops from files: read ahead by threads, decoded, and cut.

Files are read `prefetch` micro-batches before the decoder gets them, which works `prefetch` ahead in turn.
What is bad is found on the way: its slot is filled by the bytes of another, and the batch is decoded again.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmim.data.augment.draws import draw_crops
from fastmim.data.config import DataConfig
from fastmim.data.decode.choose import make_decoder
from fastmim.data.decode.contract import Rejected, Request
from fastmim.data.decode.cut import to_device
from fastmim.data.feed.bad import BadFiles, Read, try_read
from fastmim.data.feed.supply import Place, Served
from fastmim.data.sources.images import Images
from fastmim.views import Crop

READ_CHUNK = 8  # files read by one task: enough to hide what a task costs, few enough to spread a micro-batch
READERS_PER_THREAD = 4  # readers wait for disks most of the time


@dataclass
class Micro:
    """One micro-batch on its way, and which image's bytes each slot shows."""

    place: Place
    sources: list[int]  # differs from the images of the place where a file is bad
    reading: list[Future[list[Read]]]
    reads: list[Read]


class FileSupply:
    """`supply.Supply` of encoded images."""

    def __init__(
        self,
        images: Images,
        crops: Sequence[Crop],
        bad: BadFiles,
        *,
        config: DataConfig,
        batch: int,
        channels: int,
        device: torch.device,
    ):
        self._images, self._crops, self._bad, self._ahead = images, crops, bad, config.prefetch
        self._device, self._max_pixels = device, config.max_pixels
        if any(crop.rand_augment for crop in crops):  # it works on the CPU: nothing goes there and back
            device = torch.device("cpu")
        self._reading: deque[Micro] = deque()
        self._decoding: deque[Micro] = deque()
        threads = config.num_threads()
        self._decoder = make_decoder(
            config.decoder,
            crops,
            batch=batch,
            channels=channels,
            threads=threads,
            depth=config.prefetch,
            device=device,
            hw_decoder_load=config.hw_decoder_load,
        )
        self._readers = ThreadPoolExecutor(READERS_PER_THREAD * threads, thread_name_prefix="read")
        self._open = ExitStack()
        self._open.callback(self._decoder.close)
        self._open.callback(self._readers.shutdown, wait=False, cancel_futures=True)

    def serve(self, places: Iterator[Place]) -> Iterator[Served]:
        while True:
            self._keep_busy(places)
            crops = self._result()
            micro = self._decoding.popleft()
            self._keep_busy(places)  # before the caller computes, so that decoding goes on meanwhile
            crops = tuple(to_device(crop, self._device) for crop in crops)
            yield Served(micro.place, crops, np.array(micro.sources))

    def close(self) -> None:
        self._open.close()

    def _keep_busy(self, places: Iterator[Place]) -> None:
        while len(self._decoding) < self._ahead:
            while len(self._reading) <= self._ahead:
                self._reading.append(self._start_reading(next(places)))
            micro = self._reading.popleft()
            micro.reads = [read for task in micro.reading for read in task.result()]
            self._decoder.submit(self._request(micro))
            self._decoding.append(micro)

    def _start_reading(self, place: Place) -> Micro:
        sources = [self._bad.replacement(image_id) for image_id in place.images_B.tolist()]
        chunks = (sources[i : i + READ_CHUNK] for i in range(0, len(sources), READ_CHUNK))
        reading = [self._readers.submit(self._read_all, chunk) for chunk in chunks]
        return Micro(place, sources, reading, [])

    def _read_all(self, image_ids: list[int]) -> list[Read]:
        return [self._try_read(image_id) for image_id in image_ids]

    def _try_read(self, image_id: int) -> Read:
        return try_read(self._images, image_id, self._max_pixels)

    def _request(self, micro: Micro) -> Request:
        good = [self._good(micro, slot) for slot in range(len(micro.sources))]
        data, sizes_B2 = [data for data, _ in good], np.array([size for _, size in good])
        return Request(data, draw_crops(micro.place.seeds_B, sizes_B2, self._crops))

    def _result(self) -> tuple[Tensor, ...]:
        while True:
            try:
                return self._decoder.result()
            except Rejected as rejected:
                self._repair(rejected.slots)

    # --- bad files -------------------------------------------------------------------------------

    def _good(self, micro: Micro, slot: int) -> tuple[bytes, tuple[int, int]]:
        """What fills a slot: its own file, or the next that is not known to be bad and can be read."""
        source, read = micro.sources[slot], micro.reads[slot]
        while source in self._bad or isinstance(read, str):
            if isinstance(read, str) and source not in self._bad:
                self._report(source, read, micro)
            source = self._bad.replacement(source)
            read = self._try_read(source)
        micro.sources[slot], micro.reads[slot] = source, read
        return read

    def _repair(self, slots: dict[int, str]) -> None:
        """Write down what the decoder rejected; hand it all its requests again without that."""
        head = self._decoding[0]
        for source, reason in {head.sources[slot]: reason for slot, reason in slots.items()}.items():
            self._report(source, reason, head)
        for micro in self._decoding:
            self._decoder.submit(self._request(micro))

    def _report(self, image_id: int, reason: str, micro: Micro) -> None:
        self._bad.report(image_id, reason, epoch=micro.place.epoch, step=micro.place.step)
