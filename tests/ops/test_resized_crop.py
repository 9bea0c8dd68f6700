"""resized_crop: every back end against Pillow, to the last bit; then the op against PyTorch's checks."""

import math

import numpy as np
import pytest
import torch
from fastmim_kernels import native, resized_crop
from fastmim_kernels.resized_crop import SUPPORT, launch, resized_crop_reference, taps_reference
from PIL import Image

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
# image, box within it, flip: shrinks both ways; grows both; tall; wide; as large as wanted; one pixel; whole,
# and no multiple of anything
SAMPLES = [
    ((37, 50), (3, 5, 30, 40), False),
    ((5, 8), (0, 0, 5, 8), True),
    ((120, 33), (10, 1, 101, 31), True),
    ((30, 210), (0, 7, 29, 203), False),
    ((40, 40), (16, 22, 24, 18), False),
    ((9, 9), (8, 8, 1, 1), True),
    ((61, 47), (0, 0, 61, 47), False),
]


def make_inputs(channels, device="cpu"):
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (*s, channels), dtype=np.uint8)) for s, _, _ in SAMPLES]
    images[0][:20] = torch.where(torch.arange(50) % 2 == 0, 0, 255)[:, None].to(torch.uint8)  # overshoots
    boxes = torch.tensor([box for _, box, _ in SAMPLES])
    return [x.to(device) for x in images], boxes, torch.tensor([flip for _, _, flip in SAMPLES])


def pillow(image, box, flip, size, filter):
    """Rows, then columns: the order that one call to `resize` takes is Pillow's own affair."""
    top, left, height, width = box
    shape = image.shape[2]
    picture = Image.fromarray(image.cpu().numpy().squeeze(2) if shape == 1 else image.cpu().numpy())
    crop = picture.crop((left, top, left + width, top + height))
    crop = crop.resize((size[1], height), FILTERS[filter]).resize(size[::-1], FILTERS[filter])
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(crop)).reshape(*size, shape)


def of_pillow(images, boxes, flips, size, filter):
    samples = zip(images, boxes.tolist(), flips.tolist(), strict=True)
    return torch.stack([pillow(*sample, size, filter) for sample in samples])


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(24, 18), (7, 31), (1, 1)])
def test_every_back_end_is_pillow_to_the_last_bit(size, channels, filter, device):
    images, boxes, flips = make_inputs(channels)
    expected = of_pillow(images, boxes, flips, size, filter)
    assert torch.equal(resized_crop_reference(images, boxes, flips, *size, filter), expected)
    # interpreted, hundreds of taps take minutes: one size, and of Lanczos the boxes that shrink a little
    few = [0, 1, 4, 5, 6] if device == "cpu" and filter == "lanczos" else [*range(len(images))]
    if device == "cuda" or size == (24, 18):
        on_device = [images[b].to(device) for b in few]
        found = launch(on_device, boxes[few], flips[few], *size, SUPPORT[filter])
        assert torch.equal(found.cpu(), expected[few])
    if native.ready():
        found = torch.ops.fastmim.native_resized_crop(images, boxes, flips, *size, SUPPORT[filter])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("channels", [2, 4])
def test_back_ends_agree_on_other_channels(channels, device):
    images, boxes, flips = make_inputs(channels)
    expected = resized_crop_reference(images, boxes, flips, 16, 12, "bicubic")
    assert torch.equal(resized_crop(images, boxes, (16, 12), flips_B=flips), expected)
    few = 2 if device == "cpu" else len(images)  # the interpreter takes seconds for each
    found = launch([x.to(device) for x in images[:few]], boxes[:few], flips[:few], 16, 12, SUPPORT["bicubic"])
    assert torch.equal(found.cpu(), expected[:few])


@pytest.mark.parametrize("filter", FILTERS)
def test_a_large_image_and_a_real_size(filter):
    """Weights of 40 and more taps, and the size that training wants."""
    rng = np.random.default_rng(1)
    image = torch.from_numpy(rng.integers(0, 256, (2011, 1733, 3), dtype=np.uint8))
    box = torch.tensor([[11, 3, 1990, 1720]])
    expected = pillow(image, box[0].tolist(), False, (224, 224), filter)
    assert torch.equal(resized_crop([image], box, (224, 224), filter=filter)[0], expected)
    whole = Image.fromarray(image.numpy()).crop((3, 11, 1723, 2001)).resize((224, 224), FILTERS[filter])
    assert np.abs(np.asarray(whole, int) - expected.numpy()).max() <= 2  # whatever order Pillow takes


def test_lanczos_weights_are_those_of_the_mathematical_library():
    """Pillow's formula by `math.sin`, which our sine is not; every length to 130, and some beyond."""
    for m in (8, 112):
        for n in [*range(1, 131), 375, 500, 1999]:
            scale = n / m
            wide = max(scale, 1.0)
            taps, weights = taps_reference(n, m, "lanczos")
            for i in range(0, m, 1 + m // 16):
                center = (i + 0.5) * scale
                first, last = max(0, int(center - 3 * wide + 0.5)), min(n, int(center + 3 * wide + 0.5))
                at = [(t - center + 0.5) / wide for t in range(first, last)]
                exact = [sinc(x) * sinc(x / 3) for x in at]
                total = sum(exact)
                rounded = [round(w / total * 2**22) for w in exact]
                assert taps[i, : len(rounded)].tolist() == [*range(first, last)]
                assert weights[i, : len(rounded)].tolist() == rounded and not weights[i, len(rounded) :].any()


def sinc(x):
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


def test_weights_are_a_partition():
    for n, m in ((500, 224), (37, 224), (224, 224), (1, 5), (5, 1)):
        taps, weights = taps_reference(n, m, "bicubic")
        assert taps.min() >= 0 and taps.max() < n
        assert (weights.sum(1) - 2**22).abs().max() <= weights.shape[1]  # each rounded by at most one half
    assert torch.equal(taps_reference(9, 9, "bicubic")[1].max(1).values, torch.full((9,), 2**22))


def test_images_with_longer_rows(device):
    """As a crop of a larger image, or of a decoder's padded buffer, comes."""
    images, boxes, flips = make_inputs(3)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 5), value=99)[:, : x.shape[1]] for x in images]
    assert not padded[0].is_contiguous()
    expected = resized_crop_reference(images, boxes, flips, 8, 8, "bicubic")
    assert torch.equal(resized_crop(padded, boxes, (8, 8), flips_B=flips), expected)
    on_device = [torch.nn.functional.pad(x.to(device), (0, 0, 0, 5))[:, : x.shape[1]] for x in images[:2]]
    assert torch.equal(launch(on_device, boxes[:2], flips[:2], 8, 8, SUPPORT["bicubic"]).cpu(), expected[:2])


@pytest.mark.parametrize("filter", FILTERS)
def test_without_cpp_the_reference_serves(filter, monkeypatch):
    monkeypatch.setattr(native, "ready", lambda: False)
    images, boxes, flips = make_inputs(3)
    expected = of_pillow(images, boxes, flips, (6, 5), filter)
    assert torch.equal(resized_crop(images, boxes, (6, 5), flips_B=flips, filter=filter), expected)


def test_op_is_registered_right():
    images, boxes, flips = make_inputs(3)
    torch.library.opcheck(
        torch.ops.fastmim.resized_crop.default, (images[:2], boxes[:2], flips[:2], 4, 6, SUPPORT["lanczos"])
    )


def test_rejects_what_it_cannot_do():
    images, boxes, flips = make_inputs(3)
    with pytest.raises(ValueError, match="at least one image"):
        resized_crop([], boxes[:0], (8, 8))
    with pytest.raises(ValueError, match=r"want images uint8 .* at 1"):
        resized_crop([images[0], images[1].float()], boxes[:2], (8, 8))
    with pytest.raises(ValueError, match=r"want images uint8 \[H, W, 3\]"):
        resized_crop([images[0], images[1][..., :1]], boxes[:2], (8, 8))
    with pytest.raises(ValueError, match="pixels of a row contiguous"):
        resized_crop([images[0].transpose(0, 1)], boxes[:1], (8, 8))
    with pytest.raises(ValueError, match="a size of at least 1"):
        resized_crop(images, boxes, (0, 8))
    with pytest.raises(ValueError, match="want a filter"):
        resized_crop(images, boxes, (8, 8), filter="box")
    with pytest.raises(ValueError, match="want boxes torch.int64"):
        resized_crop(images, boxes.int(), (8, 8))
    with pytest.raises(ValueError, match="want flips torch.bool"):
        resized_crop(images, boxes, (8, 8), flips_B=flips.int())
    for bad in ((0, 0, 38, 50), (0, 0, 37, 51), (-1, 0, 3, 3), (0, -1, 3, 3), (0, 0, 0, 3), (37, 0, 1, 1)):
        with pytest.raises(ValueError, match="within their images"):
            resized_crop(images[:1], torch.tensor([bad]), (8, 8))
