"""Which images of a source cannot be read and decoded whole, and why; which shards are not as packed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmim.data.header import BadImage
from fastmim.data.images import Images
from fastmim.data.pack import is_as_packed
from fastmim.data.scan import in_order, read_image


def verify(images: Images, threads: int) -> Iterator[tuple[int, str | None]]:
    """Every sample id, in order, and why it is bad, or None for a good one."""

    def reason(sample_id: int) -> str | None:
        try:
            read_image(images, sample_id)
        except BadImage as error:
            return str(error)
        return None

    yield from enumerate(in_order(reason, range(len(images)), threads))


def changed_shards(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Names of packed shards that are missing or whose SHA-256 is another: a flipped bit may still decode."""
    for entry in manifest["shards"]:
        if not is_as_packed(folder, entry):
            yield entry["name"]
