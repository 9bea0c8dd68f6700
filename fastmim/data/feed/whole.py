"""Every image of a source decoded whole by the decoder that trains, in the order of its ids."""

from collections.abc import Iterator
from functools import partial
from itertools import islice

from torch import Tensor

from fastmim.data.decode.contract import Decoder, Rejected, Request
from fastmim.data.decode.header import MAX_PIXELS
from fastmim.data.feed.bad import try_read
from fastmim.data.sources.images import Images
from fastmim.data.sources.scan import in_order


def decode_all(
    decoder: Decoder, images: Images, *, chunk: int, threads: int, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[int, Tensor | str]]:
    """Sample ids and uint8 `[H, W, C]`, or why there is none; `decoder` has no crops and depth 1.

    As many as `chunk`, the decoder's batch, are in memory at once.
    """
    read_one = partial(try_read, images, max_pixels=max_pixels)
    reads = enumerate(in_order(read_one, range(len(images)), threads))
    while reading := dict(islice(reads, chunk)):
        found: dict[int, Tensor | str] = {i: read for i, read in reading.items() if isinstance(read, str)}
        waiting = {i: read[0] for i, read in reading.items() if not isinstance(read, str)}
        while waiting:
            decoder.submit(Request([*waiting.values()]))
            try:
                pixels, _ = decoder.decoded()
            except Rejected as rejected:
                bad = {[*waiting][slot]: reason for slot, reason in rejected.slots.items()}
                found |= bad
                waiting = {image_id: data for image_id, data in waiting.items() if image_id not in bad}
            else:
                found |= zip(waiting, pixels, strict=True)
                break
        for image_id, read in reading.items():
            image = found[image_id]
            if isinstance(image, Tensor) and image.shape[:2] != read[1]:
                image = f"its header says {read[1]}, but it is {tuple(image.shape[:2])}"
            yield image_id, image
