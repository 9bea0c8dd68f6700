"""The decoder for machines without DALI, chosen by name: Pillow in a pool of threads.

    encoded bytes -> `pixels.decode_array` -> RGB or gray; then, outside of it, `decoder.cut_crops`

With the crop, resize and flip of that it is the pipeline of torchvision's ImageFolder, RandomResizedCrop and
RandomHorizontalFlip, and what the graph of DALI is compared with. `Image.draft`, which decodes JPEGs at a
fraction of their size, is not used: it is another filter.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fastmim.data.augment.draws import Draws
from fastmim.data.decode.contract import Rejected, Request
from fastmim.data.decode.cut import cut_crops, to_device
from fastmim.data.decode.pixels import decode_array
from fastmim.data.decode.rejected import rejected_of
from fastmim.views import Crop


class PillowDecoder:
    """`decoder.Decoder` on `threads` threads, an image each at a time."""

    def __init__(
        self,
        crops: Sequence[Crop],
        *,
        batch: int,
        channels: int,
        threads: int,
        depth: int,
        device: torch.device,
    ):
        self._crops, self._channels = crops, channels
        self._depth, self._device = depth, device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pillow")
        self._working: deque[tuple[Request, list[Future[Tensor]]]] = deque()

    def submit(self, request: Request) -> None:
        tasks = [self._pool.submit(self._decode, data) for data in request.data]
        self._working.append((request, tasks))

    def result(self) -> tuple[Tensor, ...]:
        crops = cut_crops(self._crops, *self.decoded())
        return tuple(to_device(crop, self._device) for crop in crops)

    def decoded(self) -> tuple[list[Tensor], Draws]:
        assert len(self._working) == self._depth, "result() needs a full queue"
        request, tasks = self._working[0]
        if errors := rejected_of(dict(enumerate(tasks)), request.draws):
            self._forget()
            raise Rejected(errors)
        self._working.popleft()
        return [task.result() for task in tasks], request.draws

    def _decode(self, data: bytes) -> Tensor:
        return torch.from_numpy(decode_array(data, self._channels))

    def _forget(self) -> None:
        for _, tasks in self._working:
            for task in tasks:
                task.cancel()
        self._working.clear()

    def close(self) -> None:
        self._forget()
        self._pool.shutdown(wait=False, cancel_futures=True)
