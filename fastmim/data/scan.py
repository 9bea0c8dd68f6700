"""Every image of a source, read and decoded whole by threads, in the order of its ids."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from typing import TypeVar

from PIL import Image

from fastmim.data.header import FORMATS, BadImage, image_size
from fastmim.data.images import Images

T = TypeVar("T")
AHEAD = 4  # images in work per thread


def read_image(images: Images, sample_id: int) -> tuple[bytes, Image.Image]:
    """The bytes of a sample and what they decode to, as stored. BadImage, which says why, if they do not."""
    try:
        data = images.read(sample_id)
    except OSError as error:
        raise BadImage(f"{type(error).__name__}: {error.strerror}") from None
    return data, decode(data)


def decode(data: bytes) -> Image.Image:
    """All pixels of an image that the loader would take. BadImage if there are none."""
    image_size(data)
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        image.load()
    except Exception as error:  # broken bytes make Pillow's plugins raise almost anything
        raise BadImage(f"{type(error).__name__}: {error}") from None
    return image


def in_order(work: Callable[[int], T], sample_ids: Sequence[int], threads: int) -> Iterator[T]:
    """`map(work, sample_ids)` by threads, a few ids ahead of the caller."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="scan")
    waiting: deque[Future[T]] = deque()
    try:
        for sample_id in sample_ids:
            waiting.append(pool.submit(work, sample_id))
            if len(waiting) >= AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
