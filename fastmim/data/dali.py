"""The decoding graph of DALI, one for CPU and GPU; nothing else in fastmim knows DALI.

    encoded bytes -> decode the box -> resize, bicubic or bilinear, antialiased -> flip -> uint8 HWC

No draw happens in DALI: boxes and flips are inputs, so the graph has no state and restarts anywhere.
EXIF orientation is ignored, as torchvision's and Pillow's pipelines do. Against Pillow the pixels differ by
rounding, and on the outermost row and column, where DALI's filter repeats the edge and Pillow's leaves it
out: 0.18 levels of 255 and 55.5 dB on ImageNet at 224 pixels. A file that cannot be decoded kills
the pipeline; it is then found by decoding one at a time, and a new pipeline is built.
"""

import re
from collections import deque
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from torch import Tensor

from fastmim.data.crop import crops_of
from fastmim.data.decoder import Rejected, Request
from fastmim.data.header import FORMATS
from fastmim.views import View

INTERPOLATION = {"bicubic": types.DALIInterpType.INTERP_CUBIC, "bilinear": types.DALIInterpType.INTERP_LINEAR}
COLOUR = {3: types.DALIImageType.RGB, 1: types.DALIImageType.GRAY}


def build_pipeline(
    views: Sequence[View], *, batch: int, channels: int, threads: int, depth: int, device: torch.device
) -> Pipeline:
    """Inputs `bytes` and, for each crop, `start`, `shape` and `flip` with its number; outputs are `views`."""
    on_gpu = device.type == "cuda"
    device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
    decoding: dict[str, Any] = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": COLOUR[channels],
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,  # chroma as on the CPU; nvJPEG's default repeats it
    }
    crops = crops_of(views)
    pipe = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=depth,
        exec_dynamic=True,  # outputs own their memory: they stay valid while a tensor refers to them
    )
    with pipe:
        data = fn.external_source(name="bytes", dtype=types.DALIDataType.UINT8, ndim=1)
        # many crops of one image: decode it once and cut, which gives the same pixels
        whole = fn.decoders.image(data, **decoding) if len(crops) > 1 else None
        boxes: dict[int, Any] = {}
        flips: dict[int, Any] = {}
        for crop in crops:
            start = fn.external_source(name=f"start{crop}", dtype=types.DALIDataType.INT32, ndim=1)
            shape = fn.external_source(name=f"shape{crop}", dtype=types.DALIDataType.INT32, ndim=1)
            cut: dict[str, Any] = {"start": start, "shape": shape, "axes": [0, 1]}
            boxes[crop] = (
                fn.slice(whole, **cut)
                if whole is not None
                else fn.decoders.image_slice(data, **cut, **decoding)
            )
            flips[crop] = fn.external_source(name=f"flip{crop}", dtype=types.DALIDataType.INT32, ndim=0)
        outputs = []
        for view in views:
            interpolation = INTERPOLATION[view.interpolation]
            image: Any = fn.resize(
                boxes[view.crop], size=view.size, interp_type=interpolation, antialias=True
            )
            outputs.append(fn.flip(image, horizontal=flips[view.crop]))
        pipe.set_outputs(*outputs)
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
        self._batch, self._depth, self._device = batch, depth, device
        self._build = partial(build_pipeline, views, channels=channels, threads=threads, device=device)
        self._requests: deque[Request] = deque()
        self._restart()

    def _restart(self) -> None:
        self._requests.clear()
        self._running = False
        self._pipe = self._build(batch=self._batch, depth=self._depth)

    def submit(self, request: Request) -> None:
        _feed(self._pipe, request)
        self._requests.append(request)
        if self._running or len(self._requests) == self._depth:
            self._pipe.schedule_run()  # the first call starts all `depth` requests, later ones one each
            self._running = True

    def result(self) -> tuple[Tensor, ...]:
        assert len(self._requests) == self._depth, "result() needs a full queue"
        try:
            outputs = _outputs(self._pipe, self._device)
        except RuntimeError as error:
            slots = self._find_rejected(self._requests[0], str(error))
            self._restart()
            if not slots:  # every image can be decoded alone: this is about something else
                raise
            raise Rejected(slots) from None
        self._requests.popleft()
        return outputs

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
        boxes = {crop: boxes[one] for crop, boxes in request.boxes.items()}
        flips = {crop: flips[one] for crop, flips in request.flips.items()}
        pipe = self._build(batch=1, depth=1)
        try:
            _feed(pipe, Request(request.data[one], boxes, flips))
            pipe.schedule_run()
            _outputs(pipe, self._device)
        except RuntimeError:
            return True
        return False

    def close(self) -> None:
        self._requests.clear()
        del self._pipe


def _feed(pipe: Pipeline, request: Request) -> None:
    # DALI copies: what is fed may be forgotten
    pipe.feed_input("bytes", [np.frombuffer(data, np.uint8) for data in request.data])
    for crop, boxes in request.boxes.items():
        pipe.feed_input(f"start{crop}", np.ascontiguousarray(boxes[:, :2]))
        pipe.feed_input(f"shape{crop}", np.ascontiguousarray(boxes[:, 2:]))
        pipe.feed_input(f"flip{crop}", request.flips[crop].astype(np.int32))


def _outputs(pipe: Pipeline, device: torch.device) -> tuple[Tensor, ...]:
    """Outputs of the oldest run; on a GPU in the order of the current stream, without waiting for it."""
    if device.type == "cpu":
        return tuple(torch.from_dlpack(batch.as_tensor()) for batch in pipe.outputs())
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        # a copy: memory of torch's allocator obeys record_stream, and DALI's pool gets its own back at once
        return tuple(torch.from_dlpack(batch.as_tensor()).clone() for batch in pipe.outputs(stream))


def _reason(data: bytes) -> str:
    """DALI writes its reason to stderr only; Pillow's is as good, where it refuses the file too."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            image.load()
    except Exception as error:
        return f"DALI cannot decode it; Pillow: {type(error).__name__}: {error}"
    return "DALI cannot decode it; Pillow can (--data.decoder pillow)"
