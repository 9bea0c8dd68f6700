"""What a pixel means: formats and depths by every path to pixels, against values put there by hand."""

import json
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import MemoryImages
from fastmim.data.augment.draws import Draws
from fastmim.data.decode.choose import make_decoder
from fastmim.data.decode.contract import Request
from fastmim.data.decode.header import BadImage, image_size
from fastmim.data.decode.pixels import decode, for_dali
from fastmim.data.feed.center import center_crops
from fastmim.data.feed.verify import verify
from fastmim.data.sources.pack import PackConfig, pack_images
from fastmim.data.sources.source import find_images
from fastmim.data.sources.stats import stats
from fastmim.views import Crop

from . import encoders
from .conftest import encode, take

CPU = torch.device("cpu")
H, W = 12, 20


def ramp(maxval: int, bands: int, seed: int = 0) -> np.ndarray:
    """Whole numbers 0..maxval, both ends among them, `[H, W, bands]`."""
    values = np.random.default_rng(seed).integers(0, maxval + 1, (H, W, bands))
    values[0, 0], values[-1, -1] = 0, maxval
    return values


def levels(values: np.ndarray, maxval: int) -> np.ndarray:
    """The rule, in rational numbers: nearest, halves up. Gray in three channels."""
    colors = np.floor(values.astype(np.float64) * 255 / maxval + 0.5).astype(np.uint8)
    return np.repeat(colors, 3, axis=2) if colors.shape[2] == 1 else colors


def jp2(values: np.ndarray, bits: int, signed: bool = False) -> bytes:
    """Lossless, by OpenJPEG at 8 or 16 bits; then its header says fewer bits, or signed ones.

    The codestream of a lossless file holds samples minus half of their range: with another precision said,
    the same coefficients are other samples.
    """
    container = 8 if bits <= 8 else 16
    shift = (1 << (container - 1)) - (1 << (bits - 1))  # halves of both ranges lie at the same coefficient
    image = values[:, :, 0] + shift if values.shape[2] == 1 else values + shift
    file = BytesIO()
    Image.fromarray(image.astype(np.uint8 if container == 8 else np.uint16)).save(
        file, "JPEG2000", no_jp2=True, irreversible=False, mct=0
    )
    data = bytearray(file.getvalue())
    for band in range(values.shape[2]):
        data[42 + 3 * band] = bits - 1 | (0x80 if signed else 0)
    return bytes(data)


def of_alpha(values: np.ndarray, maxval: int) -> np.ndarray:
    """Premultiplied colors divided by their alpha."""
    colors, alpha = values[:, :, :-1] / np.maximum(values[:, :, -1:], 1), values[:, :, -1:]
    straight = np.minimum(np.floor(colors * maxval + 0.5), maxval) * (alpha > 0)
    return levels(straight, maxval)


def premultiplied(maxval: int, bands: int) -> np.ndarray:
    values = ramp(maxval, bands)
    values[:, :, :-1] = values[:, :, :-1] * values[:, :, -1:] // maxval
    return values


PALETTE = np.random.default_rng(1).integers(0, 256, (16, 3))
INK = ramp(1, 1)[:, :, 0]
G1, G2, G4, G8, G12, G16 = (ramp(2**bits - 1, 1) for bits in (1, 2, 4, 8, 12, 16))
RGB8, RGB16, RGBA8, RGBA16 = ramp(255, 3), ramp(65535, 3), ramp(255, 4), ramp(65535, 4)
GA8, GA16, P4 = ramp(255, 2), ramp(65535, 2), ramp(15, 1)
PRE8, PRE16, PRE_GRAY = premultiplied(255, 4), premultiplied(65535, 4), premultiplied(255, 2)
CMYK8 = ramp(255, 4)
BITS_565 = np.concatenate([ramp(31, 1), ramp(63, 1, 1), ramp(31, 1, 2)], 2)
CMYK_RGB = np.floor((255 - CMYK8[:, :, :3]) * (255 - CMYK8[:, :, 3:]) / 255 + 0.5).astype(np.uint8)
PLTE = encoders.chunk(b"PLTE", PALETTE.astype(np.uint8).tobytes())
CLEAR = encoders.chunk(b"tRNS", b"\0\0")
TRNS = encoders.chunk(b"tRNS", bytes(range(16)))
MAP16 = {320: tuple((PALETTE.T * 257).ravel().tolist())}

# name -> bytes, what they show as uint8 [H, W, 3]
TABLE = {
    "PBM": (encoders.pbm(INK), levels(1 - INK[:, :, None], 1)),
    "PBM, text": (encoders.pbm(INK, text=True), levels(1 - INK[:, :, None], 1)),
    "PGM 255": (encoders.netpbm(G8, 255), levels(G8, 255)),
    "PPM 255, text": (encoders.netpbm(RGB8, 255, text=True), RGB8),
    "PPM 65535": (encoders.netpbm(RGB16, 65535), levels(RGB16, 65535)),
    "PAM, RGB and alpha": (encoders.pam(RGBA8, 255, "RGB_ALPHA"), RGBA8[:, :, :3]),
    "PAM, gray and alpha": (encoders.pam(GA16, 65535, "GRAYSCALE_ALPHA"), levels(GA16[:, :, :1], 65535)),
    "PAM, bilevel": (encoders.pam(G1, 1, "BLACKANDWHITE"), levels(G1, 1)),
    "PNG, gray 1": (encoders.png(G1, 1, 0), levels(G1, 1)),
    "PNG, gray 2": (encoders.png(G2, 2, 0), levels(G2, 3)),
    "PNG, gray 4": (encoders.png(G4, 4, 0), levels(G4, 15)),
    "PNG, gray 8": (encoders.png(G8, 8, 0), levels(G8, 255)),
    "PNG, gray 16": (encoders.png(G16, 16, 0), levels(G16, 65535)),
    "PNG, RGB 8": (encoders.png(RGB8, 8, 2), RGB8),
    "PNG, RGB 16": (encoders.png(RGB16, 16, 2), levels(RGB16, 65535)),
    "PNG, palette": (encoders.png(P4, 4, 3, before=PLTE), PALETTE[P4[:, :, 0]]),
    "PNG, palette, transparent": (encoders.png(P4, 4, 3, before=PLTE + TRNS), PALETTE[P4[:, :, 0]]),
    "PNG, transparent black": (encoders.png(G8, 8, 0, before=CLEAR), levels(G8, 255)),
    "PNG, gray and alpha 8": (encoders.png(GA8, 8, 4), levels(GA8[:, :, :1], 255)),
    "PNG, gray and alpha 16": (encoders.png(GA16, 16, 4), levels(GA16[:, :, :1], 65535)),
    "PNG, RGB and alpha 8": (encoders.png(RGBA8, 8, 6), RGBA8[:, :, :3]),
    "PNG, RGB and alpha 16": (encoders.png(RGBA16, 16, 6), levels(RGBA16[:, :, :3], 65535)),
    "TIFF, RGB 8": (encoders.tiff(RGB8, 8, 2), RGB8),
    "TIFF, three pages": (encoders.tiff(RGB8, 8, 2, pages=3), RGB8),
    "TIFF, RGB and straight alpha": (encoders.tiff(RGBA8, 8, 2, extra=(2,)), RGBA8[:, :, :3]),
    "TIFF, RGB and something": (encoders.tiff(RGBA8, 8, 2, extra=(0,)), RGBA8[:, :, :3]),
    "TIFF, premultiplied": (encoders.tiff(PRE8, 8, 2, extra=(1,)), of_alpha(PRE8, 255)),
    "TIFF, premultiplied 16": (encoders.tiff(PRE16, 16, 2, extra=(1,)), of_alpha(PRE16, 65535)),
    "TIFF, premultiplied gray": (encoders.tiff(PRE_GRAY, 8, 1, extra=(1,)), of_alpha(PRE_GRAY, 255)),
    "TIFF, CMYK": (encoders.tiff(CMYK8, 8, 5), CMYK_RGB),
    "TIFF, palette": (encoders.tiff(P4, 4, 3, tags=MAP16), PALETTE[P4[:, :, 0]]),
    "BMP 24": (encoders.bmp(RGB8, 24), RGB8),
    "BMP, downwards": (encoders.bmp(RGB8, 24, downwards=True), RGB8),
    "BMP 16, 5-5-5": (encoders.bmp(ramp(31, 3), 16, (0x7C00, 0x3E0, 0x1F)), levels(ramp(31, 3), 31)),
    "BMP 32, odd masks": (encoders.bmp(RGB8, 32, (0xFF, 0xFF00, 0xFF000000)), RGB8),
    "JPEG 2000, 8": (jp2(RGB8, 8), RGB8),
}  # fmt: skip
TABLE["BMP 16, 5-6-5"] = (
    encoders.bmp(BITS_565, 16, (0xF800, 0x7E0, 0x1F)),
    np.stack([levels(BITS_565[:, :, i : i + 1], m)[:, :, 0] for i, m in enumerate((31, 63, 31))], 2),
)
for maxval in (1, 2, 100, 127, 254, 256, 1000, 1023, 4095, 32767):
    TABLE[f"PGM {maxval}"] = encoders.netpbm(ramp(maxval, 1), maxval), levels(ramp(maxval, 1), maxval)
TABLE["PPM 1023, text"] = encoders.netpbm(ramp(1023, 3), 1023, text=True), levels(ramp(1023, 3), 1023)
TABLE["PPM 100"] = encoders.netpbm(ramp(100, 3), 100), levels(ramp(100, 3), 100)
for bits in (1, 2, 4, 8, 12, 16):
    gray, top = ramp(2**bits - 1, 1), 2**bits - 1
    for order in "<>":
        end = "little" if order == "<" else "big"
        TABLE[f"TIFF, gray {bits}, {end}"] = encoders.tiff(gray, bits, 1, order=order), levels(gray, top)
        TABLE[f"TIFF, white is zero {bits}, {end}"] = (
            encoders.tiff(gray, bits, 0, order=order),
            levels(top - gray, top),
        )
for bits, bands in ((8, 1), (8, 3), (16, 1), (16, 3)):
    top = 2**bits - 1
    stored = ramp(top, bands) - 2 ** (bits - 1)
    for order in "<>":
        TABLE[f"TIFF, signed {bits}, {bands} bands, {order}"] = (
            encoders.tiff(stored, bits, 1 if bands == 1 else 2, order=order, signed=True),
            levels(stored + 2 ** (bits - 1), top),
        )
for order in "<>":
    for compressed in (False, True):
        name = f"{order}{', deflated' * compressed}"
        options = {"order": order, "compressed": compressed}
        TABLE[f"TIFF, RGB 16, {name}"] = encoders.tiff(RGB16, 16, 2, **options), levels(RGB16, 65535)
        TABLE[f"TIFF, RGBA 16, {name}"] = (
            encoders.tiff(RGBA16, 16, 2, extra=(2,), **options),
            levels(RGBA16[:, :, :3], 65535),
        )
        TABLE[f"TIFF, gray 16, {name}"] = encoders.tiff(G16, 16, 1, **options), levels(G16, 65535)
for orientation in range(1, 9):
    tags = {274: (orientation,)}
    TABLE[f"TIFF, orientation {orientation}"] = encoders.tiff(RGB8, 8, 2, tags=tags), RGB8
    TABLE[f"TIFF, orientation {orientation}, deflated"] = (
        encoders.tiff(RGB8, 8, 2, compressed=True, tags=tags, order=">"),
        RGB8,
    )
for bits in (1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 14, 16):
    for signed in (False, True):
        gray = ramp(2**bits - 1, 1)
        TABLE[f"JPEG 2000, gray {bits}{', signed' * signed}"] = (
            jp2(gray, bits, signed),
            levels(gray, 2**bits - 1),
        )
for bits in (3, 5, 7):
    TABLE[f"JPEG 2000, RGB {bits}"] = (
        jp2(ramp(2**bits - 1, 3), bits),
        levels(ramp(2**bits - 1, 3), 2**bits - 1),
    )
DATA, SHOWN = [data for data, _ in TABLE.values()], [shown for _, shown in TABLE.values()]


def assert_shows(found: np.ndarray, name: str, shown: np.ndarray) -> None:
    assert found.shape == shown.shape, name
    wrong = np.abs(found.astype(int) - shown)
    assert wrong.max() == 0, f"{name}: {(wrong > 0).mean():.0%} wrong, by up to {wrong.max()}"


@pytest.mark.parametrize("whole", [True, False])
def test_decoders(decoder, whole):
    """All files at once, whole and by a box of each."""
    crops = [] if whole else [Crop(size=(H - 3, W - 4))]
    boxes = np.array([[2, 3, H - 3, W - 4]] * len(DATA), np.int32)
    draws = Draws({}, {}, {}, {}) if whole else Draws({0: boxes}, {0: np.zeros(len(DATA), bool)}, {}, {})
    busy = make_decoder(decoder, crops, batch=len(DATA), channels=3, threads=2, depth=1, device=CPU)
    busy.submit(Request(DATA, draws))
    images = busy.decoded()[0] if whole else busy.result()[0]
    busy.close()
    cut = slice(None) if whole else (slice(2, H - 1), slice(3, W - 1))
    for (name, (_, shown)), image in zip(TABLE.items(), images, strict=True):
        assert_shows(image.numpy(), name, shown[cut])


def test_cache_and_loader(decoder, open_loader):
    """A crop as large as the picture, cut by training's law with and without the cache."""
    images = MemoryImages(DATA)
    batches = {
        cache: take(open_loader(images, decoder, batch=len(DATA), cache=cache), 1)[0]
        for cache in ("none", "ram", "device")
    }
    assert torch.equal(batches["none"].crops[0], batches["ram"].crops[0])
    assert torch.equal(batches["none"].crops[0], batches["device"].crops[0])


def test_evaluation_features_see_them():
    """Crops of the whole picture; one 12 pixels high is 12 x 20 as it is."""
    images = MemoryImages(DATA)
    [(crops, _)] = list(center_crops(images, (H, H), fraction=1.0, batch=len(DATA)))
    left = round((W - H) / 2)
    for (name, (_, shown)), crop in zip(TABLE.items(), crops.numpy(), strict=True):
        assert_shows(crop, name, shown[:, left : left + H])


@pytest.mark.parametrize("name", TABLE)
def test_stats(name):
    data, shown = TABLE[name]
    report = stats(MemoryImages([data]), threads=1)
    unit = shown.reshape(-1, 3) / 255
    np.testing.assert_allclose(report["mean"], unit.mean(0), atol=1e-9)
    np.testing.assert_allclose(report["std"], unit.std(0), atol=1e-6)
    assert report["height"]["max"] == H and report["width"]["max"] == W


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The set, packed at half its size, and packed as it is."""
    folder = tmp_path_factory.mktemp("packed")
    source = MemoryImages(DATA)
    for name, short_side in (("half", H // 2), ("whole", None)):
        pack_images(source, folder / name, PackConfig(short_side=short_side, quality=100), threads=2)
    return find_images(folder / "half"), find_images(folder / "whole")


def test_pack_keeps_the_bytes_of_small_pictures(packed):
    assert [packed[1].read(i) for i in range(len(DATA))] == DATA


def test_pack_resizes_what_is_shown(packed):
    """Bicubic of the levels, to rounding: deep pictures are resized before they are rounded."""
    half = packed[0]
    for i, (name, (_, shown)) in enumerate(TABLE.items()):
        small = np.asarray(decode(half.read(i)).convert("RGB")).astype(int)
        size = W // 2, H // 2
        if name == "TIFF, CMYK":  # averaged as inks
            continue
        wanted = np.asarray(Image.fromarray(shown.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC))
        lossy = name.startswith("JPEG 2000")
        assert np.abs(small - wanted).max() <= (3 if lossy else 1), name


def test_pack_keeps_16_bits_of_gray(tmp_path):
    """A slope halved is the mean of each two by two pixels."""
    smooth = np.linspace(7000, 58000, H * W).reshape(H, W, 1).astype(np.int64)
    files = [encoders.tiff(smooth, 16, 1, order=order) for order in "<>"]
    files += [encoders.png(smooth, 16, 0), encoders.netpbm(smooth, 65535)]
    pack_images(MemoryImages(files), tmp_path / "dst", PackConfig(short_side=H // 2), threads=1)
    images = find_images(tmp_path / "dst")
    for i in range(len(images)):
        values = np.asarray(Image.open(BytesIO(images.read(i)))).astype(np.int64)
        assert values.shape == (H // 2, W // 2)
        means = smooth[:, :, 0].reshape(H // 2, 2, W // 2, 2).mean((1, 3))
        assert np.abs(values - means)[2:-2, 2:-2].max() <= 1, i  # at the edge the filter has fewer pixels


def test_verify_finds_all_of_them_good(decoder):
    found = dict(verify(MemoryImages(DATA), 2, decoder, CPU))
    assert {name: reason for name, reason in zip(TABLE, found.values(), strict=True) if reason} == {}


REFUSED = {
    "floats": (encoders.tiff(ramp(1, 1), 32, 1, signed=None), "floating-point numbers is not decoded; gray"),
    "32 bits": (encoders.tiff(ramp(1, 1), 16, 1, tags={258: (32,)}), "TIFF of 32-bit gray is not"),
    "10 bits": (encoders.tiff(ramp(1023, 1), 10, 1), "TIFF of 10-bit gray is not"),
    "CIELAB": (encoders.tiff(RGB8, 8, 8), "TIFF of CIELAB is not"),
    "five bands": (encoders.tiff(ramp(255, 5), 8, 1, extra=(0,) * 4), "TIFF of 5 bands of 8-bit gray is not"),
    "12-bit JPEG": (
        encode(0).replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
        "12-bit JPEG is not decoded; 8-bit is",
    ),
    "gray and alpha of 16 bits": (encoders.tiff(GA16, 16, 1, extra=(2,)), "TIFF of 2 bands of 16-bit gray"),
    "gray and what?": (encoders.tiff(GA8, 8, 1), "2 bands of 8-bit gray with such extra samples is not"),
    "GIF": (encode(0, fmt="GIF"), "GIF format is not decoded; JPEG, PNG"),
    "PFM": (b"Pf\n1 1\n-1.0\n\0\0\0\0", "floating-point numbers.* is not decoded"),
    "maxval": (encoders.netpbm(ramp(4095, 1), 1000), "where maxval is 1000"),
    "maxval 0": (encoders.netpbm(G8, 255).replace(b"\n255\n", b"\n0\n"), "maxval .* is 1 to 65535, got 0"),
    "AVIF": (b"\0\0\0\x1cftypavif" + bytes(20), "AVIF format is not decoded; JPEG, PNG"),
    "short PGM": (encoders.netpbm(G8, 255)[:-5], "truncated"),
    "Apple's PNG": (b"\x89PNG\r\n\x1a\n" + encoders.chunk(b"CgBI", b"\0" * 4) + bytes(40), "Apple's own"),
}  # fmt: skip


def test_the_same_are_refused_by_the_same_reason_everywhere(decoder):
    data = [data for data, _ in REFUSED.values()]
    found = dict(verify(MemoryImages([*data, encode(1)]), 2, decoder, CPU))
    assert found.pop(len(data)) is None
    for (name, (_, reason)), said in zip(REFUSED.items(), found.values(), strict=True):
        assert said is not None, name
        with pytest.raises(BadImage, match=reason) as refused:
            decode(REFUSED[name][0])
        assert str(refused.value) == said
        assert "damaged" not in said or name in ("maxval",), (name, said)


def test_training_refuses_what_verify_names(decoder, open_loader, tmp_path):
    """The same files for the same reasons, as the crops of a run find them and as the cache does."""
    data = [*DATA, *(data for data, _ in REFUSED.values()), encode(2), encode(2)[:-90], encode(3)]
    images = MemoryImages(data)
    named = {i: reason for i, reason in verify(images, 2, decoder, CPU) if reason}
    assert len(named) == len(REFUSED) + 1
    for cache in ("none", "ram"):
        take(open_loader(images, decoder, batch=len(data), max_bad_fraction=1.0, cache=cache), 1)
        file = tmp_path / "bad_samples.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.unlink()
        assert {row["sample_id"]: row["reason"] for row in rows} == named


# --- what lies beside the pixels ------------------------------------------------------------------------

JPEG = encode(3, size=(W, H))
NOISE = np.random.default_rng(0).bytes(50_000)
BESIDE = {
    "a video behind": JPEG + b"\0\0\0\x18ftypmp42" + NOISE + b"\xff\xda\xff\xd9\xff\xda",
    "a second picture behind": JPEG + encode(4, size=(9, 9)),
    "half a picture behind": JPEG + encode(4)[:-90],
    "a thumbnail": JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(encode(1)) + 2) + encode(1) + JPEG[2:],
    "a comment with ends": JPEG[:2] + b"\xff\xfe\x00\x08\xff\xd9\xff\xda\xff\xd9" + JPEG[2:],
}  # fmt: skip


@pytest.mark.parametrize("kind", BESIDE)
def test_only_the_first_picture_of_a_jpeg_counts(kind, decoder):
    data = [BESIDE[kind], JPEG]
    assert for_dali(data[0], 3)[1] == image_size(data[0]) == (H, W)
    busy = make_decoder(decoder, [], batch=2, channels=3, threads=1, depth=1, device=CPU)
    busy.submit(Request(data))
    beside, alone = busy.decoded()[0]
    busy.close()
    assert torch.equal(beside, alone)
    with pytest.raises(BadImage, match="truncated: JPEG without its end marker"):
        image_size(JPEG[:-2])


def text_chunk(name: bytes, size: int, *, packed: bool) -> bytes:
    text = b"a long story " * (size // 13)
    if name == b"iCCP":
        return encoders.chunk(name, b"profile\0\0" + zlib.compress(text))
    if name == b"iTXt":
        return encoders.chunk(name, b"key\0\1\0en\0\0" + zlib.compress(text))
    return encoders.chunk(name, b"key\0\0" + zlib.compress(text) if packed else b"key\0" + text)


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_text_and_profiles_of_any_length_are_passed_over(name, where, decoder):
    extra = text_chunk(name, 3_000_000, packed=name == b"zTXt")
    broken = encoders.chunk(b"tEXt", b"no key")[:-1] + b"\0"  # and a checksum that is wrong
    data = encoders.png(RGB8, 8, 2, **{where: extra + broken})
    assert dict(verify(MemoryImages([data]), 1, decoder, CPU)) == {0: None}
    assert_shows(np.asarray(decode(data)), "long text", RGB8)


def test_the_first_picture_of_an_animation_is_the_one_of_its_data():
    """APNG: frames are other chunks; the data may be none of them."""
    control = encoders.chunk(b"acTL", struct.pack(">II", 1, 0))
    frame = encoders.chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, W, H, 0, 0, 1, 1, 0, 0))
    other = encoders.chunk(b"fdAT", b"\0\0\0\1" + encoders.png(255 - RGB8, 8, 2)[41:-16])
    data = encoders.png(RGB8, 8, 2, before=control, after=frame + other)
    assert_shows(np.asarray(decode(data)), "APNG", RGB8)


def test_animated_webp_shows_its_first_frame(decoder):
    frames = [Image.fromarray(x.astype(np.uint8)) for x in (RGB8, 255 - RGB8)]
    file = BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True, duration=50)
    assert_shows(np.asarray(decode(file.getvalue())), "WebP", RGB8)


def test_fax_of_libtiff_is_ink_on_paper():
    for compression in ("group3", "group4", "tiff_ccitt"):
        file = BytesIO()
        Image.fromarray(INK == 0).save(file, "TIFF", compression=compression)
        assert_shows(
            np.asarray(decode(file.getvalue()).convert("RGB")), compression, levels(1 - INK[:, :, None], 1)
        )


def test_adobes_inverted_inks(decoder):
    """A flat color, which JPEG keeps to a level: 20 % cyan, 60 % magenta, nothing else."""
    file = BytesIO()
    Image.new("CMYK", (32, 24), (51, 153, 0, 0)).save(file, "JPEG", quality=100)
    data = file.getvalue()
    assert b"Adobe" in data and for_dali(data, 3) is None
    busy = make_decoder(decoder, [], batch=1, channels=3, threads=1, depth=1, device=CPU)
    busy.submit(Request([data]))
    [image] = busy.decoded()[0]
    busy.close()
    assert np.abs(image.numpy().astype(int) - (204, 102, 255)).max() <= 1


def test_damage_in_a_scan_is_seen_in_front_of_the_decoders():
    """Markers that belong nowhere: libjpeg bears them until it is asked for the end of the file."""
    data = encode(5)
    at = data.index(b"\xff\xda") + 60
    for stray in (b"\xff\x63", b"\xff\xd8", b"\xff\xff\x12"):
        broken = data[:at] + stray + data[at + len(stray) :]
        with pytest.raises(BadImage, match="damaged: marker 0xff.. within or behind the coded data"):
            image_size(broken)
    # restarts, stuffing, scans of a progressive file and tables between them belong
    for options in ({"restart_marker_blocks": 2}, {"progressive": True}, {"quality": 100}):
        assert image_size(encode(5, **options)) == for_dali(encode(5, **options), 3)[1] == (40, 48)


def test_the_orientation_of_a_png_with_long_text_is_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    before = encoders.chunk(b"eXIf", exif.tobytes()) + text_chunk(b"zTXt", 3_000_000, packed=True)
    files = [encoders.png(RGB8, 8, 2, before=before), encoders.tiff(RGB8, 8, 2, tags={274: (6,)})]
    pack_images(MemoryImages(files), tmp_path / "dst", PackConfig(short_side=H // 2), threads=1)
    images = find_images(tmp_path / "dst")
    for i in (0, 1):
        small = Image.open(BytesIO(images.read(i)))
        assert dict(small.getexif())[0x0112] == 6
        assert image_size(images.read(i)) == (H // 2, W // 2)  # as stored: nothing was turned


def test_what_is_left_to_dali():
    """Speed is there; all else is read by the rule of one module."""
    plain = {"PNG, gray 8": 1, "PNG, RGB 8": 3, "PNG, transparent black": 1}
    for name, (data, _) in TABLE.items():
        for channels in (1, 3):
            assert (for_dali(data, channels) is not None) == (plain.get(name) == channels), name
    assert for_dali(encode(0), 3) and for_dali(encode(0), 1) and for_dali(encode(0, mode="L"), 3)
    assert for_dali(encode(0, keep_rgb=True), 3) is None
    data = encoders.png(RGB8, 8, 2)
    assert for_dali(data, 3) == (data, (H, W))
    for broken in (data[:60] + b"\0\1\2" + data[63:], data[:-12], data.replace(b"IEND", b"IENd")):
        assert for_dali(broken, 3) is None
    assert for_dali(encoders.png(RGB8, 8, 2, before=text_chunk(b"zTXt", 9, packed=True)), 3) == (data, (H, W))
