"""The decoding graph of DALI, one for CPU and GPU; nothing else in fastmim knows DALI.

    encoded bytes -> decode the box -> uint8 HWC; then, outside of it, `decoder.cut_views`

DALI decodes and does no more: its bicubic resize takes longer than the decoding, and repeats the edge where
Pillow's stays inside. No draw happens in it: boxes are inputs, so it has no state and restarts anywhere.
EXIF orientation is ignored, as torchvision's and Pillow's pipelines do.

Bad files   One that cannot be decoded kills the pipeline: it is found by decoding one at a time, and a new
            pipeline is built. One that cannot be parsed kills the process: DALI 2.4 unwinds while its threads
            still work on the others of the batch. So nvImageCodec's parser, which is DALI's, is asked first,
            and DALI gets a pixel of our own in that slot.
Limits      Its JPEG 2000 decoder crashes on some broken files: Pillow decodes these first.
"""

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.nvimgcodec import CodeStream  # DALI needs it itself
from PIL import Image
from torch import Tensor

from fastmim.data.decoder import Rejected, Request, cut_views
from fastmim.data.draws import Draws
from fastmim.data.header import FORMATS
from fastmim.views import View

COLOUR = {3: types.DALIImageType.RGB, 1: types.DALIImageType.GRAY}
PIXEL = b"P6\n1 1\n255\n\0\0\0"  # stands where a file cannot be parsed; nobody sees it


def make_pipeline(
    views: Sequence[View],
    *,
    batch: int,
    channels: int,
    threads: int,
    depth: int,
    device: torch.device,
    hw_decoder_load: float,
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
    if on_gpu:
        decoding["hw_decoder_load"] = hw_decoder_load
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
        hw_decoder_load: float,
    ):
        self._views, self._batch, self._depth, self._device = views, batch, depth, device
        self._make = partial(
            make_pipeline, views, channels=channels, threads=threads, device=device,
            hw_decoder_load=hw_decoder_load,
        )  # fmt: skip
        self._requests: deque[tuple[Request, dict[int, str]]] = deque()  # and what DALI must not see of it
        self._restart()

    def _build(self, batch: int, depth: int) -> Pipeline:
        pipe = self._make(batch=batch, depth=depth)
        pipe.build()
        return pipe

    def _restart(self) -> None:
        self._requests.clear()
        self._running = False
        self._pipe = self._build(self._batch, self._depth)

    def submit(self, request: Request) -> None:
        unfit = _unfit(request)
        _feed(self._pipe, *_without(unfit, request))
        self._requests.append((request, unfit))
        if self._running or len(self._requests) == self._depth:
            self._pipe.schedule_run()  # the first call starts all `depth` requests, later ones one each
            self._running = True

    def result(self) -> tuple[Tensor, ...]:
        return cut_views(self._views, *self.decoded())

    def decoded(self) -> tuple[list[Tensor], Draws]:
        assert len(self._requests) == self._depth, "result() needs a full queue"
        request, unfit = self._requests[0]
        if unfit:
            self._restart()
            raise Rejected(unfit)
        try:
            images = _decoded(self._pipe, self._device)
        except RuntimeError as error:
            slots = self._find_rejected(request, str(error))
            self._restart()
            if not slots:  # every image can be decoded alone: this is about something else
                raise
            raise Rejected(slots) from None
        self._requests.popleft()
        draws = request.draws
        if len(draws.boxes) == 1:  # what was decoded is the box
            draws = replace(draws, boxes={crop: _from_the_corner(cut) for crop, cut in draws.boxes.items()})
        return images, draws

    def _find_rejected(self, request: Request, message: str) -> dict[int, str]:
        named = [int(slot) for slot in re.findall(r"sample #(\d+)", message)]
        others = [slot for slot in range(len(request.data)) if slot not in named]
        for suspects in (named, others):
            if slots := self._refused(request, suspects):
                return {slot: f"DALI cannot decode it; {_pillows(request.data[slot])}" for slot in slots}
        return {}

    def _refused(self, request: Request, suspects: Sequence[int]) -> list[int]:
        """Those of the suspects that DALI cannot decode alone."""
        pipe, refused = None, []
        for slot in suspects:
            pipe = pipe or self._build(1, 1)
            one = slice(slot, slot + 1)
            _feed(pipe, request.data[one], {crop: boxes[one] for crop, boxes in request.draws.boxes.items()})
            pipe.schedule_run()
            try:
                _decoded(pipe, self._device)
            except RuntimeError:
                refused.append(slot)
                pipe = None  # it is of no use any more
        return refused

    def close(self) -> None:
        self._requests.clear()
        del self._pipe


def _unfit(request: Request) -> dict[int, str]:
    """Slots whose bytes must not come to DALI, and why."""
    reasons = {}
    for slot, data in enumerate(request.data):
        try:
            stream = CodeStream(data)
            height, width, codec = stream.height, stream.width, stream.codec_name
        except RuntimeError:
            reasons[slot] = f"DALI cannot read its structure; {_pillows(data)}"
            continue
        ends = [box[slot, :2] + box[slot, 2:] for box in request.draws.boxes.values()]
        if any(bottom > height or right > width for bottom, right in ends):
            reasons[slot] = f"DALI sees {height} x {width} pixels in it, the header says more"
        elif codec == "jpeg2k" and (damage := _damage(data)):
            reasons[slot] = f"Pillow: {damage}"
    return reasons


def _without(slots: Iterable[int], request: Request) -> tuple[list[bytes], dict[int, np.ndarray]]:
    """Data and boxes of a request, with a pixel in these slots."""
    data, boxes = list(request.data), {crop: cut.copy() for crop, cut in request.draws.boxes.items()}
    for slot in slots:
        data[slot] = PIXEL
        for cut in boxes.values():
            cut[slot] = (0, 0, 1, 1)
    return data, boxes


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


def _pillows(data: bytes) -> str:
    """DALI writes its reason to stderr only; Pillow's is as good, where it refuses the file too."""
    damage = _damage(data)
    return f"Pillow: {damage}" if damage else "Pillow can (--data.decoder pillow)"


def _damage(data: bytes) -> str | None:
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            image.load()
    except Exception as error:  # broken bytes make Pillow's plugins raise almost anything
        return f"{type(error).__name__}: {error}"
    return None
