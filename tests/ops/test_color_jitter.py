"""color_jitter: every back end against Pillow and torchvision, to the last bit; then PyTorch's checks."""

import io
import itertools
import tarfile
from importlib import import_module

import numpy as np
import pytest
import torch
from fastmim_kernels import color_jitter, native
from fastmim_kernels.color_jitter import color_jitter_reference, hue_reference, launch
from PIL import Image, ImageEnhance, ImageOps

from tests.conftest import SHARED_DATA

ORDERS = torch.tensor(list(itertools.permutations(range(4))))
ENHANCE = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color


def picture(image):
    return Image.fromarray(image.squeeze(2).numpy() if image.shape[2] == 1 else image.numpy())


def shift_hue(image, hue):
    """As torchvision does it: the byte, without what is behind the point of 255 hue, wraps around."""
    if image.mode == "L":
        return image
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray(np.asarray(h) + np.int32(hue * 255).astype(np.uint8))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def of_pillow(images, order, factors, gray, solarize):
    out = []
    for image, stages, strengths, is_gray, inverted in zip(
        images, order.tolist(), factors.tolist(), gray, solarize, strict=True
    ):
        x = picture(image)
        for stage in stages:
            if stage == 3:
                x = shift_hue(x, strengths[3])
            elif stage >= 0:
                x = ENHANCE[stage](x).enhance(strengths[stage])
        x = x.convert("L").convert(x.mode) if is_gray else x
        x = ImageOps.solarize(x, 128) if inverted else x
        out.append(torch.from_numpy(np.array(x)).reshape(image.shape))
    return torch.stack(out)


def draws(count, seed=0, strength=(0.9, 0.9, 0.9, 0.5)):
    g = torch.Generator().manual_seed(seed)
    strength = torch.tensor(strength)
    factors = (2 * torch.rand(count, 4, generator=g) - 1) * strength + torch.tensor([1, 1, 1, 0])
    order = ORDERS[torch.arange(count) % 24]
    return order, factors, torch.arange(count) % 5 == 3, torch.arange(count) % 3 == 1


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def fast(images, *rest):
    """The op as the CPU runs it where it can."""
    return (torch.ops.fastmim.native_color_jitter if native.ready() else color_jitter_reference)(
        images, *rest
    )


# a whole tile and a part; one pixel; no multiple of anything
@pytest.mark.parametrize("height_width", [(33, 47), (1, 1), (5, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_back_end_is_pillow_to_the_last_bit(channels, height_width, device):
    images = noise(24, *height_width, channels)
    images[:12] = images[:12] // 4 + 60  # without clipping everywhere
    inputs = draws(24)
    expected = of_pillow(images, *inputs)
    assert torch.equal(color_jitter_reference(images, *inputs), expected)
    assert torch.equal(launch(images.to(device), *inputs).cpu(), expected)
    assert torch.equal(fast(images, *inputs), expected)
    order, factors, gray, solarize = inputs
    assert torch.equal(color_jitter(images, order, factors, gray_B=gray, solarize_B=solarize), expected)


@pytest.mark.parametrize("stage", range(4))
def test_each_stage_alone_and_none(stage, device):
    images = noise(4, 9, 11, 3, seed=stage)
    _, factors, _, _ = draws(4, seed=stage)
    order = torch.full((4, 4), -1)
    order[torch.arange(3), torch.arange(3)] = stage  # the last has none
    no = torch.zeros(4, dtype=torch.bool)
    expected = of_pillow(images, order, factors, no, no)
    assert torch.equal(expected[3], images[3]) and not torch.equal(expected[:3], images[:3])
    assert torch.equal(color_jitter_reference(images, order, factors, no, no), expected)
    assert torch.equal(launch(images.to(device), order, factors, no, no).cpu(), expected)
    assert torch.equal(color_jitter(images, order, factors), expected)


def test_torchvision_color_jitter_itself(torchvision_loads, monkeypatch):
    transforms = pytest.importorskip("torchvision.transforms")
    images, (order, factors, no, _) = noise(24, 19, 21, 3), draws(24)
    no = torch.zeros_like(no)
    found = color_jitter(images, order, factors)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    for b in range(24):
        monkeypatch.setattr(jitter, "get_params", lambda *_, b=b: (order[b], *factors[b].tolist()))
        assert np.array_equal(np.asarray(jitter(picture(images[b]))), found[b].numpy())


def test_all_16_million_colors_keep_pillows_hue():
    step = 32
    reds = torch.arange(256, dtype=torch.uint8)
    rest = torch.cartesian_prod(reds, reds).expand(step, -1, 2)
    order, factors = torch.tensor([[3, -1, -1, -1]]), torch.zeros(1, 4)
    no = torch.zeros(1, dtype=torch.bool)
    for start, shift in zip(range(0, 256, step), (0, 0.4, -0.5, 0.1, -0.01, 0.004, 0.5, -0.2), strict=True):
        red = reds[start : start + step, None, None].expand(-1, 256 * 256, 1)
        image = torch.cat([red, rest], 2).contiguous()
        hsv = torch.from_numpy(np.array(picture(image).convert("HSV")))
        for hue in (0.0, shift):
            factors[:, 3] = hue
            expected = np.asarray(shift_hue(picture(image), factors[0, 3].item()))
            assert np.array_equal(fast(image[None], order, factors, no, no)[0].numpy(), expected)
        if start in (0, 224):  # all chromas; the floats are slow
            assert torch.equal(hue_reference(image.int()), hsv[..., 0].int())


def test_kernels_and_floats_agree_where_a_hue_is_a_whole_byte(device):
    """The colors for which the quotient leaves nothing: rounding alone says which byte it is."""
    colors = []
    for chroma in (5, 17, 51, 85, 170, 255):
        for middle in range(chroma + 1):
            colors += list(itertools.permutations((0, middle, chroma)))
    image = torch.tensor(colors, dtype=torch.uint8)[None, None]
    order, factors = torch.tensor([[3, -1, -1, -1]]), torch.zeros(1, 4)
    no = torch.zeros(1, dtype=torch.bool)
    expected = of_pillow(image, order, factors, no, no)
    assert torch.equal(color_jitter_reference(image, order, factors, no, no), expected)
    assert torch.equal(launch(image.to(device), order, factors, no, no).cpu(), expected)
    assert torch.equal(fast(image, order, factors, no, no), expected)


def test_blends_of_all_levels_with_many_factors():
    levels = torch.arange(256, dtype=torch.uint8)
    image = torch.stack([levels, levels.flip(0), levels.roll(85)], 1).view(1, 16, 16, 3)
    g = torch.Generator().manual_seed(0)
    factors = torch.rand(600, 4, generator=g) * torch.tensor([2, 3, 2, 0])
    factors[:6, :3] = torch.tensor([0, 1, 0.5, 1 / 3, 2, 0.6])[:, None]
    order = torch.full((600, 4), -1)
    order[:, 2] = torch.arange(600) % 3
    no = torch.zeros(600, dtype=torch.bool)
    images = image.expand(600, -1, -1, -1)
    expected = of_pillow(images, order, factors, no, no)
    assert torch.equal(fast(images, order, factors, no, no), expected)
    assert torch.equal(color_jitter_reference(images, order, factors, no, no), expected)


def test_the_mean_of_contrast_is_rounded_half_up(device):
    images = torch.tensor([[3, 4, 3, 4], [3, 4, 3, 3], [200, 255, 201, 254], [0, 0, 0, 1]], dtype=torch.uint8)
    images = images.view(4, 2, 2, 1).expand(-1, -1, -1, 3)
    order, factors = torch.tensor([[1, -1, -1, -1]] * 4), torch.zeros(4, 4)
    no = torch.zeros(4, dtype=torch.bool)
    expected = of_pillow(images, order, factors, no, no)
    assert expected[:, 0, 0, 0].tolist() == [4, 3, 228, 0]
    assert torch.equal(color_jitter_reference(images, order, factors, no, no), expected)
    assert torch.equal(fast(images, order, factors, no, no), expected)
    assert torch.equal(launch(images.to(device), order, factors, no, no).cpu(), expected)


def test_contrast_of_many_tiles(device):
    """More tiles than are summed at a time, of which the last is white."""
    images = torch.zeros(1, 257, 256, 1, dtype=torch.uint8)
    images[:, 256:] = 255
    order, factors = torch.tensor([[1, -1, -1, -1]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    no = torch.zeros(1, dtype=torch.bool)
    expected = of_pillow(images, order, factors, no, no)
    assert expected.unique().tolist() == [1]
    assert torch.equal(launch(images.to(device), order, factors, no, no).cpu(), expected)
    assert torch.equal(fast(images, order, factors, no, no), expected)


def test_real_photographs():
    archive = SHARED_DATA / "imagenet-sample-100.tar"
    if not archive.exists():
        pytest.skip(f"needs {archive.name} in shared/data")
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member).read() for member in tar if member.isfile()]
    photographs = [Image.open(io.BytesIO(file)).convert("RGB") for file in files if file[:2] == b"\xff\xd8"]
    images = torch.stack([torch.from_numpy(np.array(x.resize((224, 224)))) for x in photographs])
    assert len(images) >= 100
    inputs = draws(len(images), strength=(0.4, 0.4, 0.4, 0.1))
    expected = of_pillow(images, *inputs)
    assert torch.equal(fast(images, *inputs), expected)
    assert torch.equal(color_jitter_reference(images[:24], *(x[:24] for x in inputs)), expected[:24])


@pytest.mark.parametrize("channels", [1, 3])
def test_strides(channels, device):
    inputs = draws(4)
    planes = noise(4, channels, 9, 20).permute(0, 2, 3, 1)
    for images in (
        planes,
        noise(4, 9, 40, channels)[:, :, ::2],
        noise(1, 9, 20, channels).expand(4, -1, -1, -1),
    ):
        expected = color_jitter_reference(images.contiguous(), *inputs)
        assert torch.equal(color_jitter_reference(images, *inputs), expected)
        assert torch.equal(fast(images, *inputs), expected)
        found = launch(images.to(device), *inputs)
        assert torch.equal(found.cpu(), expected) and found.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 0, 4, 3), (2, 4, 0, 1)])
def test_nothing_in_nothing_out(shape, device):
    images, inputs = torch.empty(shape, dtype=torch.uint8), draws(shape[0])
    assert launch(images.to(device), *inputs).shape == shape
    order, factors, gray, solarize = inputs
    assert color_jitter(images, order, factors, gray_B=gray, solarize_B=solarize).shape == shape
    assert color_jitter_reference(images, *inputs).shape == shape


def test_op_is_registered_right():
    torch.library.opcheck(torch.ops.fastmim.color_jitter.default, (noise(3, 4, 5, 3), *draws(3)))
    planes = noise(3, 3, 4, 5).permute(0, 2, 3, 1)
    torch.library.opcheck(torch.ops.fastmim.color_jitter.default, (planes, *draws(3)))


def test_without_cpp_the_reference_serves(monkeypatch):
    module = import_module("fastmim_kernels.color_jitter")
    monkeypatch.setattr(module.native, "ready", lambda: False)
    images, inputs = noise(3, 4, 5, 3), draws(3)
    order, factors, gray, solarize = inputs
    found = color_jitter(images, order, factors, gray_B=gray, solarize_B=solarize)
    assert torch.equal(found, of_pillow(images, *inputs))


def test_rejects_what_it_cannot_do():
    images, (order, factors, gray, solarize) = noise(3, 4, 5, 3), draws(3)
    for bad in (images.float(), images[0], noise(3, 4, 5, 2), noise(3, 4, 5, 4)):
        with pytest.raises(ValueError, match="want images uint8"):
            color_jitter(bad, order, factors)
    with pytest.raises(ValueError, match="at most 67108864 pixels an image, got 8193 x 8192"):
        color_jitter(torch.empty(1, 1, 1, 3, dtype=torch.uint8).expand(1, 8193, 8192, 3), order, factors)
    for bad in (order[:2], order.int(), order[:, :3]):
        with pytest.raises(ValueError, match="want order torch.int64"):
            color_jitter(images, bad, factors)
    with pytest.raises(ValueError, match="want factors torch.float32"):
        color_jitter(images, order, factors.double())
    with pytest.raises(ValueError, match="want gray torch.bool"):
        color_jitter(images, order, factors, gray_B=gray.int())
    with pytest.raises(ValueError, match=r"want solarize torch.bool .* on the CPU"):
        color_jitter(images, order, factors, solarize_B=solarize.to("meta"))
    for bad in ([0, 1, 2, 4], [0, 1, 1, -1], [-2, 0, 1, 2], [3, -1, -1, 3]):
        with pytest.raises(ValueError, match="want an order of 0 to 3"):
            color_jitter(images, torch.tensor([[0, 1, 2, 3], [-1] * 4, bad]), factors)
    for stage, value in (
        (0, -0.1),
        (1, float("inf")),
        (2, float("nan")),
        (3, 0.51),
        (3, -0.51),
        (3, float("nan")),
    ):
        bad = factors.clone()
        bad[1, stage] = value
        with pytest.raises(ValueError, match="want factors of at least 0"):
            color_jitter(images, order, bad)
