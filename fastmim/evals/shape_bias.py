"""Shape bias: where shape and texture of an image disagree, which of the two a classifier names.

    p(category) = mean of softmax over the ImageNet classes that belong to it;   decision = argmax of 16
    shape bias  = decisions for shape / (decisions for shape + decisions for texture)

Images whose shape and texture are of one category do not count. Decisions for neither lower both fractions,
not the bias.

Source  Geirhos et al., arXiv:1811.12231; the classes of each category as in bethgelab/model-vs-human. Which
        bias is high in which method: Kong & Zhang, arXiv:2208.04164, Figure 4, which has no numbers.
Shapes  N images, K classes, 16 categories.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def numbers(words: str) -> tuple[int, ...]:
    """`80-83 87` as 80, 81, 82, 83, 87."""
    found: list[int] = []
    for word in words.split():
        first, _, last = word.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


IMAGENET_CLASSES = 1000
CATEGORIES: Mapping[str, tuple[int, ...]] = {
    "airplane": numbers("404"),
    "bear": numbers("294-297"),
    "bicycle": numbers("444 671"),
    "bird": numbers("8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145"),
    "boat": numbers("472 554 625 814 914"),
    "bottle": numbers("440 720 737 898-899 901 907"),
    "car": numbers("436 511 817"),
    "cat": numbers("281-286"),
    "chair": numbers("423 559 765 857"),
    "clock": numbers("409 530 892"),
    "dog": numbers("152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268"),
    "elephant": numbers("385-386"),
    "keyboard": numbers("508 878"),
    "knife": numbers("499"),
    "oven": numbers("766"),
    "truck": numbers("555 569 656 675 717 734 864 867"),
}
NAME = re.compile(r"([a-z]+)\d*-([a-z]+)\d*\.\w+")


def cues_of(names: Sequence[str], categories: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Shape and texture of each image, int64 `[N]`, by names as `cat/cat7-elephant1.png`.

    ValueError, naming the image, for a name that is none, of no category, or whose folder is not its shape.
    """
    place = {name: i for i, name in enumerate(categories)}
    shapes, textures = [], []
    for name in names:
        *folders, last = name.split("/")
        found = NAME.fullmatch(last)
        if found is None or not {found[1], found[2]} <= place.keys():
            raise ValueError(
                f"shape-bias: want images called as cat7-elephant1.png, got {name}; the categories are "
                f"{', '.join(categories)}"
            )
        if folders and folders[-1] in place and folders[-1] != found[1]:
            raise ValueError(f"shape-bias: want the folder of the shape, {found[1]}, got {name}")
        shapes.append(place[found[1]])
        textures.append(place[found[2]])
    return torch.tensor(shapes), torch.tensor(textures)


def decisions(logits_NK: Tensor, categories: Mapping[str, Sequence[int]]) -> Tensor:
    """The category that each image is taken for, int64 `[N]`. ValueError for a class that there is not."""
    K = logits_NK.shape[1]
    if bad := {name: ids for name, ids in categories.items() if not ids or not 0 <= min(ids) <= max(ids) < K}:
        raise ValueError(f"shape-bias: want classes from 0 to {K - 1} in each category, got {bad}")
    p_NK = logits_NK.double().softmax(1)
    means = [p_NK[:, list(ids)].mean(1) for ids in categories.values()]
    return torch.stack(means, dim=1).argmax(1)


def shape_bias(
    decided_N: Tensor, shape_N: Tensor, texture_N: Tensor, categories: Sequence[str]
) -> dict[str, float]:
    """The bias over all images and of each category of shapes, and the fractions that name either cue.

    A bias is NaN where no decision was for one of the two. ValueError if no image has two cues.
    """
    conflict_N = shape_N != texture_N
    if not bool(conflict_N.any()):
        raise ValueError("shape-bias: want images whose shape and texture disagree, got none")
    decided, shape, texture = (x[conflict_N] for x in (decided_N, shape_N, texture_N))
    for_shape, for_texture = decided == shape, decided == texture
    found = {
        "shape_bias": share(for_shape, for_texture),
        "shape_fraction": float(for_shape.double().mean()),
        "texture_fraction": float(for_texture.double().mean()),
        "images": float(len(decided)),
    }
    for i, name in enumerate(categories):
        found[f"{name}/shape_bias"] = share(for_shape[shape == i], for_texture[shape == i])
    return found


def share(for_shape: Tensor, for_texture: Tensor) -> float:
    both = int(for_shape.sum() + for_texture.sum())
    return float(for_shape.sum()) / both if both else float("nan")
