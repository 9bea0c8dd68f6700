"""Boxes of uint8 images of any sizes, resized to one size and flipped: the batch of a random resized crop.

    along an axis of n values cut from the image, to be m:   s = n / m,   a = max(s, 1)
    center_i = (i + 1/2) s          taps of value i: the j in the box with |j + 1/2 - center_i| < support * a
    w_ij     = f((j + 1/2 - center_i) / a), divided by their sum, rounded to 22 bits after the point
    out_i    = floor(sum over j of w_ij x_j + 1/2), held within 0 and 255

first in each row and then, from the bytes of that, in each column. f is Keys' cubic with a = -1/2 and support
2, the triangle with support 1, or Lanczos' windowed sinc with support 3: widened when it shrinks
(antialiased); nothing outside of the box is read. All three back ends agree to the last bit, with one another
and with Pillow's `image.crop(box)` resized in the same order: weights are made in fp64 without fused
multiply-add, the rest is integers.

    Lanczos   f(x) = sinc(x) sinc(x/3) = s (1 - 4s/3) / b^2,   b = pi x/3,   s = sin(b)^2
    sin(b)    its series to the 21st power, from the nearer of 0 and pi

so that there is one sine, made of sums and products, and the same on every processor: a library's may differ
in its last bit. Pillow takes the library's (glibc); rounded to 22 bits, none of the 474 million weights of
every length to 4000 at ten sizes is another.

Source  the resampling of Pillow, of which torchvision's RandomResizedCrop on PIL images is made. Pillow 13
        takes the columns first where a tall box is to shrink more along them.
Shapes  B images `[H_b, W_b, C]` of sizes of their own, C <= 4; a box is (top, left, height, width) in pixels.
Dtypes  uint8 in and out; sums int32.
Bytes   the boxes read; box height * width * C between the passes; B * h * w * C written.
Limits  pixels of a row contiguous. Not differentiable. Boxes and flips lie on the CPU, where they are drawn.
        CUDA runs Triton, CPU runs csrc/ or the reference.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels import native

Filter = Literal["bicubic", "bilinear", "lanczos"]
SUPPORT: dict[Filter, int] = {
    "bicubic": 2,
    "bilinear": 1,
    "lanczos": 3,
}  # by which the op and its kernels know a filter
MAX_CHANNELS = 4
BITS = 22
HALF = tl.constexpr(1 << (BITS - 1))
ONE = tl.constexpr(float(1 << BITS))
SHIFT = tl.constexpr(BITS)
PI, THIRD = tl.constexpr(math.pi), tl.constexpr(math.pi / 3)
SINE = tl.constexpr(tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(10, 0, -1)))  # highest first


# --- reference: the definition, and the oracle of the tests -------------------------------------


def taps_reference(n: int, m: int, filter: Filter) -> tuple[Tensor, Tensor]:
    """Taps of each of m values made of n, and their weights times 2**22, 0 past the last: int64 `[m, K]`."""
    scale = n / m
    wide, i = max(scale, 1.0), torch.arange(m, dtype=torch.float64)
    support = SUPPORT[filter] * wide
    center = ((i + 0.5) * scale)[:, None]
    first = (center - support + 0.5).long().clamp(min=0)
    last = (center + support + 0.5).long().clamp(max=n)
    tap = first + torch.arange(2 * int(-(-support // 1)) + 1)
    x = ((tap - center + 0.5) / wide).abs()
    if filter == "lanczos":
        w = torch.where(x == 0, 1, lanczos_reference(x))
    elif filter == "bicubic":
        w = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5)
    else:
        w = 1 - x
    w = torch.where((x < SUPPORT[filter]) & (tap < last), w, 0)
    total = torch.zeros_like(center)
    for t in range(w.shape[1]):  # one after the other, as the kernels add them
        total += w[:, t : t + 1]
    scaled = w / total * (1 << BITS)
    return tap.clamp(max=n - 1), torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).long()


def lanczos_reference(x: Tensor) -> Tensor:
    """sinc(x) sinc(x / 3) of fp64 values from 0 to 3, 0 itself left out."""
    b = x * THIRD.value
    r = torch.minimum(b, PI.value - b)
    square, series = r * r, torch.zeros_like(r)
    for coefficient in SINE.value:
        series = series * square + coefficient
    sine = r + r * square * series
    s = sine * sine
    return s * (1 - s * 4 / 3) / (b * b)


def resized_crop_reference(
    images: Sequence[Tensor], boxes_B4: Tensor, flips_B: Tensor, height: int, width: int, filter: Filter
) -> Tensor:
    """The op in plain PyTorch. B uint8 `[H_b, W_b, C]`, int64 `[B, 4]`, bool `[B]` -> `[B, h, w, C]`."""
    samples = zip(images, boxes_B4.tolist(), flips_B.tolist(), strict=True)
    return torch.stack(
        [
            _resized(image[top : top + h, left : left + w], flip, height, width, filter)
            for image, (top, left, h, w), flip in samples
        ]
    )


def _resized(x: Tensor, flip: bool, height: int, width: int, filter: Filter) -> Tensor:
    for dim, m in ((1, width), (0, height)):
        tap, weight = (t.to(x.device) for t in taps_reference(x.shape[dim], m, filter))
        taken = x.transpose(0, dim)[tap].long()  # [m, K, other axis, C]
        total = (taken * weight[..., None, None]).sum(1) + HALF.value
        x = (total >> BITS).clamp(0, 255).to(torch.uint8).transpose(0, dim)
    return x.flip(1) if flip else x


# --- Triton: weights, then rows, then columns --------------------------------------------------------


@triton.jit
def _weights_kernel(
    table_ptr, first_ptr, weight_ptr, height, width, K,
    SUPPORT: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # program (b, axis, block): axis 0 along the columns of the box, 1 along its rows
    b, axis = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m = tl.where(axis == 0, height, width)
    n = tl.load(table_ptr + b * COLS + 2 + axis)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    scale = n.to(tl.float64) / m.to(tl.float64)
    wide = tl.maximum(scale, 1.0)
    support = wide * SUPPORT
    center = (i.to(tl.float64) + 0.5) * scale
    first = tl.maximum((center - support + 0.5).to(tl.int64), 0)
    last = tl.minimum((center + support + 0.5).to(tl.int64), n)
    at = (b * 2 + axis) * tl.maximum(height, width) + i
    tl.store(first_ptr + at, first.to(tl.int32), mask=i < m)
    total = tl.zeros([BLOCK], tl.float64)
    for t in range(K):
        total += _weight(first + t, last, center, wide, SUPPORT)
    for t in range(K):
        scaled = _weight(first + t, last, center, wide, SUPPORT) / total * ONE
        rounded = tl.where(scaled < 0, scaled - 0.5, scaled + 0.5).to(tl.int32)
        tl.store(weight_ptr + at * K + t, rounded, mask=i < m)


@triton.jit
def _weight(tap, last, center, wide, SUPPORT: tl.constexpr):
    x = tl.abs((tap.to(tl.float64) - center + 0.5) / wide)
    if SUPPORT == 3:
        w = tl.where(x == 0.0, 1.0, tl.where(x < 3.0, _lanczos(x), 0.0))
    elif SUPPORT == 2:
        near = (x * 1.5 - 2.5) * x * x + 1.0
        w = tl.where(x < 1.0, near, tl.where(x < 2.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5, 0.0))
    else:
        w = tl.where(x < 1.0, 1.0 - x, 0.0)
    return tl.where(tap < last, w, 0.0)


@triton.jit
def _lanczos(x):
    b = x * tl.full([], THIRD, tl.float64)
    r = tl.minimum(b, tl.full([], PI, tl.float64) - b)
    square, series = r * r, r * 0.0
    for k in tl.static_range(10):
        series = series * square + tl.full([], SINE[k], tl.float64)
    sine = r + r * square * series
    s = sine * sine
    return s * (1.0 - s * 4.0 / 3.0) / (b * b)


@triton.jit
def _rows_kernel(
    table_ptr, first_ptr, weight_ptr, middle_ptr, width, longest, K,
    C: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # rows of a box to rows of the final width, flipped if wanted
    b = tl.program_id(0).to(tl.int64)
    row = table_ptr + b * COLS
    corner = tl.load(row).to(tl.pointer_type(tl.uint8))
    line, h, w = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    flip, start = tl.load(row + 4), tl.load(row + 5)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(1) * ROWS < h:
        j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        x, c = j // C, j % C
        exist = (y < h)[:, None] & (x < width)[None, :]
        at = (b * 2 + 1) * longest + x
        first = tl.load(first_ptr + at, mask=x < width, other=0)
        total = tl.full([ROWS, BLOCK], HALF, tl.int32)
        for t in range(K):
            weight = tl.load(weight_ptr + at * K + t, mask=x < width, other=0)
            taken = exist & (first + t < w)[None, :]
            value = tl.load(corner + y[:, None] * line + ((first + t) * C + c)[None, :], mask=taken, other=0)
            total += value.to(tl.int32) * weight[None, :]
        value = tl.minimum(tl.maximum(total >> SHIFT, 0), 255).to(tl.uint8)
        to = tl.where(flip != 0, width - 1 - x, x) * C + c
        tl.store(middle_ptr + (start + y)[:, None] * (width * C) + to[None, :], value, mask=exist)


@triton.jit
def _columns_kernel(
    table_ptr, first_ptr, weight_ptr, middle_ptr, out_ptr, height, row_bytes, longest, K,
    COLS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h, start = tl.load(table_ptr + b * COLS + 2), tl.load(table_ptr + b * COLS + 5)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    exist = (y < height)[:, None] & (j < row_bytes)[None, :]
    at = b * 2 * longest + y
    first = tl.load(first_ptr + at, mask=y < height, other=0)
    total = tl.full([ROWS, BLOCK], HALF, tl.int32)
    for t in range(K):
        weight = tl.load(weight_ptr + at * K + t, mask=y < height, other=0)
        taken = exist & (first + t < h)[:, None]
        from_row = (start + first + t)[:, None] * row_bytes
        value = tl.load(middle_ptr + from_row + j[None, :], mask=taken, other=0)
        total += value.to(tl.int32) * weight[:, None]
    value = tl.minimum(tl.maximum(total >> SHIFT, 0), 255).to(tl.uint8)
    tl.store(out_ptr + (b * height + y)[:, None] * row_bytes + j[None, :], value, mask=exist)


TABLE = 6  # address of the box, bytes of an image's row, height and width of the box, flip, first row between


def launch(
    images: Sequence[Tensor], boxes: Tensor, flips: Tensor, height: int, width: int, support: int
) -> Tensor:
    B, C, device = len(images), images[0].shape[2], images[0].device
    rows, start = [], 0
    for image, (top, left, h, w), flip in zip(images, boxes.tolist(), flips.tolist(), strict=True):
        corner = image.data_ptr() + top * image.stride(0) + left * C
        rows.append((corner, image.stride(0), h, w, int(flip), start))
        start += h
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    tallest, longest = int(boxes[:, 2].max()), max(height, width)
    scale = max(tallest / height, int(boxes[:, 3].max()) / width, 1.0)
    K = 2 * int(-(-support * scale // 1)) + 1
    first = torch.empty(B, 2, longest, dtype=torch.int32, device=device)
    weight = torch.empty(B, 2, longest, K, dtype=torch.int32, device=device)
    middle = torch.empty(start, width * C, dtype=torch.uint8, device=device)
    out = torch.empty(B, height, width, C, dtype=torch.uint8, device=device)
    # no fused multiply-add: the weights of all back ends are equal to the last bit
    _weights_kernel[(B, 2, triton.cdiv(longest, 128))](
        table, first, weight, height, width, K, SUPPORT=support, COLS=TABLE, BLOCK=128, enable_fp_fusion=False
    )
    tile = {"ROWS": 8, "BLOCK": 256}
    grid = (B, triton.cdiv(tallest, tile["ROWS"]), triton.cdiv(width * C, tile["BLOCK"]))
    _rows_kernel[grid](table, first, weight, middle, width, longest, K, C=C, COLS=TABLE, **tile)
    grid = (B, triton.cdiv(height, tile["ROWS"]), triton.cdiv(width * C, tile["BLOCK"]))
    _columns_kernel[grid](
        table, first, weight, middle, out, height, width * C, longest, K, COLS=TABLE, **tile
    )
    return out


# --- the op: schema, devices, fake ----------------------------------------------------------------


@torch.library.custom_op("fastmim::resized_crop", mutates_args=(), device_types="cuda")
def _op(
    images: Sequence[Tensor], boxes: Tensor, flips: Tensor, height: int, width: int, support: int
) -> Tensor:
    return launch(images, boxes, flips, height, width, support)


@_op.register_kernel("cpu")
def _(images, boxes, flips, height, width, support):
    if native.ready():
        return torch.ops.fastmim.native_resized_crop(images, boxes, flips, height, width, support)
    (filter,) = (name for name, value in SUPPORT.items() if value == support)
    return resized_crop_reference(images, boxes, flips, height, width, filter)


@_op.register_fake
def _(images, boxes, flips, height, width, support):
    return images[0].new_empty(len(images), height, width, images[0].shape[2])


# --- public function -------------------------------------------------------------------------------


def resized_crop(
    images: Sequence[Tensor],
    boxes_B4: Tensor,
    size: tuple[int, int],
    *,
    flips_B: Tensor | None = None,
    filter: Filter = "bicubic",
) -> Tensor:
    """One box of each image, resized to `size` (h, w). B uint8 `[H_b, W_b, C]` -> `[B, h, w, C]`.

    Boxes int64 `[B, 4]` (top, left, height, width) and flips bool `[B]` are on the CPU. ValueError when a box
    leaves its image, or when shapes, dtypes, devices or strides do not fit.
    """
    if not images:
        raise ValueError("want at least one image, got none")
    B, C, device = len(images), images[0].shape[-1], images[0].device
    room = []
    for i, image in enumerate(images):  # thousands a second: each attribute is asked for once
        sides, strides = image.shape, image.stride()
        if len(sides) != 3 or image.dtype != torch.uint8 or sides[2] != C or image.device != device:
            raise ValueError(
                f"want images uint8 [H, W, {C}] on {device}, got {image.dtype} {tuple(sides)} on "
                f"{image.device} at {i}"
            )
        if strides[2] != 1 or strides[1] != C:
            raise ValueError(f"want the pixels of a row contiguous, got strides {strides} at {i}")
        room.append(sides[:2])
    if not 1 <= C <= MAX_CHANNELS or min(size) < 1:
        raise ValueError(f"want 1 to {MAX_CHANNELS} channels and a size of at least 1, got {C} and {size}")
    if filter not in SUPPORT:
        raise ValueError(f"want a filter of {tuple(SUPPORT)}, got {filter!r}")
    flips_B = torch.zeros(B, dtype=torch.bool) if flips_B is None else flips_B
    for name, x, shape, dtype in (
        ("boxes", boxes_B4, (B, 4), torch.int64),
        ("flips", flips_B, (B,), torch.bool),
    ):
        if x.shape != shape or x.dtype != dtype or x.device.type != "cpu":
            raise ValueError(
                f"want {name} {dtype} {shape} on the CPU, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    corner, extent, room_B2 = boxes_B4[:, :2], boxes_B4[:, 2:], torch.tensor(room)
    fits = ((corner >= 0) & (extent >= 1) & (corner <= room_B2 - extent)).all(1)
    if not fits.all():
        i = int(fits.long().argmin())
        got = f"{tuple(boxes_B4[i].tolist())} in {tuple(room[i])} at {i}"
        raise ValueError(f"want boxes (top, left, height, width) within their images, got {got}")
    return _op(list(images), boxes_B4, flips_B, *size, SUPPORT[filter])
