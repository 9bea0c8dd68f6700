"""A part of a set of images, the same on every machine: a share of each class, a number of them, or a list.

    10%              of each class its share, rounded, drawn without replacement
    1000             so many, drawn from all
    1000/one-class   so many, drawn from one class, which is drawn among those that have as many
    1000/per-class   the same number from each class; or one from each of fewer classes
    FILE             images by their paths in the set, or by their last names, a line each

Classes keep their numbers, also those of which nothing is left.

Source  the 10 % of arXiv:2208.04164, Table 4, are most often those of SimCLR's list (google-research/simclr,
        imagenet_subsets/10percent.txt), which FILE reads; the draws for Tables 6 to 8 are not published.
Draws   PCG64 of the seed, class after class in their order: the same images for the same set and words.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from fastmim.data.sources.images import Images
from fastmim.data.sources.index import Index, Names

WORDS = "10%, 1000, 1000/one-class, 1000/per-class, or a file with a list"
SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
COUNT = re.compile(r"(\d+)(?:/(one-class|per-class))?")


class Subset(Images):
    """These samples of a set, renumbered from 0."""

    def __init__(self, whole: Images, ids_N: np.ndarray):
        self.whole, self.ids_N = whole, ids_N
        labels = None if whole.labels is None else whole.labels[ids_N]
        names = Names.of(whole.names[int(i)] for i in ids_N)
        index = whole.index
        super().__init__(
            whole.root, Index(index.kind, names, whole.classes, labels, index.stamps, {}, index.left_out)
        )

    def read(self, sample_id: int) -> bytes:
        return self.whole.read(int(self.ids_N[sample_id]))

    def _identity(self) -> Iterator[bytes]:
        yield self.whole.fingerprint.encode()
        yield self.ids_N.tobytes()


def subset(images: Images, words: str, seed: int = 0) -> Subset:
    """The part of the images that the words name. ValueError for what cannot be had of them."""
    if share := SHARE.fullmatch(words):
        return Subset(images, of_each_class(images, float(share[1]) / 100, words, seed))
    if count := COUNT.fullmatch(words):
        return Subset(images, counted(images, int(count[1]), count[2], seed))
    path = Path(words)
    if not path.is_file():
        raise ValueError(f"data.subset: want {WORDS}, got {words!r}, where there is no file")
    return Subset(images, listed(images, path))


def of_each_class(images: Images, share: float, words: str, seed: int) -> np.ndarray:
    """A share of each class. ValueError for a class of which that is none."""
    if not 0 < share <= 1:
        raise ValueError(f"data.subset: want more than 0 and at most 100 %, got {words}")
    random, chosen = np.random.Generator(np.random.PCG64(seed)), []
    for number, ids in enumerate(by_class(images)):
        count = int(np.floor(share * len(ids) + 0.5))
        if len(ids) and not count:
            raise ValueError(
                f"data.subset: want an image of each class, got none of {images.classes[number]}: it has "
                f"{len(ids)}, of which {words} is less than half of one"
            )
        chosen.append(random.permutation(ids)[:count])
    return np.sort(np.concatenate(chosen))


def counted(images: Images, count: int, how: str | None, seed: int) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(seed))
    if not 1 <= count <= len(images):
        raise ValueError(f"data.subset: want 1 to {len(images)} images, as there are, got {count}")
    if how is None:
        return np.sort(random.permutation(len(images))[:count])
    classes = [ids for ids in by_class(images) if len(ids)]
    if how == "one-class":
        enough = [ids for ids in classes if len(ids) >= count]
        if not enough:
            most = max(map(len, classes))
            raise ValueError(f"data.subset: want a class of {count} images, got none of more than {most}")
        return np.sort(random.permutation(enough[random.integers(len(enough))])[:count])
    if count > len(classes) and count % len(classes):
        raise ValueError(
            f"data.subset: want a multiple of the {len(classes)} classes, or fewer, got {count} per class"
        )
    if count < len(classes):
        classes = [classes[i] for i in np.sort(random.permutation(len(classes))[:count])]
    each = max(1, count // len(classes))
    if (fewest := min(map(len, classes))) < each:
        raise ValueError(f"data.subset: want {each} images of each class, got one of {fewest}")
    return np.sort(np.concatenate([random.permutation(ids)[:each] for ids in classes]))


def by_class(images: Images) -> list[np.ndarray]:
    """The ids of each class. ValueError without labels."""
    if images.labels is None:
        raise ValueError(f"data.subset: want images with labels, got none in {images.root}")
    return [np.flatnonzero(images.labels == number) for number in range(len(images.classes))]


def listed(images: Images, path: Path) -> np.ndarray:
    """The images of a list, in the order of their ids.

    ValueError for a line that names none of them, or several by its last name, and for a class without one.
    """
    wanted = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    whole = {name: i for i, name in enumerate(images.names)}
    last: dict[str, list[int]] = {}
    for name, i in whole.items():
        last.setdefault(PurePosixPath(name).name, []).append(i)
    chosen = []
    for line in wanted:
        found = [whole[line]] if line in whole else last.get(line, [])
        if len(found) != 1:
            got = "none" if not found else f"{len(found)} of that name"
            raise ValueError(f"data.subset: {path}: want an image of {images.root}, got {got}: {line}")
        chosen += found
    if not chosen:
        raise ValueError(f"data.subset: {path}: want a line for each image, got none")
    ids = np.unique(chosen)
    if images.labels is not None:
        there, of_whole = set(images.labels[ids].tolist()), set(images.labels.tolist())
        if missing := sorted(of_whole - there):
            names = ", ".join(images.classes[i] for i in missing[:3])
            raise ValueError(f"data.subset: {path}: want an image of each class, got none of {names}")
    return ids
