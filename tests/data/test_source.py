"""Folders of every shape: ids and labels are a function of the names alone."""

import os
import subprocess
import sys

import pytest

from fastmim.data import find_images


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def test_nested_folders_are_classes(tmp_path):
    images = find_images(make(tmp_path, "dog/2.png", "cat/deep/er/1.JPEG", "dog/1.webp", "cat/9.jpg"))
    assert images.names == ["cat/9.jpg", "cat/deep/er/1.JPEG", "dog/1.webp", "dog/2.png"]
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.read(2) == b"dog/1.webp"
    assert images.path(2) == tmp_path / "dog" / "1.webp"


@pytest.mark.parametrize("names", [["b.jpg", "a.jpg"], ["a/1.jpg", "b.jpg"]])
def test_images_at_the_top_mean_no_labels(tmp_path, names):
    images = find_images(make(tmp_path, *names))
    assert images.names == sorted(names)
    assert images.classes == ()
    assert images.labels is None


def test_what_is_no_visible_image_is_skipped(tmp_path):
    make(tmp_path, "a.jpg", ".hidden.jpg", ".cache/b.jpg", "._a.jpg", "notes.txt", "folder.jpg/c.png", "jpg")
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    assert find_images(tmp_path).names == ["a.jpg", "folder.jpg/c.png"]


def test_links_are_followed_once(tmp_path):
    make(tmp_path, "set/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    # two folders that contain each other by links
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set" / "a")
    names = find_images(tmp_path / "set").names
    assert names[0] == "a/1.jpg" and "b/2.jpg" in names
    assert len(names) == len(set(names)) < 10


def test_the_fingerprint_sees_names_and_sizes(tmp_path):
    make(tmp_path, "a.jpg", "b.jpg")
    first = find_images(tmp_path).fingerprint
    assert first == find_images(tmp_path).fingerprint
    (tmp_path / "b.jpg").write_bytes(b"longer than before")
    resized = find_images(tmp_path).fingerprint
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    assert len({first, resized, find_images(tmp_path).fingerprint}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "does not exist"), ("file.jpg", "it is a file"), ("empty", r"no image in .*\.jpg .*\.png")],
)
def test_bad_folders_are_one_clear_line(tmp_path, name, message):
    make(tmp_path, "file.jpg", "empty/readme.txt")
    with pytest.raises(ValueError, match=message) as error:
        find_images(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_not_utf_8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb") as file:
        file.write(b"x")
    images = find_images(tmp_path)
    assert images.read(0) == b"x"
    assert len(images.fingerprint) == 64


def test_importing_the_data_does_not_import_dali():
    code = "import sys, fastmim.data; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0
