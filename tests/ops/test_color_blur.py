"""color_blur: every back end against Pillow's GaussianBlur, to the last bit; then PyTorch's checks."""

import io
import tarfile
from importlib import import_module

import numpy as np
import pytest
import torch
from fastmim_kernels import color_blur, native
from fastmim_kernels.color_blur import boxes_of, color_blur_reference, launch
from PIL import Image, ImageFilter, ImageOps

from tests.conftest import SHARED_DATA

# none; hardly any; within one pixel; the recipes' range; the last with r = 0 and the first with r = 1; wide
SIGMAS = torch.tensor([0, 1e-3, 0.1, 0.7, 1.4142, 1.41422, 2.0, 6.5])


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def of_pillow(images, sigmas, solarize):
    out = []
    for image, sigma, inverted in zip(images, sigmas.tolist(), solarize, strict=True):
        bands = []
        for band in image.unbind(2):
            x = Image.fromarray(band.numpy()).filter(ImageFilter.GaussianBlur(sigma))
            bands.append(torch.from_numpy(np.array(ImageOps.solarize(x, 128) if inverted else x)))
        out.append(torch.stack(bands, 2))
    return torch.stack(out)


def fast(images, sigmas, solarize):
    if native.ready():
        return torch.ops.fastmim.native_color_blur(images, boxes_of(sigmas), solarize)
    return color_blur_reference(images, sigmas, solarize)


# several tiles each way; one pixel, one row and one column, all narrower than the widest box
@pytest.mark.parametrize("shape", [(13, 90, 3), (1, 1, 3), (1, 30, 1), (11, 1, 2), (9, 7, 4)])
def test_every_back_end_is_pillow_to_the_last_bit(shape, device):
    images = noise(8, *shape)
    images[:, :, ::2] = torch.where(images[:, :, ::2] > 99, 255, 0).to(torch.uint8)
    solarize = torch.arange(8) % 3 == 0
    expected = of_pillow(images, SIGMAS, solarize)
    assert torch.equal(color_blur_reference(images, SIGMAS, solarize), expected)
    assert torch.equal(launch(images.to(device), SIGMAS, solarize).cpu(), expected)
    assert torch.equal(fast(images, SIGMAS, solarize), expected)
    assert torch.equal(color_blur(images, SIGMAS, solarize_B=solarize), expected)


# where weights are simple fractions, as sixths for a sigma of 1, many sums lie half way: last bits decide
@pytest.mark.parametrize(
    ("sigmas", "size"),
    [
        (torch.linspace(0.1, 2, 401), (17, 30)),
        (torch.cat([torch.arange(0.125, 4, 0.125), torch.tensor([6.0, 10, 17.3, 30, 100])]), (70, 90)),
    ],
)
def test_sigmas_of_every_size(sigmas, size):
    image = noise(1, *size, 3, seed=1)
    image[:, 5:9] = 255
    images, no = image.expand(len(sigmas), -1, -1, -1), torch.zeros(len(sigmas), dtype=torch.bool)
    expected = of_pillow(images, sigmas, no)
    assert torch.equal(fast(images, sigmas, no), expected)
    assert torch.equal(color_blur_reference(images, sigmas, no), expected)


def test_the_box_keeps_what_it_blurs():
    r, inner, outer = boxes_of(SIGMAS).T
    assert r.tolist() == [-1, 0, 0, 0, 0, 1, 1, 6]
    total = (2 * r + 1) * inner + 2 * outer
    assert ((2**24 - total[1:]) // 2 == 0).all()  # one at most is lost to the cut
    flat = torch.full((8, 6, 6, 1), 173, dtype=torch.uint8)
    assert torch.equal(color_blur(flat, SIGMAS), flat)


def test_real_photographs():
    archive = SHARED_DATA / "imagenet-sample-100.tar"
    if not archive.exists():
        pytest.skip(f"needs {archive.name} in shared/data")
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member).read() for member in tar if member.isfile()]
    photographs = [Image.open(io.BytesIO(file)).convert("RGB") for file in files if file[:2] == b"\xff\xd8"]
    images = torch.stack([torch.from_numpy(np.array(x.resize((224, 224)))) for x in photographs])
    assert len(images) >= 100
    sigmas, solarize = torch.linspace(0.1, 2, len(images)), torch.arange(len(images)) % 2 == 0
    assert torch.equal(fast(images, sigmas, solarize), of_pillow(images, sigmas, solarize))


def test_strides(device):
    sigmas, solarize = SIGMAS[[0, 3, 6]], torch.tensor([True, False, True])
    for images in (
        noise(3, 3, 9, 20).permute(0, 2, 3, 1),
        noise(3, 9, 40, 3)[:, :, ::2],
        noise(1, 9, 20, 3).expand(3, -1, -1, -1),
    ):
        expected = of_pillow(images, sigmas, solarize)
        assert torch.equal(color_blur_reference(images, sigmas, solarize), expected)
        assert torch.equal(fast(images, sigmas, solarize), expected)
        found = launch(images.to(device), sigmas, solarize)
        assert torch.equal(found.cpu(), expected) and found.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 0, 4, 3), (2, 4, 0, 1)])
def test_nothing_in_nothing_out(shape, device):
    images, sigmas, no = torch.empty(shape, dtype=torch.uint8), torch.ones(shape[0]), torch.ones(shape[0]) > 2
    assert launch(images.to(device), sigmas, no).shape == shape
    assert color_blur(images, sigmas).shape == shape
    assert shape[0] == 0 or 0 in shape[1:]


def test_op_is_registered_right():
    no = torch.zeros(8, dtype=torch.bool)
    torch.library.opcheck(torch.ops.fastmim.color_blur.default, (noise(8, 4, 5, 3), SIGMAS, no))
    planes = noise(8, 3, 4, 5).permute(0, 2, 3, 1)
    torch.library.opcheck(torch.ops.fastmim.color_blur.default, (planes, SIGMAS, no))


def test_without_cpp_the_reference_serves(monkeypatch):
    module = import_module("fastmim_kernels.color_blur")
    monkeypatch.setattr(module.native, "ready", lambda: False)
    images = noise(8, 4, 5, 3)
    assert torch.equal(color_blur(images, SIGMAS), of_pillow(images, SIGMAS, [False] * 8))


def test_rejects_what_it_cannot_do():
    images = noise(8, 4, 5, 3)
    for bad in (images.float(), images[0], noise(8, 4, 5, 5), noise(8, 4, 5, 0)):
        with pytest.raises(ValueError, match="want images uint8"):
            color_blur(bad, SIGMAS)
    for bad in (SIGMAS[:3], SIGMAS.double(), SIGMAS.to("meta")):
        with pytest.raises(ValueError, match="want sigmas torch.float32"):
            color_blur(images, bad)
    with pytest.raises(ValueError, match="want solarize torch.bool"):
        color_blur(images, SIGMAS, solarize_B=torch.zeros(8))
    for value in (-0.1, 100.5, float("nan"), float("inf")):
        bad = SIGMAS.clone()
        bad[4] = value
        with pytest.raises(ValueError, match="want sigmas from 0 to 100"):
            color_blur(images, bad)
