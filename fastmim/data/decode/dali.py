"""The decoding graph of DALI, one for CPU and GPU; nothing else in fastmim knows DALI.

    encoded bytes -> decode the box -> uint8 HWC; then, outside of it, `decoder.cut_crops`

DALI decodes and does no more: its bicubic resize takes longer than the decoding, and repeats the edge where
Pillow's stays inside. No draw happens in it: boxes are inputs, so it has no state and restarts anywhere.
EXIF orientation is ignored, as torchvision's and Pillow's pipelines do.

What it decodes   Plain JPEGs and PNGs, `pixels.for_dali`. Everything else is decoded by threads of our own as
                  `pixels` says, whose values are the rule, and DALI gets a pixel of our own in that slot.
Bad files         One that cannot be decoded kills the pipeline: it is found by decoding one at a time, and a
                  new pipeline is built. One that cannot be parsed kills the process: DALI 2.4 unwinds while
                  its threads still work on the others of the batch. So nvImageCodec's parser, which is
                  DALI's, is asked first. What DALI refuses, `pixels` judges, so that a file is good or bad
                  for every decoder alike, and the reason is the same.
"""

import re
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.nvimgcodec import CodeStream  # DALI needs it itself
from torch import Tensor

from fastmim.data.augment.draws import Draws
from fastmim.data.decode.contract import Rejected, Request
from fastmim.data.decode.cut import cut_crops, to_device
from fastmim.data.decode.pixels import decode_array, for_dali
from fastmim.data.decode.rejected import holds_boxes, rejected_of
from fastmim.views import Crop

COLOR = {3: types.DALIImageType.RGB, 1: types.DALIImageType.GRAY}
PIXEL = b"P6\n1 1\n255\n\0\0\0"  # stands where DALI decodes nothing; nobody sees it


def make_pipeline(
    crops: Sequence[Crop],
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
        "output_type": COLOR[channels],
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
        if len({crop.box for crop in crops}) != 1:  # decoded once and cut many times
            pipe.set_outputs(fn.decoders.image(data, **decoding))
        else:
            start = fn.external_source(name="start", dtype=types.DALIDataType.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.DALIDataType.INT32, ndim=1)
            cut: dict[str, Any] = {"start": start, "shape": shape, "axes": [0, 1]}
            pipe.set_outputs(fn.decoders.image_slice(data, **cut, **decoding))
    return pipe


@dataclass
class Work:
    """A request in the pipeline, what DALI was fed of it, and what our own threads decode, by slot."""

    request: Request
    fed: Request
    ours: dict[int, Future[Tensor]]


class DaliDecoder:
    """`decoder.Decoder` on a DALI pipeline whose prefetch queue holds `depth` requests."""

    def __init__(
        self,
        crops: Sequence[Crop],
        *,
        batch: int,
        channels: int,
        threads: int,
        depth: int,
        device: torch.device,
        hw_decoder_load: float,
    ):
        self._crops, self._batch, self._depth, self._device = crops, batch, depth, device
        self._make = partial(
            make_pipeline, crops, channels=channels, threads=threads, device=device,
            hw_decoder_load=hw_decoder_load,
        )  # fmt: skip
        self._channels = channels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pixels")
        self._refused: set[bytes] = set()  # digests of what DALI cannot decode
        self._work: deque[Work] = deque()
        self._restart()

    def _build(self, batch: int, depth: int) -> Pipeline:
        pipe = self._make(batch=batch, depth=depth)
        pipe.build()
        return pipe

    def _restart(self) -> None:
        for work in self._work:
            for task in work.ours.values():
                task.cancel()
        self._work.clear()
        self._running = False
        self._pipe = self._build(self._batch, self._depth)

    def submit(self, request: Request) -> None:
        data, ours = list(request.data), {}
        for slot, encoded in enumerate(request.data):
            taken = self._taken(encoded, request.draws, slot)
            if taken is None:
                ours[slot] = self._pool.submit(self._decode, encoded)
            else:
                data[slot] = taken
        fed = replace(request, data=data)
        _feed(self._pipe, *_without(ours, fed))
        self._work.append(Work(request, fed, ours))
        if self._running or len(self._work) == self._depth:
            self._pipe.schedule_run()  # the first call starts all `depth` requests, later ones one each
            self._running = True

    def _taken(self, data: bytes, draws: Draws, slot: int) -> bytes | None:
        """What DALI gets of these: a plain file, of the size that its parser sees, holding the box."""
        plain = for_dali(data, self._channels)
        if plain is None or (self._refused and _digest(data) in self._refused):
            return None
        pixels, size = plain
        try:
            stream = CodeStream(pixels)
        except RuntimeError:
            return None
        fits = size == (stream.height, stream.width) and holds_boxes(size, draws, slot)
        return pixels if fits else None

    def _decode(self, data: bytes) -> Tensor:
        return torch.from_numpy(decode_array(data, self._channels))

    def result(self) -> tuple[Tensor, ...]:
        return cut_crops(self._crops, *self.decoded())

    def decoded(self) -> tuple[list[Tensor], Draws]:
        assert len(self._work) == self._depth, "result() needs a full queue"
        while True:
            oldest = self._work[0]
            request, ours = oldest.request, oldest.ours
            if errors := rejected_of(ours, request.draws):
                self._restart()
                raise Rejected(errors)
            try:
                images = _decoded(self._pipe, self._device)
            except RuntimeError as error:
                slots = self._find_refused(oldest.fed, str(error), ours.keys())
                if not slots:  # every image can be decoded alone: this is about something else
                    self._restart()
                    raise
                self._refused |= {_digest(request.data[slot]) for slot in slots}
                self._again()
            else:
                break
        self._work.popleft()
        for slot, task in ours.items():
            images[slot] = to_device(_cut(task.result(), slot, request.draws), self._device)
        draws = request.draws
        if len(draws.boxes) == 1:  # what was decoded is the box
            draws = replace(draws, boxes={box: _from_the_corner(cut) for box, cut in draws.boxes.items()})
        return images, draws

    def _again(self) -> None:
        """The same requests from the start, without what DALI refused."""
        requests = [work.request for work in self._work]
        self._restart()
        for request in requests:
            self.submit(request)

    def _find_refused(self, request: Request, message: str, ours: Iterable[int]) -> list[int]:
        """Slots that DALI cannot decode: of those its error names, else of all that it was given."""
        given = [slot for slot in range(len(request.data)) if slot not in ours]
        named = {int(slot) for slot in re.findall(r"sample #(\d+)", message)}
        first = [slot for slot in given if slot in named]
        return self._refused_of(request, first) or self._refused_of(
            request, [slot for slot in given if slot not in named]
        )

    def _refused_of(self, request: Request, suspects: Sequence[int]) -> list[int]:
        """Those of the suspects that DALI cannot decode alone."""
        pipe, refused = None, []
        for slot in suspects:
            pipe = pipe or self._build(1, 1)
            one = slice(slot, slot + 1)
            _feed(pipe, request.data[one], {box: boxes[one] for box, boxes in request.draws.boxes.items()})
            pipe.schedule_run()
            try:
                _decoded(pipe, self._device)
            except RuntimeError:
                refused.append(slot)
                pipe = None  # it is of no use any more
        return refused

    def close(self) -> None:
        self._work.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
        del self._pipe


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _cut(image: Tensor, slot: int, draws: Draws) -> Tensor:
    """Of a whole image what the pipeline would give: the box, where there is one."""
    if len(draws.boxes) != 1:
        return image
    [boxes] = draws.boxes.values()
    top, left, height, width = boxes[slot].tolist()
    return image[top : top + height, left : left + width].contiguous()


def _without(slots: Iterable[int], request: Request) -> tuple[list[bytes], dict[int, np.ndarray]]:
    """Data and boxes of a request, with a pixel in these slots."""
    data, boxes = list(request.data), {box: cut.copy() for box, cut in request.draws.boxes.items()}
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
