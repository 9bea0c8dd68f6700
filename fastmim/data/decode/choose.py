"""The decoder that was asked for by name, if it can serve here. Another one is never taken instead."""

from collections.abc import Sequence
from typing import Literal

import torch

from fastmim.data.decode.contract import Decoder
from fastmim.views import Crop

DecoderName = Literal["dali", "pillow"]
HW_DECODER_LOAD = 0.65  # DALI's default; 0.9 doubled its slowest batches (DALI#6366)


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
        from fastmim.data.decode.pillow import PillowDecoder

        return PillowDecoder(
            crops, batch=batch, channels=channels, threads=threads, depth=depth, device=device
        )
    from fastmim.data.decode.dali import DaliDecoder

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
        import fastmim.data.decode.dali  # noqa: F401  its one door
    except ImportError as error:
        return f"the package nvidia-dali-cuda130 cannot be imported ({error})"
    return None
