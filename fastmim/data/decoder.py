"""The contract of the decoders: requests go in, micro-batches of crops come out in the same order.

A decoder holds up to `depth` requests and works on them while the caller does something else. It decides
nothing: all draws come with the request. What it decodes is cut, resized, flipped and colored by the same
ops whatever the decoder: the pixels of a crop depend on it only as far as two JPEG decoders differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from fastmim_kernels import resized_crop
from torch import Tensor

from fastmim.data.color import apply_colors
from fastmim.data.draws import Draws
from fastmim.views import Crop

DecoderName = Literal["dali", "pillow"]
HW_DECODER_LOAD = 0.65  # DALI's default; 0.9 doubled its slowest batches (DALI#6366)


NO_DRAWS = Draws({}, {}, {}, {})


@dataclass(frozen=True)
class Request:
    """One micro-batch of B encoded images, and what is drawn for them; nothing where they stay whole."""

    data: list[bytes]
    draws: Draws = NO_DRAWS


class Rejected(Exception):
    """The oldest request cannot be decoded. The decoder forgot all requests: repair, submit again."""

    def __init__(self, slots: dict[int, str]):
        super().__init__(f"{len(slots)} undecodable images")
        self.slots = slots  # slot -> reason; at least one, perhaps not yet all


class Decoder(Protocol):
    def submit(self, request: Request) -> None:
        """Queue a request behind those in the decoder, of which there must be fewer than `depth`."""

    def result(self) -> tuple[Tensor, ...]:
        """Crops of the oldest request, uint8 `[B, H, W, C]`; the caller owns them. Needs `depth` in it.

        Rejected if images of it cannot be decoded.
        """

    def decoded(self) -> tuple[list[Tensor], Draws]:
        """The same before it is cut: images uint8 `[H_b, W_b, C]`, and the draws as they hold for these.

        A decoder without crops gives the whole images, wherever it decodes.
        """

    def close(self) -> None:
        """Give up threads and memory."""


def cut_crops(crops: Sequence[Crop], images: Sequence[Tensor], draws: Draws) -> tuple[Tensor, ...]:
    """Crops uint8 `[B, H, W, C]` of decoded images `[H_b, W_b, C]`; what several are made of is made once."""
    resized: dict[tuple[object, ...], Tensor] = {}
    cut = []
    for i, crop in enumerate(crops):
        how = crop.box, crop.resized, crop.interpolation
        if how not in resized:
            resized[how] = resized_crop(
                images,
                torch.from_numpy(draws.boxes[crop.box].astype(np.int64)),
                crop.resized,
                flips_B=torch.from_numpy(draws.flips[crop.box]),
                filter=crop.interpolation,
            )
        pixels = resized[how]
        if crop.size != crop.resized:
            pixels = window(pixels, crop, draws)
        if crop.color is not None:
            pixels = apply_colors(pixels, draws.colors[i])
        cut.append(pixels)
    return tuple(cut)


def window(master_BHWC: Tensor, crop: Crop, draws: Draws) -> Tensor:
    """The window of each master, at its drawn corner: a box of its own size, which the resize copies."""
    size_B2 = torch.tensor(crop.size).expand(len(master_BHWC), 2)
    corner_B2 = draws.windows[crop.draw] if crop.shift else torch.zeros_like(size_B2)
    return resized_crop(master_BHWC.unbind(0), torch.cat([corner_B2, size_B2], 1), crop.size)


def make_decoder(
    name: DecoderName,
    crops: Sequence[Crop],
    *,
    batch: int,
    channels: int,
    threads: int,
    depth: int,
    device: torch.device,
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> Decoder:
    """The decoder called `name`. Raises what `check_decoder` raises."""
    check_decoder(name, channels)
    if name == "pillow":
        from fastmim.data.pillow import PillowDecoder

        return PillowDecoder(
            crops, batch=batch, channels=channels, threads=threads, depth=depth, device=device
        )
    from fastmim.data.dali import DaliDecoder

    return DaliDecoder(
        crops, batch=batch, channels=channels, threads=threads, depth=depth, device=device,
        hw_decoder_load=hw_decoder_load,
    )  # fmt: skip


def check_decoder(name: DecoderName, channels: int) -> None:
    """ValueError if the decoder cannot serve. Another one is never taken instead."""
    if channels not in (1, 3):
        raise ValueError(f"model.channels: image files give 1 (gray) or 3 (RGB), got {channels}")
    obstacle = why_no_dali() if name == "dali" else None
    if obstacle:
        raise ValueError(
            f"data.decoder: want dali, but {obstacle}; install it or choose --data.decoder pillow"
            " (fastmim data verify: --decoder pillow)"
        )


def why_no_dali() -> str | None:
    """What keeps DALI from being used here, or None if nothing does."""
    try:
        import fastmim.data.dali  # noqa: F401  its one door
    except ImportError as error:
        return f"the package nvidia-dali-cuda130 cannot be imported ({error})"
    return None
