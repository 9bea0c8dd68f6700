"""Images in memory: encoded bytes, or a uint8 array, whose rows are handed out as PPM or PGM.

A header of a dozen bytes before the pixels makes a row what every decoder takes, without loss or compression.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastmim.data.sources.images import Images
from fastmim.data.sources.index import Index, Names, Stamps


class MemoryImages(Images):
    """A sequence of encoded images, or uint8 `[N, H, W, 3]`, `[N, H, W, 1]` or `[N, H, W]`.

    `labels` are numbers of `classes`, or of 0 to their largest. ValueError for another array or no image.
    """

    def __init__(
        self,
        images: Sequence[bytes] | np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        classes: Sequence[str] = (),
    ):
        if len(images) == 0:
            raise ValueError("want at least one image, got none")
        self._images, self._header = images, b""
        if isinstance(images, np.ndarray):
            self._images, self._header = _rows(images)
        elif not all(isinstance(image, bytes) for image in images):
            raise ValueError("want encoded images as bytes, or a uint8 array of them")
        numbers = None if labels is None else np.asarray(labels)
        if numbers is not None:
            whole = numbers.shape == (len(images),) and np.issubdtype(numbers.dtype, np.integer)
            if not whole or numbers.min() < 0 or (classes and numbers.max() >= len(classes)):
                raise ValueError(
                    f"want {len(images)} labels, numbers of {len(classes) or 'any number of'} classes,"
                    f" got {numbers.dtype} of shape {numbers.shape}"
                )
            classes = classes or [str(i) for i in range(int(numbers.max()) + 1)]
            numbers = numbers.astype(np.int32)
        names = Names.of(f"{i:08d}" for i in range(len(images)))
        nothing = Stamps(Names.of([]), np.zeros((0, 2), np.int64))
        super().__init__(Path("memory"), Index("memory", names, tuple(classes), numbers, nothing))

    def read(self, sample_id: int) -> bytes:
        image = self._images[sample_id]
        return image if isinstance(image, bytes) else self._header + image.tobytes()

    def _identity(self) -> Iterator[bytes]:
        """All of the bytes: they are here."""
        for i in range(len(self)):
            yield hashlib.sha256(self.read(i)).digest()
        yield from self._labels_identity()


def _rows(images: np.ndarray) -> tuple[np.ndarray, bytes]:
    """Images as rows, and the header that makes each a PPM or PGM."""
    shape = images.shape if images.ndim == 4 else (*images.shape, 1)
    if images.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise ValueError(
            f"want uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W], got {images.dtype} {list(images.shape)}"
        )
    return images, f"P{6 if shape[3] == 3 else 5}\n{shape[2]} {shape[1]}\n255\n".encode()
