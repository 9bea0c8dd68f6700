"""Parts of a set: how many of which class, the same each time, and what cannot be had."""

from collections import Counter

import numpy as np
import pytest

from fastmim.data.sources.memory import MemoryImages
from fastmim.data.sources.subset import subset

COUNTS = {"a": 40, "b": 25, "c": 11}
LABELS = np.repeat([0, 1, 2], list(COUNTS.values()))


def whole(labels=LABELS):
    pixels = np.arange(76, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    return MemoryImages(pixels, labels, list(COUNTS) if labels is not None else ())


def counts(part):
    return [Counter(part.labels.tolist())[i] for i in range(3)]


def test_a_share_is_of_each_class_and_the_same_each_time():
    images = whole()
    part = subset(images, "10%")
    assert counts(part) == [4, 3, 1] and part.classes == ("a", "b", "c")
    assert subset(whole(), "10%").ids_N.tolist() == part.ids_N.tolist() == sorted(set(part.ids_N.tolist()))
    assert part.ids_N.tolist() != subset(images, "10%", seed=1).ids_N.tolist()
    assert subset(images, "100%").ids_N.tolist() == list(range(76))
    for i, sample in enumerate(part.ids_N):
        assert part.read(i) == images.read(sample) and part.names[i] == images.names[sample]
    assert part.fingerprint != images.fingerprint != subset(images, "20%").fingerprint


@pytest.mark.parametrize(
    ("words", "want"),
    [("7", 7), ("1/per-class", 1), ("2/per-class", 2), ("3/per-class", 3), ("30/per-class", 30)],
)
def test_counts(words, want):
    part = subset(whole(), words)
    assert len(part) == want
    if words.endswith("per-class"):
        assert max(counts(part)) - min(c for c in counts(part) if c) == 0 and sum(
            map(bool, counts(part))
        ) == min(want, 3)


def test_one_class_is_one_that_has_as_many():
    assert all(sorted(counts(subset(whole(), "20/one-class", seed))) == [0, 0, 20] for seed in range(5))
    assert {counts(subset(whole(), "20/one-class", seed))[2] for seed in range(20)} == {0}


def test_lists_name_paths_or_last_names(tmp_path):
    images = whole()
    path = tmp_path / "list.txt"
    path.write_text(f"{images.names[70]}\n\n{images.names[3]}\n{images.names[50]}\n")
    assert subset(images, str(path)).ids_N.tolist() == [3, 50, 70]
    for text, message in [
        ("nothing.png\n", "got none: nothing.png"),
        ("", "want a line for each image"),
        (f"{images.names[3]}\n", "want an image of each class, got none of b, c"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            subset(images, str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0%", "more than 0"), ("101%", "at most 100 %"), ("4%", "none of c: it has 11"),
        ("0", "want 1 to 76"), ("77", "want 1 to 76 images"), ("41/one-class", "got none of more than 40"),
        ("4/per-class", "multiple of the 3"), ("36/per-class", "want 12 images of each class, got one of 11"),
        ("ten", "where there is no file"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_said(words, message):
    with pytest.raises(ValueError, match=message):
        subset(whole(), words)


def test_classes_want_labels():
    assert len(subset(whole(None), "5")) == 5
    with pytest.raises(ValueError, match="want images with labels"):
        subset(whole(None), "10%")
