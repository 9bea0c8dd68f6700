"""The decoder for machines without DALI, chosen by name: Pillow in a pool of threads.

    encoded bytes -> decode whole -> RGB or grey -> crop -> resize, bicubic or bilinear -> flip -> uint8 HWC

It is the pipeline of torchvision's ImageFolder, RandomResizedCrop and RandomHorizontalFlip, and what the
graph of DALI is compared with. `Image.draft`, which decodes JPEGs at a fraction of their size, is not used:
it is another filter.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmim.data.decoder import Rejected, Request
from fastmim.data.header import FORMATS
from fastmim.views import View

INTERPOLATION = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MODE = {3: "RGB", 1: "L"}


class PillowDecoder:
    """`decoder.Decoder` on `threads` threads; each writes its images into the tensors of the batch."""

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
        self._views, self._batch, self._channels = views, batch, channels
        self._depth, self._device = depth, device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pillow")
        self._working: deque[tuple[tuple[Tensor, ...], list[Future[None]]]] = deque()

    def submit(self, request: Request) -> None:
        shapes = ((self._batch, *view.size, self._channels) for view in self._views)
        pinned = self._device.type == "cuda"
        out = tuple(torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for shape in shapes)
        arrays = [tensor.numpy() for tensor in out]
        tasks = [self._pool.submit(self._decode, request, arrays, slot) for slot in range(self._batch)]
        self._working.append((out, tasks))

    def result(self) -> tuple[Tensor, ...]:
        assert len(self._working) == self._depth, "result() needs a full queue"
        out, tasks = self._working[0]
        errors = {slot: error for slot, task in enumerate(tasks) if (error := task.exception())}
        if errors:
            self._forget()
            raise Rejected(
                {slot: f"Pillow: {type(error).__name__}: {error}" for slot, error in errors.items()}
            )
        self._working.popleft()
        return tuple(tensor.to(self._device, non_blocking=True) for tensor in out)

    def _decode(self, request: Request, out: list[np.ndarray], slot: int) -> None:
        with Image.open(BytesIO(request.data[slot]), formats=FORMATS) as opened:
            image = _as_bytes(opened).convert(MODE[self._channels])
        for view, array in zip(self._views, out, strict=True):
            top, left, height, width = request.boxes[view.crop][slot].tolist()
            crop = image.crop((left, top, left + width, top + height))
            crop = crop.resize(view.size[::-1], INTERPOLATION[view.interpolation])
            if request.flips[view.crop][slot]:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            array[slot] = np.asarray(crop).reshape(array.shape[1:])

    def _forget(self) -> None:
        for _, tasks in self._working:
            for task in tasks:
                task.cancel()
        self._working.clear()

    def close(self) -> None:
        self._forget()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _as_bytes(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, as DALI does; Pillow's own conversion would clip it to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
