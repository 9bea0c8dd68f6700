"""Center crops are those of torchvision's Resize and CenterCrop, and come in the order of the ids."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import find_images
from fastmim.data.feed.center import center_crop, center_crops


def plain(image: Image.Image, size: int, resize: int) -> np.ndarray:
    """Resize(resize) and CenterCrop(size) of torchvision, in its words; rows resized first."""
    w, h = image.size
    new = (resize, int(resize * h / w)) if w <= h else (int(resize * w / h), resize)
    image = image.resize((new[0], h), Image.BICUBIC).resize(new, Image.BICUBIC)
    top, left = round((new[1] - size) / 2), round((new[0] - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (33, 33), (200, 31), (7, 9)])
@pytest.mark.parametrize(("size", "fraction"), [(28, 0.875), (32, 1.0), (5, 0.5)])
def test_it_is_torchvisions(shape, size, fraction):
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    expected = plain(Image.fromarray(pixels.numpy()), size, round(size / fraction))
    assert np.array_equal(center_crop(pixels, (size, size), fraction).numpy(), expected)


def test_an_image_of_the_size_is_left_alone():
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    assert torch.equal(center_crop(pixels, (32, 32), 1.0), pixels)


def test_oblong_views_hold_size_over_fraction():
    pixels = torch.randint(0, 256, (50, 90, 1), dtype=torch.uint8)
    assert center_crop(pixels, (16, 40)).shape == (16, 40, 1)
    assert center_crop(pixels, (40, 16)).shape == (40, 16, 1)


def test_all_of_a_set_in_order(folder):
    images = find_images(folder)
    found = list(center_crops(images, (16, 16), batch=10))
    assert [len(ids) for _, ids in found] == [10, 10, 4]
    assert torch.equal(torch.cat([ids for _, ids in found]), torch.arange(24))
    pixels = torch.cat([crops for crops, _ in found])
    [(some, ids)] = center_crops(images, (16, 16), ids=[5, 2, 23])
    assert ids.tolist() == [5, 2, 23] and torch.equal(some, pixels[[5, 2, 23]])
    for i in range(24):
        image = Image.open(BytesIO(images.read(i)))
        assert np.array_equal(pixels[i].numpy(), plain(image, 16, round(16 / 0.875)))


def test_a_bad_file_and_a_bad_fraction_are_named(folder):
    images = find_images(folder)
    images.path(7).write_bytes(b"no image")
    with pytest.raises(ValueError, match=images.names[7]):
        list(center_crops(images, (16, 16)))
    with pytest.raises(ValueError, match=r"fraction in \(0, 1\], got 1.5"):
        next(center_crops(images, (16, 16), fraction=1.5))
