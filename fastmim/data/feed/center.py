"""Center crops, for evaluation: resized until the short side is as wanted, the middle cut out; no draws.

    short side -> round(size / fraction), bicubic with antialiasing; then the central size x size pixels

Source  Resize and CenterCrop of pytorch/vision on PIL images; 256 and 224 pixels, as in MAE's evaluation.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from fastmim_kernels import resized_crop
from torch import Tensor

from fastmim.data.decode.bad_image import BadImage
from fastmim.data.decode.pixels import as_array
from fastmim.data.sources.images import Images
from fastmim.data.sources.scan import in_order, read_image

FRACTION = 224 / 256


def center_crop(image_HWC: Tensor, size: tuple[int, int], fraction: float = FRACTION) -> Tensor:
    """The central `size` (h, w) pixels of a uint8 image resized to hold size / fraction. `[h, w, C]`."""
    (height, width), (h, w) = image_HWC.shape[:2], size
    tall, wide = round(h / fraction), round(w / fraction)
    if tall * width >= wide * height:
        wide = int(tall * width / height)
    else:
        tall = int(wide * height / width)
    [resized] = resized_crop([image_HWC], torch.tensor([[0, 0, height, width]]), (tall, wide))
    top, left = round((tall - h) / 2), round((wide - w) / 2)
    return resized[top : top + h, left : left + w]


def spread_ids(num: int, most: int | None) -> list[int]:
    """Ids of `most` of so many images, evenly spaced; of all of them, if there are no more."""
    count = min(num, most or num)
    return (np.arange(count) * num // count).tolist() if count else []


def center_crops(
    images: Images,
    size: tuple[int, int],
    *,
    ids: Sequence[int] | None = None,
    channels: int = 3,
    fraction: float = FRACTION,
    batch: int = 256,
    threads: int = 2,
    bad: Callable[[int, str], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of these ids (None: all) in their order, uint8 `[B, H, W, C]`, and the ids, int64 `[B]`.

    ValueError, naming it, for an image that cannot be decoded, unless `bad` is to be told of its id and why:
    then it is black. ValueError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"want a center crop of a fraction in (0, 1], got {fraction}")

    def crop(sample_id: int) -> Tensor:
        try:
            _, image = read_image(images, sample_id)
        except BadImage as error:
            if bad is not None:
                bad(sample_id, str(error))
                return torch.zeros(*size, channels, dtype=torch.uint8)
            raise ValueError(
                f"{images.names[sample_id]} in {images.root} cannot be decoded: {error}"
            ) from None
        return center_crop(torch.from_numpy(as_array(image, channels)), size, fraction)

    ids = range(len(images)) if ids is None else ids
    crops: list[Tensor] = []
    for done, one in enumerate(in_order(crop, ids, threads), start=1):
        crops.append(one)
        if len(crops) == batch or done == len(ids):
            yield torch.stack(crops), torch.tensor(ids[done - len(crops) : done])
            crops = []
