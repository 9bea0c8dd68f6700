"""Which images of a source a run would not show, and why; which shards are not as packed.

The decoder that will train is asked, every image decoded whole: what it refuses here it refuses there.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmim.data.decode.choose import DecoderName, make_decoder
from fastmim.data.feed.whole import decode_all
from fastmim.data.sources.images import Images
from fastmim.data.sources.pack import is_as_packed

CHANNELS = 3  # no image is bad in gray and good in color, or the other way round


def verify(
    images: Images, threads: int, decoder: DecoderName, device: torch.device
) -> Iterator[tuple[int, str | None]]:
    """Every sample id, in order, and why it is bad, or None. ValueError where that decoder cannot be had."""
    chunk = 2 * threads
    with closing(
        make_decoder(decoder, (), batch=chunk, channels=CHANNELS, threads=threads, depth=1, device=device)
    ) as decoding:
        for sample_id, image in decode_all(decoding, images, chunk=chunk, threads=threads):
            yield sample_id, None if isinstance(image, Tensor) else image


def changed_shards(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Names of packed shards that are missing or whose SHA-256 is another: a flipped bit may still decode."""
    for entry in manifest["shards"]:
        if not is_as_packed(folder, entry):
            yield entry["name"]
