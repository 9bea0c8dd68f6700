"""What a decoder is: requests go in, micro-batches of crops come out in the same order.

A decoder holds up to `depth` requests and works on them while the caller does something else. It decides
nothing: all draws come with the request. What it decodes is cut, resized, flipped and colored by the same
ops whatever the decoder (cut.py): the pixels of a crop depend on it only as far as two JPEG decoders differ.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastmim.data.augment.draws import Draws

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
