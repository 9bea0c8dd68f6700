"""Every image of a source, read and decoded whole by threads, in the order of its ids."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from PIL import Image

from fastmim.data.decode.bad_image import BadImage
from fastmim.data.decode.pixels import decode
from fastmim.data.sources.images import Images
from fastmim.data.sources.patience import DiskError, patiently

T = TypeVar("T")
AHEAD = 4  # images in work per thread


def read_image(images: Images, sample_id: int, *, deep: bool = False) -> tuple[bytes, Image.Image]:
    """The bytes of a sample and what `pixels.decode` makes of them. BadImage, which says why, if nothing."""
    try:
        data = patiently(lambda: images.read(sample_id), images.root / images.names[sample_id])
    except DiskError:
        raise
    except OSError as error:
        raise BadImage(f"{type(error).__name__}: {error.strerror}") from None
    return data, decode(data, deep=deep)


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
