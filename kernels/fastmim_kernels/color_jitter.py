"""Brightness, contrast, saturation and hue of uint8 images in an order of each image, gray, solarized.

    brightness f   x = 0    + f (x - 0)        in fp32, product and sum rounded each, held within 0 and 255,
    contrast f     x = mean + f (x - mean)     then cut to an integer; mean is that of the gray level over
    saturation f   x = gray + f (x - gray)     the whole image as it is then, rounded half up
    gray           (19595 R + 38470 G + 7471 B + 2**15) >> 16
    hue f          the hue byte of HSV plus int(255 f), modulo 256
    solarized      255 - x where x >= 128

HSV is bytes too, as Pillow makes them, v the largest channel and c what lies between it and the smallest:

    n = 6 c times the hue: G - B, 2c + B - R or 4c + R - G where R, G or B is the largest, modulo 6c
    h = 255 n // 6c, less one where that is exact and `_falls_short`;        s = 255 c // v
    i, f = 6h divmod 255
    p, q, t = v (1 - s/255), v (1 - s/255 f/255), v (1 - s/255 (1 - f/255)), rounded half up
    RGB = vtp, qvp, pvt, pqv, tpv, vpq for i = 0 .. 5, and 6 is 0

All three back ends agree to the last bit, with one another and with Pillow's.

Source  torchvision's ColorJitter, RandomGrayscale and RandomSolarize on PIL images, found anew by experiment.
Shapes  images `[B, H, W, C]`; C is 3, or 1, where gray is the level itself, so that saturation, hue and gray
        do nothing, as with torchvision.
Dtypes  uint8 in and out; blends in fp32, all else in integers; the mean's sum in int64.
Bytes   B * H * W * C read twice, for the mean of contrast, and written once; the second reading is of the L2.
Limits  at most 2**26 pixels an image. Not differentiable. What is drawn for a sample lies on the CPU, where
        it is drawn. CUDA runs Triton, CPU runs csrc/ or the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels import native

NOTHING, BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(stage) for stage in range(-1, 4))
GRAY_WEIGHTS = 19595, 38470, 7471
MAX_PIXELS = 1 << 26  # of one image

# --- reference: the definition, and the oracle of the tests -------------------------------------


def color_jitter_reference(
    images_BHWC: Tensor, order_B4: Tensor, factors_B4: Tensor, gray_B: Tensor, solarize_B: Tensor
) -> Tensor:
    """The op in plain PyTorch, hue in the floats that Pillow takes. `[B, H, W, C]` -> the same."""
    out = torch.empty_like(images_BHWC, memory_format=torch.contiguous_format)
    drawn = zip(order_B4.tolist(), factors_B4, gray_B.tolist(), solarize_B.tolist(), strict=True)
    for b, (order, factors, gray, solarize) in enumerate(drawn):
        x = images_BHWC[b].int()
        for stage in order:
            if stage == HUE.value:
                x = _shifted(x, int(factors[stage].double() * 255)) if x.shape[2] == 3 else x
            elif stage != NOTHING.value:
                base = (torch.zeros_like, _mean, _gray)[stage](x)
                x = (base + factors[stage].to(x.device) * (x - base)).clamp(0, 255).int()
        x = _gray(x).expand_as(x) if gray else x
        out[b] = torch.where(x >= 128, 255 - x, x) if solarize else x
    return out


def _gray(x: Tensor) -> Tensor:
    if x.shape[2] == 1:
        return x
    red, green, blue = (weight * x[..., c : c + 1] for c, weight in enumerate(GRAY_WEIGHTS))
    return (red + green + blue + (1 << 15)) >> 16


def _mean(x: Tensor) -> Tensor:
    count = x[..., 0].numel()
    return ((2 * _gray(x).sum() + count) // max(2 * count, 1)).int()


def _shifted(x: Tensor, shift: int) -> Tensor:
    v, c = x.amax(2), x.amax(2) - x.amin(2)
    h = hue_reference(x) + shift & 255
    s = 255 * c // v.clamp(min=1)
    i, f = 6 * h // 255 % 6, 6 * h % 255
    p = (2 * v * (255 - s) + 255) // 510
    q = (2 * v * (255**2 - s * f) + 255**2) // (2 * 255**2)
    t = (2 * v * (255**2 - s * (255 - f)) + 255**2) // (2 * 255**2)
    sextants = torch.stack([torch.stack([{"v": v, "p": p, "q": q, "t": t}[k] for k in rgb], -1)
                            for rgb in ("vtp", "qvp", "pvt", "pqv", "tpv", "vpq")])  # fmt: skip
    return sextants.gather(0, i[None, ..., None].expand(1, *x.shape).long())[0]


def hue_reference(x: Tensor) -> Tensor:
    """The hue byte of `[..., 3]` -> `[...]`: quotients and the hue rounded to fp32, sums to fp64."""
    largest, c = x.amax(-1), x.amax(-1) - x.amin(-1)
    red, green, blue = ((largest - x[..., k]).float() / c.clamp(min=1).float() for k in range(3))
    red, green, blue = red.double(), green.double(), blue.double()
    sixths = torch.where(x[..., 1] == largest, 2 + red - blue, 4 + green - red)
    sixths = torch.where(x[..., 0] == largest, blue - green, sixths).float().double()
    # by a tensor: CUDA multiplies by the inverse of a plain number
    hue = (sixths / torch.full_like(sixths, 6) + 1).fmod(1).float()
    return torch.where(c == 0, 0, (hue * 255).int())


# --- Triton: the mean that contrast wants, then all --------------------------------------------------


@triton.jit
def _falls_short(h):
    # Pillow's floats end below these multiples of 1/255: found for every pair of chroma and numerator
    low = (h >= 1) & (h <= 31) | (h >= 88) & (h <= 104) & (h % 4 == 0)
    high = (h >= 129) & (h <= 149) & (h % 2 == 1) | (h >= 153) & (h <= 209) & (h % 4 == 1)
    return low | high | (h == 176) | (h == 184)


@triton.jit
def _hue(r, g, b, shift):
    v = tl.maximum(tl.maximum(r, g), b)
    c = v - tl.minimum(tl.minimum(r, g), b)
    n = tl.where(r == v, g - b, tl.where(g == v, 2 * c + b - r, 4 * c + r - g))
    n = 255 * tl.where(n < 0, n + 6 * c, n)
    sixths = 6 * tl.maximum(c, 1)
    h = n // sixths
    h -= ((h * sixths == n) & _falls_short(h)).to(tl.int32)
    h = (h + shift) & 255
    s = 255 * c // tl.maximum(v, 1)
    i, f = 6 * h // 255, 6 * h % 255
    p = (2 * v * (255 - s) + 255) // 510
    q = (2 * v * (65025 - s * f) + 65025) // 130050
    t = (2 * v * (65025 - s * (255 - f)) + 65025) // 130050
    red = tl.where(i == 1, q, tl.where(i == 4, t, tl.where((i == 2) | (i == 3), p, v)))
    green = tl.where((i == 0) | (i == 6), t, tl.where(i == 3, q, tl.where((i == 4) | (i == 5), p, v)))
    blue = tl.where(i <= 1, p, tl.where(i == 2, t, tl.where(i == 5, q, tl.where(i == 6, p, v))))
    return red, green, blue


@triton.jit
def _blend(base, x, factor):
    value = base.to(tl.float32) + factor * (x - base).to(tl.float32)
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _level(r, g, b, C: tl.constexpr):
    if C == 1:
        return r
    else:
        return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


@triton.jit
def _jittered(r, g, b, row, mean, BEFORE_CONTRAST: tl.constexpr, C: tl.constexpr):
    # the stages in their order; BEFORE_CONTRAST those alone that come ahead of it
    ended = False
    for place in range(4):
        stage = tl.load(row + place).to(tl.int32)
        if BEFORE_CONTRAST:
            ended = ended | (stage == CONTRAST)
            stage = tl.where(ended, NOTHING, stage)
        factor = tl.load(row + 4 + tl.maximum(stage, 0))
        if stage == HUE:
            if C == 3:
                r, g, b = _hue(r, g, b, factor.to(tl.int32))
        elif stage >= 0:
            base = _level(r, g, b, C)
            base = tl.where(stage == BRIGHTNESS, 0, tl.where(stage == CONTRAST, mean, base))
            r, g, b = _blend(base, r, factor), _blend(base, g, factor), _blend(base, b, factor)
    return r, g, b


@triton.jit
def _load(image, pixel, count, width, stride_y, stride_x, stride_c, C: tl.constexpr):
    at = image + (pixel // width).to(tl.int64) * stride_y + (pixel % width).to(tl.int64) * stride_x
    r = tl.load(at, mask=pixel < count, other=0).to(tl.int32)
    if C == 1:
        return r, r, r
    else:
        g = tl.load(at + stride_c, mask=pixel < count, other=0).to(tl.int32)
        b = tl.load(at + 2 * stride_c, mask=pixel < count, other=0).to(tl.int32)
        return r, g, b


@triton.jit
def _levels_kernel(
    images_ptr, table_ptr, sums_ptr, count, width, stride_b, stride_y, stride_x, stride_c, tiles,
    C: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # sum of the gray levels of one tile of pixels, as they are when the contrast's turn comes
    b, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = table_ptr + b * COLS
    if tl.load(row + 10).to(tl.int32) != 0:
        pixel, image = tile * BLOCK + tl.arange(0, BLOCK), images_ptr + b * stride_b
        red, green, blue = _load(image, pixel, count, width, stride_y, stride_x, stride_c, C)
        red, green, blue = _jittered(red, green, blue, row, 0, True, C)
        # beyond the image all is black, and stays black until then
        tl.store(sums_ptr + b * tiles + tile, tl.sum(_level(red, green, blue, C), 0))


@triton.jit
def _jitter_kernel(
    images_ptr, table_ptr, sums_ptr, out_ptr, count, width, stride_b, stride_y, stride_x, stride_c, tiles,
    C: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = table_ptr + b * COLS
    contrast = tl.load(row + 10).to(tl.int32) != 0
    total = tl.zeros([CHUNK], tl.int64)
    for start in range(0, tiles, CHUNK):
        at = start + tl.arange(0, CHUNK)
        total += tl.load(sums_ptr + b * tiles + at, mask=(at < tiles) & contrast, other=0).to(tl.int64)
    mean = ((2 * tl.sum(total, 0) + count) // (2 * tl.cast(count, tl.int64))).to(tl.int32)
    pixel, image = tile * BLOCK + tl.arange(0, BLOCK), images_ptr + b * stride_b
    red, green, blue = _load(image, pixel, count, width, stride_y, stride_x, stride_c, C)
    red, green, blue = _jittered(red, green, blue, row, mean, False, C)
    if tl.load(row + 8).to(tl.int32) != 0:
        red = _level(red, green, blue, C)
        green, blue = red, red
    solarize = tl.load(row + 9).to(tl.int32) != 0
    at = out_ptr + (b * count + pixel) * C
    tl.store(at, tl.where(solarize & (red >= 128), 255 - red, red).to(tl.uint8), mask=pixel < count)
    if C == 3:
        green = tl.where(solarize & (green >= 128), 255 - green, green)
        blue = tl.where(solarize & (blue >= 128), 255 - blue, blue)
        tl.store(at + 1, green.to(tl.uint8), mask=pixel < count)
        tl.store(at + 2, blue.to(tl.uint8), mask=pixel < count)


COLUMNS = 11  # stage of each place, factor of each stage (of hue: what its byte is shifted by), three flags


def launch(images: Tensor, order: Tensor, factors: Tensor, gray: Tensor, solarize: Tensor) -> Tensor:
    B, H, W, C = images.shape
    out = torch.empty(B, H, W, C, dtype=torch.uint8, device=images.device)
    if out.numel() == 0:
        return out
    flags = torch.stack([gray, solarize, (order == CONTRAST.value).any(1)], 1)
    shift = (factors[:, 3:].double() * 255).trunc().float()
    table = torch.cat([order.float(), factors[:, :3], shift, flags.float()], 1)  # small integers are exact
    if images.is_cuda:
        table = table.pin_memory().to(images.device, non_blocking=True)
    block = 1024
    tiles = triton.cdiv(H * W, block)
    sums = torch.empty(B, tiles, dtype=torch.int32, device=images.device)
    shape = H * W, W, *images.stride(), tiles
    # no fused multiply-add: the blends of all back ends are equal to the last bit
    rest = {"C": C, "COLS": COLUMNS, "BLOCK": block, "enable_fp_fusion": False}
    _levels_kernel[(B, tiles)](images, table, sums, *shape, **rest)
    _jitter_kernel[(B, tiles)](images, table, sums, out, *shape, CHUNK=64, **rest)
    return out


# --- the op: schema, devices, fake ----------------------------------------------------------------


@torch.library.custom_op("fastmim::color_jitter", mutates_args=(), device_types="cuda")
def _op(images: Tensor, order: Tensor, factors: Tensor, gray: Tensor, solarize: Tensor) -> Tensor:
    return launch(images, order, factors, gray, solarize)


@_op.register_kernel("cpu")
def _(images, order, factors, gray, solarize):
    if native.ready():
        return torch.ops.fastmim.native_color_jitter(images, order, factors, gray, solarize)
    return color_jitter_reference(images, order, factors, gray, solarize)


@_op.register_fake
def _(images, order, factors, gray, solarize):
    return images.new_empty(images.shape)


# --- public function -------------------------------------------------------------------------------


def color_jitter(
    images_BHWC: Tensor,
    order_B4: Tensor,
    factors_B4: Tensor,
    *,
    gray_B: Tensor | None = None,
    solarize_B: Tensor | None = None,
) -> Tensor:
    """Each image jittered in its own order, then made gray, then solarized. uint8 `[B, H, W, C]` -> the same.

    Order int64: which stage comes at each place, 0 brightness, 1 contrast, 2 saturation, 3 hue, -1 none.
    Factors fp32 of brightness, contrast, saturation (at least 0) and hue (-0.5 to 0.5). Flags bool; all of
    these on the CPU. ValueError when a stage comes twice, a factor is out of range, or shapes, dtypes or
    devices do not fit.
    """
    if images_BHWC.ndim != 4 or images_BHWC.dtype != torch.uint8 or images_BHWC.shape[3] not in (1, 3):
        got = f"{images_BHWC.dtype} {tuple(images_BHWC.shape)}"
        raise ValueError(f"want images uint8 [B, H, W, C] of 1 or 3 channels, got {got}")
    B, H, W, _ = images_BHWC.shape
    if H * W > MAX_PIXELS:
        raise ValueError(f"want at most {MAX_PIXELS} pixels an image, got {H} x {W}")
    gray_B = torch.zeros(B, dtype=torch.bool, device="cpu") if gray_B is None else gray_B
    solarize_B = torch.zeros(B, dtype=torch.bool, device="cpu") if solarize_B is None else solarize_B
    for name, x, shape, dtype in (
        ("order", order_B4, (B, 4), torch.int64),
        ("factors", factors_B4, (B, 4), torch.float32),
        ("gray", gray_B, (B,), torch.bool),
        ("solarize", solarize_B, (B,), torch.bool),
    ):
        if x.shape != shape or x.dtype != dtype or x.device.type != "cpu":
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"want {name} {dtype} {shape} on the CPU, got {got}")
    places = order_B4.sort(1).values
    twice = (places[:, 1:] == places[:, :-1]) & (places[:, 1:] != NOTHING.value)
    if bool((places < NOTHING.value).any() | (places > HUE.value).any() | twice.any()):
        raise ValueError(f"want an order of 0 to 3, each once at most, and -1, got {order_B4.tolist()}")
    blends, hues = factors_B4[:, :3], factors_B4[:, 3]
    if not bool(((blends >= 0) & blends.isfinite()).all() & (hues.abs() <= 0.5).all()):
        raise ValueError(f"want factors of at least 0 and hues from -0.5 to 0.5, got {factors_B4.tolist()}")
    return _op(images_BHWC, order_B4, factors_B4, gray_B, solarize_B)
