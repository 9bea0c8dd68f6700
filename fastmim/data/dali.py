"""The decoding graph of DALI, one for CPU and GPU; nothing else in fastmim knows DALI.

    encoded bytes -> decode the box -> uint8 HWC; then, outside of it, `decoder.cut_views`

DALI decodes and does no more: its bicubic resize takes longer than the decoding, and repeats the edge where
Pillow's stays inside. No draw happens in it: boxes are inputs, so it has no state and restarts anywhere.
EXIF orientation is ignored, as torchvision's and Pillow's pipelines do. A file that cannot be decoded kills
the pipeline; it is then found by decoding one at a time, and a new pipeline is built.
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from torch import Tensor

from fastmim.data.decoder import Rejected, Request, cut_views
from fastmim.data.draws import Draws
from fastmim.data.header import FORMATS
from fastmim.views import View

COLOUR = {3: types.DALIImageType.RGB, 1: types.DALIImageType.GRAY}


def build_pipeline(
    views: Sequence[View], *, batch: int, channels: int, threads: int, depth: int, device: torch.device
) -> Pipeline:
    """Input `bytes`, output the whole images; with just one crop also `start`, `shape`, output its boxes."""
    on_gpu = device.type == "cuda"
    device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
    decoding: dict[str, Any] = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": COLOUR[channels],
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,  # chroma as on the CPU; nvJPEG's default repeats it
    }
    pipe = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=depth,
        exec_dynamic=True,  # outputs own their memory: they stay valid while a tensor refers to them
    )
    with pipe:
        data = fn.external_source(name="bytes", dtype=types.DALIDataType.UINT8, ndim=1)
        if len({view.crop for view in views}) != 1:  # decoded once and cut many times
            pipe.set_outputs(fn.decoders.image(data, **decoding))
        else:
            start = fn.external_source(name="start", dtype=types.DALIDataType.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.DALIDataType.INT32, ndim=1)
            cut: dict[str, Any] = {"start": start, "shape": shape, "axes": [0, 1]}
            pipe.set_outputs(fn.decoders.image_slice(data, **cut, **decoding))
    pipe.build()
    return pipe


class DaliDecoder:
    """`decoder.Decoder` on a DALI pipeline whose prefetch queue holds `depth` requests."""

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
        self._views, self._batch, self._depth, self._device = views, batch, depth, device
        self._build = partial(build_pipeline, views, channels=channels, threads=threads, device=device)
        self._requests: deque[Request] = deque()
        self._restart()

    def _restart(self) -> None:
        self._requests.clear()
        self._running = False
        self._pipe = self._build(batch=self._batch, depth=self._depth)

    def submit(self, request: Request) -> None:
        _feed(self._pipe, request.data, request.draws.boxes)
        self._requests.append(request)
        if self._running or len(self._requests) == self._depth:
            self._pipe.schedule_run()  # the first call starts all `depth` requests, later ones one each
            self._running = True

    def result(self) -> tuple[Tensor, ...]:
        return cut_views(self._views, *self.decoded())

    def decoded(self) -> tuple[list[Tensor], Draws]:
        assert len(self._requests) == self._depth, "result() needs a full queue"
        try:
            images = _decoded(self._pipe, self._device)
        except RuntimeError as error:
            slots = self._find_rejected(self._requests[0], str(error))
            self._restart()
            if not slots:  # every image can be decoded alone: this is about something else
                raise
            raise Rejected(slots) from None
        draws = self._requests.popleft().draws
        if len(draws.boxes) == 1:  # what was decoded is the box
            draws = replace(draws, boxes={crop: _from_the_corner(cut) for crop, cut in draws.boxes.items()})
        return images, draws

    def _find_rejected(self, request: Request, message: str) -> dict[int, str]:
        named = [int(slot) for slot in re.findall(r"sample #(\d+)", message)]
        others = [slot for slot in range(len(request.data)) if slot not in named]
        for suspects in (named, others):
            slots = [slot for slot in suspects if self._refuses(request, slot)]
            if slots:
                return {slot: _reason(request.data[slot]) for slot in slots}
        return {}

    def _refuses(self, request: Request, slot: int) -> bool:
        one = slice(slot, slot + 1)
        pipe = self._build(batch=1, depth=1)
        try:
            _feed(pipe, request.data[one], {crop: boxes[one] for crop, boxes in request.draws.boxes.items()})
            pipe.schedule_run()
            _decoded(pipe, self._device)
        except RuntimeError:
            return True
        return False

    def close(self) -> None:
        self._requests.clear()
        del self._pipe


def _feed(pipe: Pipeline, data: list[bytes], boxes: dict[int, np.ndarray]) -> None:
    # DALI copies: what is fed may be forgotten
    pipe.feed_input("bytes", [np.frombuffer(image, np.uint8) for image in data])
    if len(boxes) == 1:
        (cut,) = boxes.values()
        pipe.feed_input("start", np.ascontiguousarray(cut[:, :2]))
        pipe.feed_input("shape", np.ascontiguousarray(cut[:, 2:]))


def _decoded(pipe: Pipeline, device: torch.device) -> list[Tensor]:
    """Images of the oldest run; on a GPU in the order of the current stream, without waiting for it."""
    if device.type == "cpu":
        (decoded,) = pipe.outputs()
        return [torch.from_numpy(np.asarray(decoded[i])) for i in range(len(decoded))]
    with torch.cuda.device(device):
        # bound to the stream that reads them: DALI's pool gets them back behind that
        (decoded,) = pipe.outputs(torch.cuda.current_stream())
    return [torch.from_dlpack(decoded[i]) for i in range(len(decoded))]


def _from_the_corner(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(boxes[:, :2]), boxes[:, 2:]], axis=1)


def _reason(data: bytes) -> str:
    """DALI writes its reason to stderr only; Pillow's is as good, where it refuses the file too."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            image.load()
    except Exception as error:
        return f"DALI cannot decode it; Pillow: {type(error).__name__}: {error}"
    return "DALI cannot decode it; Pillow can (--data.decoder pillow)"
