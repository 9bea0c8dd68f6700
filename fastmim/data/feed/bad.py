"""Images that cannot be decoded: each named once, and which image shows in the place of one.

A bad image shows the next one (cyclically, by number) that is not bad, cut by the keys of its own samples.
The batches are those of a set where the bad file held the bytes of that one.
"""

import json
from pathlib import Path

from fastmim.data.config import DataConfig
from fastmim.data.decode.header import MAX_PIXELS, BadImage, image_size
from fastmim.data.sources.images import Images
from fastmim.data.sources.patience import DiskError, patiently

Read = tuple[bytes, tuple[int, int]] | str  # bytes and (height, width), or why not


class BadImages(ValueError):
    """Too many files cannot be decoded."""


def try_read(images: Images, image_id: int, max_pixels: int = MAX_PIXELS) -> Read:
    """The encoded bytes and the size that their header says, or what is wrong with them.

    DiskError where it is not the image that is bad.
    """
    try:
        data = patiently(lambda: images.read(image_id), images.root / images.names[image_id])
        height, width = image_size(data)
        if height * width > max_pixels:
            return f"{height} x {width} pixels, more than the {max_pixels} of data.max-pixels"
        return data, (height, width)
    except DiskError:
        raise
    except BadImage as error:
        return str(error)
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"


class BadFiles:
    """The bad images that this rank has met, kept in memory and in the file `path`."""

    def __init__(self, images: Images, config: DataConfig, path: Path, *, rank: int):
        self._images, self._config, self._path, self._rank = images, config, path, rank
        self._bad: set[int] = set()

    def __contains__(self, image_id: int) -> bool:
        return image_id in self._bad

    def replacement(self, image_id: int) -> int:
        """The image itself, or the next one that is not known to be bad."""
        while image_id in self._bad:
            image_id = (image_id + 1) % len(self._images)
        return image_id

    def report(self, image_id: int, reason: str, *, epoch: int, step: int) -> None:
        """Write a bad file down. BadImages if there are too many of them."""
        self._bad.add(image_id)
        row = {
            "path": self._images.names[image_id],
            "sample_id": image_id,
            "epoch": epoch,
            "step": step,
            "rank": self._rank,
            "reason": reason,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        num_images = len(self._images)
        limit = self._config.bad_limit(num_images)
        if len(self._bad) > limit or len(self._bad) == num_images:
            raise BadImages(
                f"{len(self._bad)} of {num_images} images cannot be decoded, more than the {limit} allowed"
                f" (data.max_bad_fraction = {self._config.max_bad_fraction}); each is named in"
                f" {self._path}, the last: {row['path']}: {reason}"
            )
