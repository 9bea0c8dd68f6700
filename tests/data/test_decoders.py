"""Both decoders against Pillow written out plainly, and DALI against Pillow on ImageNet."""

import struct
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import find_images, why_no_dali
from fastmim.data.augment.crop import by_box, draw_boxes
from fastmim.data.augment.draws import Draws
from fastmim.data.decode.choose import make_decoder
from fastmim.data.decode.contract import Rejected, Request
from fastmim.data.decode.header import BadImage, image_size
from fastmim.views import Crop

from .conftest import encode

BOX = (3, 5, 30, 36)  # top, left, height, width


def decode(name, data, crops, box=BOX, flip=False, channels=3):
    """One request of equal boxes through a decoder of its own."""
    decoder = make_decoder(
        name, crops, batch=len(data), channels=channels, threads=2, depth=1, device=torch.device("cpu")
    )
    decoder.submit(Request(data, draws_of(crops, [box] * len(data), flip)))
    out = decoder.result()
    decoder.close()
    return out


def draws_of(crops, boxes, flip=False):
    """The same boxes for every crop, and no draws of windows and colors."""
    crops, boxes = {crop.box for crop in crops}, np.array(boxes, np.int32)
    flips = np.full(len(boxes), flip) if isinstance(flip, bool) else flip
    return Draws(dict.fromkeys(crops, boxes), dict.fromkeys(crops, flips), {}, {})


def plain(data, size, mode="RGB", box=BOX, resample=Image.Resampling.BICUBIC):
    top, left, height, width = box
    image = Image.open(BytesIO(data)).convert(mode).crop((left, top, left + width, top + height))
    # rows, then columns, as one call did before Pillow 13; that takes the cheaper order
    image = image.resize((size[1], height), resample).resize(size[::-1], resample)
    return torch.from_numpy(np.array(image)).reshape(*size, -1)


def assert_close(actual, expected, levels=0.5):
    """Mean absolute error in levels of 255: decoders differ in chroma and in gray."""
    assert actual.shape == expected.shape and actual.dtype == torch.uint8
    assert (actual.float() - expected.float()).abs().mean() <= levels


EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned by 90 degrees
INPUTS = {
    "jpeg": encode(0),
    "progressive": encode(0, progressive=True),
    "gray jpeg": encode(0, mode="L"),
    "cmyk jpeg": encode(0, mode="CMYK"),
    "turned by exif": encode(0, exif=EXIF),
    "png": encode(0, fmt="PNG"),
    "rgba png": encode(0, fmt="PNG", mode="RGBA"),
    "palette png": encode(0, fmt="PNG", mode="P"),
    "png called jpeg": encode(0, fmt="PNG"),
    "webp": encode(0, fmt="WEBP"),
    "bmp": encode(0, fmt="BMP"),
    "tiff": encode(0, fmt="TIFF"),
    "ppm": encode(0, fmt="PPM"),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_kind_of_file_in_color_and_gray(kind, decoder):
    data = INPUTS[kind]
    assert image_size(data) == (40, 48)
    for channels, mode in [(3, "RGB"), (1, "L")]:
        [crop] = decode(decoder, [data], [Crop(size=(24, 20))], channels=channels)
        # gray of a color image: libjpeg takes Y as stored, Pillow computes it from rounded RGB
        assert_close(crop[0], plain(data, (24, 20), mode), levels=0.8 if channels == 1 else 0.5)


def test_16_bit_gray_is_scaled(decoder):
    gray = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(np.uint16)
    file = BytesIO()
    Image.fromarray(gray).save(file, "PNG")
    [crop] = decode(decoder, [file.getvalue()], [Crop(size=(40, 48))], box=(0, 0, 40, 48), channels=1)
    assert_close(crop[0, :, :, 0], torch.from_numpy(np.rint(gray / 257).astype(np.uint8)), levels=0.6)


def test_flip_and_interpolation_and_views_of_one_crop(decoder):
    data = [encode(1), encode(2)]
    crops = [Crop(size=(24, 20)), Crop(size=(12, 30), interpolation="bilinear")]
    straight = decode(decoder, data, crops)
    flipped = decode(decoder, data, crops, flip=True)
    for slot in (0, 1):
        assert_close(straight[0][slot], plain(data[slot], (24, 20)))
        assert_close(straight[1][slot], plain(data[slot], (12, 30), resample=Image.Resampling.BILINEAR))
    for one, other in zip(straight, flipped, strict=True):
        assert torch.equal(one.flip(2), other) and not torch.equal(one, other)


def test_many_crops_are_cut_like_one(decoder):
    data = [encode(3), encode(4, size=(60, 50))]
    several = decode(decoder, data, [Crop(size=(24, 20), box=c) for c in range(3)] + [Crop(size=(20, 18))])
    [one] = decode(decoder, data, [Crop(size=(24, 20))])
    for crop in several[:3]:
        assert torch.equal(crop, one)
    assert_close(several[3][1], plain(data[1], (20, 18)))


def test_enlarging_and_tiny_images(decoder):
    data = encode(5, size=(1, 1), fmt="PNG")
    [crop] = decode(decoder, [data], [Crop(size=(16, 12))], box=(0, 0, 1, 1))
    assert_close(crop[0], plain(data, (16, 12), box=(0, 0, 1, 1)))
    data = encode(6, size=(7, 5), fmt="PNG")
    [crop] = decode(decoder, [data], [Crop(size=(32, 33))], box=(1, 1, 3, 4))
    assert torch.equal(crop[0], plain(data, (32, 33), box=(1, 1, 3, 4)))


def test_results_come_in_order_and_stay(decoder):
    crops = [Crop(size=(16, 16))]
    busy = make_decoder(decoder, crops, batch=2, channels=3, threads=2, depth=3, device=torch.device("cpu"))
    draws = draws_of(crops, [BOX, BOX])
    requests = [Request([encode(i), encode(i + 50)], draws) for i in range(12)]
    results = []
    for i, request in enumerate(requests):
        busy.submit(request)
        if i >= 2:
            results.append(busy.result()[0])
    busy.close()
    for request, result in zip(requests, results, strict=False):
        for slot in (0, 1):
            assert_close(result[slot], plain(request.data[slot], (16, 16)))


def test_a_rejected_request_names_its_slots_and_leaves_the_decoder_usable(decoder):
    crops, good = [Crop(size=(16, 16))], encode(0)
    bad = good[: good.index(b"\xff\xdb") + 5] + b"\x00" * 40 + b"\xff\xd9"
    busy = make_decoder(decoder, crops, batch=4, channels=3, threads=2, depth=2, device=torch.device("cpu"))
    draws = draws_of(crops, [BOX] * 4)
    slots = set()
    for data in ([good, bad, good, bad], [good, good, good, bad], [good] * 4):
        busy.submit(Request(data, draws))
        busy.submit(Request([good] * 4, draws))
        if bad not in data:
            break
        with pytest.raises(Rejected) as rejected:
            busy.result()
        assert all(data[slot] is bad and len(reason) > 10 for slot, reason in rejected.value.slots.items())
        slots |= rejected.value.slots.keys()
    assert 3 in slots and slots <= {1, 3}
    assert_close(busy.result()[0][1], plain(good, (16, 16)))
    busy.close()


def test_parity_on_imagenet(imagenet):
    """224 pixels, boxes and flips as in training: DALI, Pillow's decoder and Pillow alone give the same."""
    pytest.importorskip("nvidia.dali")
    images = find_images(imagenet)
    crop, data = Crop(size=(224, 224)), [images.read(i) for i in range(len(images))]
    seeds_B = torch.arange(len(images)) * 2**40 + 12345
    boxes, flips = draw_boxes(seeds_B, np.array([image_size(x) for x in data]), crop)
    results = []
    for name in ("dali", "pillow"):
        decoder = make_decoder(
            name, [crop], batch=len(data), channels=3, threads=2, depth=1, device=torch.device("cpu")
        )
        decoder.submit(Request(data, draws_of([crop], boxes, flips)))
        results.append(decoder.result()[0].float())
        decoder.close()
    all_pillow = torch.stack(
        [
            (plain(x, crop.size, box=box).flip(1) if flip else plain(x, crop.size, box=box)).float()
            for x, box, flip in zip(data, boxes.tolist(), flips.tolist(), strict=True)
        ]
    )
    for name, other in (("Pillow's decoder", results[1]), ("Pillow", all_pillow)):
        error = (results[0] - other).abs()
        print(f"DALI and {name}: mean {error.mean():.5f}, worst {error.max():.0f} of 255")
        assert (
            error.mean() < 0.01
        )  # 0 was measured: both decode with libjpeg-turbo, which a release may change


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\0" * 3000, "no header"),
        (b"not an image, but text", "starts with b'not an i'"),
        (encode(0, fmt="GIF"), "GIF format is not decoded; JPEG, PNG"),
        (encode(0)[:-300], "end marker"),
        # a thumbnail has an end of its own
        (
            encode(0)[:2] + b"\xff\xe1\x04\x02" + encode(1)[:1022] + b"\xff\xd9" + encode(0)[2:-2],
            "end marker",
        ),
        (encode(0, fmt="PNG")[:20], "header|no header"),
    ],
)
def test_headers_that_are_refused(data, message):
    with pytest.raises(BadImage, match=message):
        image_size(data)


def test_bytes_after_the_end_are_borne(decoder):
    data = encode(0) + b"trailing \xff\xff rubbish" * 20
    assert image_size(data) == (40, 48)
    assert_close(decode(decoder, [data], [Crop(size=(24, 20))])[0][0], plain(data, (24, 20)))


def test_refuses_channels_and_says_what_a_missing_dali_needs(monkeypatch):
    pytest.importorskip("nvidia.dali")
    assert why_no_dali() is None
    settings = {"batch": 1, "threads": 1, "depth": 1, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match="give 1 .gray. or 3 .RGB., got 4"):
        make_decoder("pillow", [Crop(size=(8, 8))], channels=4, **settings)
    monkeypatch.delitem(sys.modules, "fastmim.data.decode.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert "nvidia-dali" in why_no_dali()
    with pytest.raises(ValueError, match="nvidia-dali.*--data.decoder pillow"):
        make_decoder("dali", [Crop(size=(8, 8))], channels=3, **settings)


def test_crops_share_decoding_by_number():
    assert list(by_box([Crop(size=(8, 8), box=2), Crop(size=(4, 4), box=2), Crop(size=(4, 4))])) == [2, 0]


def test_a_bad_file_among_suspects_does_not_make_the_others_bad():
    """Where DALI names no slot, each is decoded alone: behind one that fails a new pipeline is needed."""
    dali = pytest.importorskip("fastmim.data.decode.dali")
    crops, good = [Crop(size=(16, 16))], encode(0)
    bad = good[: good.index(b"\xff\xdb") + 5] + b"\x00" * 40 + b"\xff\xd9"
    busy = make_decoder("dali", crops, batch=4, channels=3, threads=1, depth=1, device=torch.device("cpu"))
    assert isinstance(busy, dali.DaliDecoder)
    request = Request([good, bad, good, bad], draws_of(crops, [BOX] * 4))
    assert busy._refused_of(request, range(4)) == [1, 3]
    assert busy._find_refused(request, "an error that names no slot", []) == [1, 3]
    busy.close()


@pytest.mark.parametrize("boxes", [1, 2])
def test_the_load_of_the_jpeg_decoder_reaches_dali_on_a_gpu_only(boxes, monkeypatch):
    """In the graph as DALI serializes it; a graph for a GPU can be made without one, but not built."""
    dali = pytest.importorskip("fastmim.data.decode.dali")
    pipeline = dali.Pipeline
    monkeypatch.setattr(dali, "Pipeline", lambda **options: pipeline(**options | {"device_id": None}))
    crops = [Crop(size=(8, 8), box=box) for box in range(boxes)]
    graphs = {
        device: dali.make_pipeline(
            crops,
            batch=2,
            channels=3,
            threads=1,
            depth=1,
            device=torch.device(device),
            hw_decoder_load=0.3125,
        ).serialize()
        for device in ("cpu", "cuda:0")
    }
    name = b"hw_decoder_load"
    assert name not in graphs["cpu"]
    start = graphs["cuda:0"].index(name)
    assert struct.pack("<f", 0.3125) in graphs["cuda:0"][start : start + 40]


def test_the_load_of_the_configuration_reaches_the_decoder(folder, open_loader, monkeypatch):
    dali = pytest.importorskip("fastmim.data.decode.dali")
    loads, real = [], dali.make_pipeline
    monkeypatch.setattr(
        dali,
        "make_pipeline",
        lambda *a, **options: loads.append(options["hw_decoder_load"]) or real(*a, **options),
    )
    open_loader(find_images(folder), "dali")
    assert loads == [0.65]
    open_loader(find_images(folder), "dali", hw_decoder_load=0.25)
    assert loads[1:] == [0.25]
