"""The decoder for machines without DALI, chosen by name: Pillow in a pool of threads.

    encoded bytes -> decode whole -> RGB or grey; then, outside of it, `decoder.cut_views`

With the crop, resize and flip of that it is the pipeline of torchvision's ImageFolder, RandomResizedCrop and
RandomHorizontalFlip, and what the graph of DALI is compared with. `Image.draft`, which decodes JPEGs at a
fraction of their size, is not used: it is another filter.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmim.data.decoder import Rejected, Request, cut_views
from fastmim.data.draws import Draws
from fastmim.data.header import FORMATS
from fastmim.data.supply import to_device
from fastmim.views import View

MODE = {3: "RGB", 1: "L"}


class PillowDecoder:
    """`decoder.Decoder` on `threads` threads, an image each at a time."""

    def __init__(
        self,
        views: Sequence[View],
        *,
        batch: int,
        channels: int,
        threads: int,
        depth: int,
        device: torch.device,
    ):
        self._views, self._channels = views, channels
        self._depth, self._device = depth, device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pillow")
        self._working: deque[tuple[Request, list[Future[Tensor]]]] = deque()

    def submit(self, request: Request) -> None:
        tasks = [self._pool.submit(self._decode, data) for data in request.data]
        self._working.append((request, tasks))

    def result(self) -> tuple[Tensor, ...]:
        views = cut_views(self._views, *self.decoded())
        return tuple(to_device(view, self._device) for view in views)

    def decoded(self) -> tuple[list[Tensor], Draws]:
        assert len(self._working) == self._depth, "result() needs a full queue"
        request, tasks = self._working[0]
        errors = {slot: error for slot, task in enumerate(tasks) if (error := task.exception())}
        if errors:
            self._forget()
            raise Rejected(
                {slot: f"Pillow: {type(error).__name__}: {error}" for slot, error in errors.items()}
            )
        self._working.popleft()
        return [task.result() for task in tasks], request.draws

    def _decode(self, data: bytes) -> Tensor:
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            image = as_bytes(opened).convert(MODE[self._channels])
        return torch.from_numpy(np.array(image).reshape(image.height, image.width, self._channels))

    def _forget(self) -> None:
        for _, tasks in self._working:
            for task in tasks:
                task.cancel()
        self._working.clear()

    def close(self) -> None:
        self._forget()
        self._pool.shutdown(wait=False, cancel_futures=True)


def as_bytes(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, as DALI does; Pillow's own conversion would clip it to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
