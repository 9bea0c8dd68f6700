"""Micro-batches of views, for ever, from any step: order, draws, decoding and bad files put together.

    batch(step, micro_step, rank) = f(images, views, seed; ids of the order)

Nothing is remembered that changes a batch, so a loader that starts at step n gives what one that started at
0 gives from there, and 1 or N ranks see the same images cut at the same boxes. Files are read by threads
`prefetch` micro-batches before the decoder gets them, which works `prefetch` ahead in turn.

Bad files: the slot of a file that cannot be decoded gets the bytes of the next sample id (cyclically) that
can, but keeps the key of its own. The batch is the one of a folder where the bad file held these bytes.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from fastmim_kernels.philox import sample_keys
from torch import Tensor

from fastmim.data.config import DataConfig
from fastmim.data.decoder import Rejected, Request, make_decoder
from fastmim.data.draws import check_views, draw_views
from fastmim.data.header import BadImage, image_size
from fastmim.data.order import SampleOrder
from fastmim.data.source import Images
from fastmim.views import Batch, View

READ_CHUNK = 8  # files read by one task: enough to hide what a task costs, few enough to spread a micro-batch
READERS_PER_THREAD = 4  # readers wait for disks most of the time

Read = tuple[bytes, tuple[int, int]] | str  # bytes and (height, width), or why not


@dataclass
class Micro:
    """One micro-batch on its way: what each slot shall show, and which sample's bytes it shows."""

    step: int
    epoch: int
    ids_B: Tensor  # int64, CPU
    keys_B: Tensor  # int64, CPU
    sources: list[int]  # differs from ids_B where a file is bad
    reading: list[Future[list[Read]]]
    reads: list[Read]


class BadImages(ValueError):
    """Too many files cannot be decoded."""


class Loader:
    """Iterator over the `Batch`es of one rank. Close it, or use it in a `with`.

    BadImages when more files are bad than `config` allows.
    """

    def __init__(
        self,
        images: Images,
        views: Sequence[View],
        order: SampleOrder,
        *,
        config: DataConfig,
        channels: int,
        seed: int,
        device: torch.device,
        bad_samples: Path,
        start_step: int = 0,
    ):
        if order.num_samples != len(images):
            raise ValueError(f"want an order of {len(images)} samples, got one of {order.num_samples}")
        self._images, self._order, self._seed, self._device = images, order, seed, device
        self._views = check_views(views)
        self._config, self._bad_samples = config, bad_samples
        self._bad: set[int] = set()
        self._places = self._from(start_step)
        self._reading: deque[Micro] = deque()
        self._decoding: deque[Micro] = deque()
        threads = config.num_threads()
        self._decoder = make_decoder(
            config.decoder,
            views,
            batch=order.micro,
            channels=channels,
            threads=threads,
            depth=config.prefetch,
            device=device,
        )
        self._readers = ThreadPoolExecutor(READERS_PER_THREAD * threads, thread_name_prefix="read")
        self._open = ExitStack()
        self._open.callback(self._decoder.close)
        self._open.callback(self._readers.shutdown, wait=False, cancel_futures=True)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            self._keep_busy()
            while True:
                try:
                    views = self._decoder.result()
                    break
                except Rejected as rejected:
                    self._repair(rejected.slots)
            micro = self._decoding.popleft()
            self._keep_busy()  # before the caller computes, so that decoding goes on meanwhile
        except BaseException:
            self.close()
            raise
        return Batch(views, _to_device(micro.keys_B, self._device), micro.ids_B, micro.epoch)

    def close(self) -> None:
        """Stop reading and decoding; may be called again."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- from places to requests -----------------------------------------------------------------

    def _from(self, step: int) -> Iterator[tuple[int, int]]:
        while True:
            yield from ((step, micro_step) for micro_step in range(self._order.accumulate))
            step += 1

    def _keep_busy(self) -> None:
        while len(self._decoding) < self._config.prefetch:
            while len(self._reading) <= self._config.prefetch:
                self._reading.append(self._start_reading(*next(self._places)))
            micro = self._reading.popleft()
            micro.reads = [read for task in micro.reading for read in task.result()]
            self._decoder.submit(self._request(micro))
            self._decoding.append(micro)

    def _start_reading(self, step: int, micro_step: int) -> Micro:
        epoch, ids = self._order.ids(step, micro_step)
        ids_B = torch.from_numpy(ids)
        sources = [self._replacement(sample_id) for sample_id in ids.tolist()]
        chunks = (sources[i : i + READ_CHUNK] for i in range(0, len(sources), READ_CHUNK))
        reading = [self._readers.submit(self._read_all, chunk) for chunk in chunks]
        return Micro(step, epoch, ids_B, sample_keys(self._seed, epoch, ids_B), sources, reading, [])

    def _request(self, micro: Micro) -> Request:
        good = [self._good(micro, slot) for slot in range(len(micro.sources))]
        data, sizes_B2 = [data for data, _ in good], np.array([size for _, size in good])
        return Request(data, draw_views(micro.keys_B, sizes_B2, self._views))

    def _read_all(self, sample_ids: list[int]) -> list[Read]:
        return [self._read(sample_id) for sample_id in sample_ids]

    def _read(self, sample_id: int) -> Read:
        try:
            data = self._images.read(sample_id)
            return data, image_size(data)
        except BadImage as error:
            return str(error)
        except OSError as error:
            return f"{type(error).__name__}: {error.strerror}"

    # --- bad files -------------------------------------------------------------------------------

    def _replacement(self, sample_id: int) -> int:
        """The sample itself, or the next one that is not known to be bad."""
        while sample_id in self._bad:
            sample_id = (sample_id + 1) % len(self._images)
        return sample_id

    def _good(self, micro: Micro, slot: int) -> tuple[bytes, tuple[int, int]]:
        """What fills a slot: its own file, or the next that is not known to be bad and can be read."""
        source, read = micro.sources[slot], micro.reads[slot]
        while source in self._bad or isinstance(read, str):
            if isinstance(read, str) and source not in self._bad:
                self._report(source, read, micro)
            source = self._replacement(source)
            read = self._read(source)
        micro.sources[slot], micro.reads[slot] = source, read
        return read

    def _repair(self, slots: dict[int, str]) -> None:
        """Write down what the decoder rejected; hand it all its requests again without that."""
        head = self._decoding[0]
        for source, reason in {head.sources[slot]: reason for slot, reason in slots.items()}.items():
            self._report(source, reason, head)
        for micro in self._decoding:
            self._decoder.submit(self._request(micro))

    def _report(self, sample_id: int, reason: str, micro: Micro) -> None:
        """Write a bad file down. BadImages if there are too many of them."""
        self._bad.add(sample_id)
        row = {
            "path": self._images.names[sample_id],
            "sample_id": sample_id,
            "epoch": micro.epoch,
            "step": micro.step,
            "rank": self._order.rank,
            "reason": reason,
        }
        self._bad_samples.parent.mkdir(parents=True, exist_ok=True)
        with self._bad_samples.open("a") as file:
            file.write(json.dumps(row) + "\n")
        num_samples = len(self._images)
        limit = self._config.bad_limit(num_samples)
        if len(self._bad) > limit or len(self._bad) == num_samples:
            raise BadImages(
                f"{len(self._bad)} of {num_samples} images cannot be decoded, more than the {limit} allowed"
                f" (data.max_bad_fraction = {self._config.max_bad_fraction}); each is named in"
                f" {self._bad_samples}, the last: {row['path']}: {reason}"
            )


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)
