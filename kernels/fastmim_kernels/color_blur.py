"""Gaussian blur of uint8 images, a sigma for each, as Pillow makes it: three box filters along each axis.

    a box that reaches r + a pixels to each side, of r whole ones and a part of the next, as deep as gives
    three of them the variance sigma**2, v = sigma**2 / 3 each:
        r = floor((sqrt(12 v + 1) - 1) / 2),     a = (2r + 1) (r (r + 1) - 3v) / (6 (v - (r + 1)**2))
    inner = floor(2**24 / (2 (r + a) + 1)),      outer = (2**24 - (2r + 1) inner) // 2
    x_i = (inner * (x_{i-r} + ... + x_{i+r}) + outer * (x_{i-r-1} + x_{i+r+1}) + 2**23) >> 24

three times along the rows and then three times down the columns, bytes in between; outside of the image is
its nearest pixel. What the box is made of is computed in fp32, the rest in integers, so all three back ends
agree to the last bit, with one another and with `ImageFilter.GaussianBlur(sigma)`, which is what SimSiam,
MoCo v3 and DINO train with. Solarized behind it, 255 - x where x >= 128, as the latter two do.

Source  Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (SSVM
        2011), with Pillow's rounding, found by experiment. Not the sampled Gaussian of torchvision's tensors.
Shapes  images `[B, H, W, C]`, C <= 4. A sigma of 0 leaves its image.
Dtypes  uint8 in and out; sums in uint32.
Bytes   B * H * W * C read and written by each of six launches; of an image that is left, by the first.
Limits  not differentiable. Sigmas and flags lie on the CPU, where they are drawn. CUDA runs Triton, CPU runs
        csrc/ or the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels import native

MAX_CHANNELS = 4
MAX_SIGMA = 100.0
PASSES = 3  # along each axis
BITS = tl.constexpr(24)
ONE, HALF = 1 << 24, tl.constexpr(1 << 23)

# --- reference: the definition, and the oracle of the tests -------------------------------------


def boxes_of(sigmas_B: Tensor) -> Tensor:
    """Whole pixels r, inner and outer weight of the box of each sigma, -1, 0, 0 for 0: int64 `[B, 3]`."""
    v = sigmas_B * sigmas_B / PASSES
    r = ((12 * v + 1).sqrt() - 1).div(2).floor()
    part = (2 * r + 1) * (r * (r + 1) - 3 * v) / (6 * (v - (r + 1) * (r + 1)))
    reach = r + part
    r, inner = reach.long(), (ONE / (reach * 2 + 1)).long()
    boxes = torch.stack([r, inner, (ONE - (2 * r + 1) * inner) // 2], 1)
    return torch.where(sigmas_B[:, None] > 0, boxes, torch.tensor([-1, 0, 0], device=sigmas_B.device))


def color_blur_reference(images_BHWC: Tensor, sigmas_B: Tensor, solarize_B: Tensor) -> Tensor:
    """The op in plain PyTorch. uint8 `[B, H, W, C]`, fp32 `[B]`, bool `[B]` -> `[B, H, W, C]`."""
    out = torch.empty_like(images_BHWC, memory_format=torch.contiguous_format)
    for b, ((r, inner, outer), solarize) in enumerate(
        zip(boxes_of(sigmas_B).tolist(), solarize_B.tolist(), strict=True)
    ):
        x = images_BHWC[b].long()
        if r >= 0:
            for dim in (1, 1, 1, 0, 0, 0):
                x = _boxed(x, dim, r, inner, outer)
        out[b] = torch.where(x >= 128, 255 - x, x) if solarize else x
    return out


def _boxed(x: Tensor, dim: int, r: int, inner: int, outer: int) -> Tensor:
    n = x.shape[dim]
    at = torch.arange(n, device=x.device)[:, None] + torch.arange(-r - 1, r + 2, device=x.device)
    weights = torch.tensor([outer, *[inner] * (2 * r + 1), outer], device=x.device)
    taps = x.movedim(dim, 0)[at.clamp(0, n - 1)]  # [n, 2r + 3, other axis, C]
    total = (taps * weights[:, None, None]).sum(1) + HALF.value
    return (total >> BITS.value).movedim(0, dim)


# --- Triton: one launch a pass ------------------------------------------------------------------------


@triton.jit
def _pass_kernel(
    from_ptr, to_ptr, out_ptr, table_ptr, height, width, stride_b, stride_y, stride_x, stride_c,
    DOWN: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # an image that is left goes to the output in the first pass, and no other pass looks at it
    b = tl.program_id(0).to(tl.int64)
    r, inner = tl.load(table_ptr + b * 4), tl.load(table_ptr + b * 4 + 1).to(tl.uint32)
    outer, solarize = tl.load(table_ptr + b * 4 + 2).to(tl.uint32), tl.load(table_ptr + b * 4 + 3) != 0
    y = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    x, c = (j // C).to(tl.int64), j % C
    exist = (y < height)[:, None] & (x < width)[None, :]
    row_bytes = tl.cast(width, tl.int64) * C
    to = (b * height + y)[:, None] * row_bytes + j[None, :]
    corner = from_ptr + b * stride_b + (c * stride_c)[None, :]
    if r >= 0:
        near = tl.zeros([ROWS, BLOCK], tl.uint32)
        far = tl.zeros([ROWS, BLOCK], tl.uint32)
        for step in range(-r - 1, r + 2):
            ys, xs = y, x
            if DOWN:
                ys = tl.minimum(tl.maximum(y + step, 0), height - 1)
            else:
                xs = tl.minimum(tl.maximum(x + step, 0), width - 1)
            at = corner + (ys * stride_y)[:, None] + (xs * stride_x)[None, :]
            value = tl.load(at, mask=exist, other=0).to(tl.uint32)
            ends = (step == -r - 1) | (step == r + 1)
            far += tl.where(ends, value, 0)
            near += tl.where(ends, 0, value)
        value = (near * inner + far * outer + HALF) >> BITS
        if LAST:
            value = tl.where(solarize & (value >= 128), 255 - value, value)
        tl.store(to_ptr + to, value.to(tl.uint8), mask=exist)
    elif FIRST:
        at = corner + (y * stride_y)[:, None] + (x * stride_x)[None, :]
        kept = tl.load(at, mask=exist, other=0).to(tl.int32)
        kept = tl.where(solarize & (kept >= 128), 255 - kept, kept)
        tl.store(out_ptr + to, kept.to(tl.uint8), mask=exist)


def launch(images: Tensor, sigmas: Tensor, solarize: Tensor) -> Tensor:
    B, H, W, C = images.shape
    out = torch.empty(B, H, W, C, dtype=torch.uint8, device=images.device)
    if out.numel() == 0:
        return out
    table = torch.cat([boxes_of(sigmas), solarize[:, None].long()], 1).int()
    if images.is_cuda:
        table = table.pin_memory().to(images.device, non_blocking=True)
    middle = torch.empty_like(out)
    tile = {"ROWS": 4, "BLOCK": 128}
    grid = (B, triton.cdiv(H, tile["ROWS"]), triton.cdiv(W * C, tile["BLOCK"]))
    source, last = images, 2 * PASSES - 1
    for i in range(2 * PASSES):
        to = out if i % 2 else middle
        _pass_kernel[grid](
            source, to, out, table, H, W, *source.stride(),
            DOWN=i >= PASSES, FIRST=i == 0, LAST=i == last, C=C, **tile,
        )  # fmt: skip
        source = to
    return out


# --- the op: schema, devices, fake ----------------------------------------------------------------


@torch.library.custom_op("fastmim::color_blur", mutates_args=(), device_types="cuda")
def _op(images: Tensor, sigmas: Tensor, solarize: Tensor) -> Tensor:
    return launch(images, sigmas, solarize)


@_op.register_kernel("cpu")
def _(images, sigmas, solarize):
    if native.ready():
        return torch.ops.fastmim.native_color_blur(images, boxes_of(sigmas), solarize)
    return color_blur_reference(images, sigmas, solarize)


@_op.register_fake
def _(images, sigmas, solarize):
    return images.new_empty(images.shape)


# --- public function -------------------------------------------------------------------------------


def color_blur(images_BHWC: Tensor, sigmas_B: Tensor, *, solarize_B: Tensor | None = None) -> Tensor:
    """Each image blurred by its own sigma in pixels, 0 for none, then solarized. uint8 `[B, H, W, C]`.

    Sigmas fp32 and flags bool, `[B]`, on the CPU. ValueError when a sigma is below 0 or above 100, or when
    shapes, dtypes or devices do not fit.
    """
    shape = images_BHWC.shape
    if images_BHWC.ndim != 4 or images_BHWC.dtype != torch.uint8 or not 1 <= shape[3] <= MAX_CHANNELS:
        raise ValueError(
            f"want images uint8 [B, H, W, C] of 1 to {MAX_CHANNELS} channels, "
            f"got {images_BHWC.dtype} {tuple(shape)}"
        )
    solarize_B = (
        torch.zeros(len(images_BHWC), dtype=torch.bool, device="cpu") if solarize_B is None else solarize_B
    )
    for name, x, dtype in (("sigmas", sigmas_B, torch.float32), ("solarize", solarize_B, torch.bool)):
        if x.shape != shape[:1] or x.dtype != dtype or x.device.type != "cpu":
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"want {name} {dtype} {tuple(shape[:1])} on the CPU, got {got}")
    if not bool(((sigmas_B >= 0) & (sigmas_B <= MAX_SIGMA)).all()):
        raise ValueError(f"want sigmas from 0 to {MAX_SIGMA:.0f}, got {sigmas_B.tolist()}")
    return _op(images_BHWC, sigmas_B, solarize_B)
