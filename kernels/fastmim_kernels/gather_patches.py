"""Rows of chosen patches, normalized and cast, straight from the image: no float image, no unfold.

    x[b, k, (i, j, c)] = (v / 255 - mean[c]) / std[c]    v = image[b, y * p + i, x * p + j, c]
    y, x = divmod(index[b, k], W / p)                    patches are numbered row by row
    dimage[b, ...]     = sum over the k that read the pixel of dx / std[c]

A uint8 image is divided by 255; a floating one is taken as already in [0, 1].

Source  column order (row, column, channel; channel fastest): `patchify` of facebookresearch/mae.
Shapes  B = images, H x W pixels of C channels, K = patches per image, P = p * p * C values per patch.
Dtypes  image uint8, or bf16, fp16, fp32; index int64; arithmetic fp32; rows fp32, bf16 or fp16.
Bytes   B * K * P * (s_image + s_row): each chosen pixel read once, each row written once. Memory bound.
Limits  any strides; mean and std are compiled in (C unrolled): meant for a few channels, few values.
        The index is checked on the CPU, on CUDA in debug mode. The image gets a gradient when it is floating;
        patches that share pixels are summed by fp32 atomics. CUDA runs Triton, CPU csrc/ or the reference.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim_kernels import native
from fastmim_kernels.debug import debugging
from fastmim_kernels.once import differentiable_once

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096  # values per program: 8 kB of bf16 rows
TILE_BACK = 1024  # atomics: every value has its own address in registers


# --- reference: the definition, and the oracle of the tests -------------------------------------


def gather_patches_reference(
    image_BHWC: Tensor,
    index_BK: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The op in plain PyTorch. `[B, H, W, C], [B, K] -> [B, K, P]`; in fp64 when `dtype` is, else in fp32."""
    grid_w = image_BHWC.shape[2] // patch
    cells = image_BHWC.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # [B, H/p, p, W/p, p, C]
    image_B1 = torch.arange(len(image_BHWC), device=index_BK.device)[:, None]
    rows = cells.transpose(2, 3)[image_B1, index_BK // grid_w, index_BK % grid_w]  # [B, K, p, p, C]
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    x = rows.to(arithmetic) / 255 if image_BHWC.dtype == torch.uint8 else rows.to(arithmetic)
    return ((x - x.new_tensor(mean)) / x.new_tensor(std)).flatten(2).to(dtype)


# --- Triton: one program per tile of rows; norm_pix_loss_image reads its targets the same way -----


@triton.jit
def patch_offsets(
    index_ptr, rows, num_rows, cols, K, grid_w, stride_b, stride_h, stride_w, stride_c,
    C: tl.constexpr, PATCH: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Where columns `cols` of patches `rows` lie in the image, [rows, cols] int64, and which exist."""
    index = tl.load(index_ptr + rows, mask=rows < num_rows, other=0).to(tl.int32)
    y, x = index // grid_w, index % grid_w
    image = (rows // K).to(tl.int64)  # B * H * W * C passes 2**31 at 14k images of 224 x 224 x 3
    corner = image * stride_b + y.to(tl.int64) * PATCH * stride_h + x.to(tl.int64) * PATCH * stride_w
    line = (cols // (PATCH * C)).to(tl.int64)
    within = cols % (PATCH * C)
    if DENSE:  # a line of a patch is one run of memory: said so that the loads become vectors
        pixel = within.to(tl.int64)
    else:
        pixel = (within // C).to(tl.int64) * stride_w + (within % C).to(tl.int64) * stride_c
    offsets = corner[:, None] + (line * stride_h + pixel)[None, :]
    return offsets, (rows < num_rows)[:, None] & (cols < PATCH * PATCH * C)[None, :]


@triton.jit
def per_channel(cols, VALUES: tl.constexpr, C: tl.constexpr):
    """`VALUES[channel]` of each column, fp32."""
    channel = cols % C
    out = tl.full(cols.shape, VALUES[0], tl.float32)
    for c in tl.static_range(1, C):
        out = tl.where(channel == c, VALUES[c], out)
    return out


@triton.jit
def load_patches(
    image_ptr, index_ptr, rows, num_rows, cols, K, grid_w, stride_b, stride_h, stride_w, stride_c,
    C: tl.constexpr, PATCH: tl.constexpr, DENSE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Normalized pixels of the tile, [rows, cols] fp32, and which exist."""
    offsets, exist = patch_offsets(
        index_ptr, rows, num_rows, cols, K, grid_w, stride_b, stride_h, stride_w, stride_c, C, PATCH, DENSE
    )
    v = tl.load(image_ptr + offsets, mask=exist, other=0).to(tl.float32)
    return v * per_channel(cols, SCALE, C)[None, :] + per_channel(cols, SHIFT, C)[None, :], exist


@triton.jit
def _tile(P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows and columns; programs side by side take the columns of the same rows."""
    CHUNKS: tl.constexpr = (P + COLS - 1) // COLS
    pid = tl.program_id(0)
    return pid // CHUNKS * ROWS + tl.arange(0, ROWS), pid % CHUNKS * COLS + tl.arange(0, COLS)


@triton.jit
def _forward_kernel(
    image_ptr, index_ptr, out_ptr, num_rows, K, grid_w, stride_b, stride_h, stride_w, stride_c,
    C: tl.constexpr, PATCH: tl.constexpr, DENSE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = PATCH * PATCH * C
    rows, cols = _tile(P, ROWS, COLS)
    x, exist = load_patches(
        image_ptr, index_ptr, rows, num_rows, cols, K, grid_w, stride_b, stride_h, stride_w, stride_c,
        C, PATCH, DENSE, SCALE, SHIFT,
    )  # fmt: skip
    out = out_ptr + rows.to(tl.int64)[:, None] * P + cols[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=exist)


@triton.jit
def _backward_kernel(
    dout_ptr, index_ptr, dimage_ptr, num_rows, K, grid_w, stride_b, stride_h, stride_w, stride_c,
    C: tl.constexpr, PATCH: tl.constexpr, DENSE: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = PATCH * PATCH * C
    rows, cols = _tile(P, ROWS, COLS)
    offsets, exist = patch_offsets(
        index_ptr, rows, num_rows, cols, K, grid_w, stride_b, stride_h, stride_w, stride_c, C, PATCH, DENSE
    )
    dout = dout_ptr + rows.to(tl.int64)[:, None] * P + cols[None, :]
    dx = tl.load(dout, mask=exist, other=0.0).to(tl.float32)
    tl.atomic_add(dimage_ptr + offsets, dx * per_channel(cols, SCALE, C)[None, :], mask=exist, sem="relaxed")


def image_layout(image: Tensor, patch: int) -> dict[str, int | bool]:
    """The kernels' arguments that say how a [B, H, W, C] image lies in memory."""
    W, C = image.shape[2:]
    strides = dict(zip(("stride_b", "stride_h", "stride_w", "stride_c"), image.stride(), strict=True))
    dense = image.stride(3) == 1 and image.stride(2) == C
    return {"grid_w": W // patch, **strides, "C": C, "PATCH": patch, "DENSE": dense}


def affine(image_dtype: torch.dtype, mean: Sequence[float], std: Sequence[float]) -> dict[str, tuple]:
    """Per channel `SCALE * v + SHIFT` is `(v / 255 - mean) / std`, without the 255 for floats."""
    top = 255.0 if image_dtype == torch.uint8 else 1.0
    scale = tuple(1.0 / (top * s) for s in std)
    return {"SCALE": scale, "SHIFT": tuple(-m / s for m, s in zip(mean, std, strict=True))}


def _grid(num_rows: int, P: int, values: int) -> tuple[tuple[int], dict[str, int]]:
    cols = min(256, triton.next_power_of_2(P))
    tile = {"ROWS": values // cols, "COLS": cols}
    return (triton.cdiv(num_rows, tile["ROWS"]) * triton.cdiv(P, cols),), tile


def launch_forward(
    image: Tensor, index: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    (B, K), P = index.shape, patch * patch * image.shape[3]
    out = torch.empty(B, K, P, dtype=dtype, device=image.device)
    grid, tile = _grid(B * K, P, TILE)
    layout = image_layout(image, patch) | affine(image.dtype, mean, std)
    _forward_kernel[grid](image, index.contiguous(), out, B * K, K, **layout, **tile)
    return out


def launch_backward(
    dout: Tensor, index: Tensor, shape: Sequence[int], dtype: torch.dtype, patch: int, std: Sequence[float]
) -> Tensor:
    B, K, P = dout.shape
    dimage = torch.zeros(shape, dtype=torch.float32, device=dout.device)
    grid, tile = _grid(B * K, P, TILE_BACK)
    layout = image_layout(dimage, patch) | {"SCALE": tuple(1.0 / s for s in std)}
    _backward_kernel[grid](dout.contiguous(), index.contiguous(), dimage, B * K, K, **layout, **tile)
    return dimage.to(dtype)


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::gather_patches", mutates_args=(), device_types="cuda")
def _op(
    image: Tensor, index: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    if debugging():
        check_index(index, image, patch)
    return launch_forward(image, index, patch, mean, std, dtype)


@_op.register_kernel("cpu")
def _(image, index, patch, mean, std, dtype):
    check_index(index, image, patch)
    if native.ready():
        per_channel = affine(image.dtype, mean, std).values()
        return torch.ops.fastmim.native_gather_patches(image, index, patch, *per_channel, dtype)
    return gather_patches_reference(image, index, patch, mean, std, dtype).contiguous()


@_op.register_fake
def _(image, index, patch, mean, std, dtype):
    return image.new_empty(*index.shape, patch * patch * image.shape[3], dtype=dtype)


@torch.library.custom_op("fastmim::gather_patches_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dout: Tensor, index: Tensor, shape: Sequence[int], dtype: torch.dtype, patch: int, std: Sequence[float]
) -> Tensor:
    return launch_backward(dout, index, shape, dtype, patch, std)


@_op_backward.register_kernel("cpu")
def _(dout, index, shape, dtype, patch, std):
    if native.ready():
        scale = [1.0 / s for s in std]
        return torch.ops.fastmim.native_gather_patches_backward(dout, index, shape, dtype, patch, scale)
    B, H, W, C = shape
    drows_BKqC = dout.float().unflatten(2, (-1, C)) / torch.tensor(std)
    dcells = torch.zeros(B, (H // patch) * (W // patch), patch * patch * C)
    dcells.scatter_add_(1, index[..., None].expand_as(dout), drows_BKqC.flatten(2))
    dcells = dcells.unflatten(1, (H // patch, W // patch)).unflatten(3, (patch, patch, C))
    return dcells.transpose(2, 3).reshape(shape).to(dtype)


@_op_backward.register_fake
def _(dout, index, shape, dtype, patch, std):
    return dout.new_empty(shape, dtype=dtype)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    image, index, ctx.patch, _, ctx.std, _ = inputs
    ctx.shape, ctx.dtype = image.shape, image.dtype
    ctx.save_for_backward(index)


def _backward(ctx, dout: Tensor | None):
    dimage = None
    if ctx.needs_input_grad[0] and dout is not None:
        dimage = _op_backward(dout, *ctx.saved_tensors, ctx.shape, ctx.dtype, ctx.patch, ctx.std)
    return dimage, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- public function -------------------------------------------------------------------------------


def check_index(index_BK: Tensor, image_BHWC: Tensor, patch: int) -> None:
    """ValueError for an index that names no patch. Reads the values: CUDA has to wait."""
    count = (image_BHWC.shape[1] // patch) * (image_BHWC.shape[2] // patch)
    if index_BK.numel() and not 0 <= index_BK.min() <= index_BK.max() < count:
        raise ValueError(f"want patch indices in [0, {count}), got {index_BK.min()} .. {index_BK.max()}")


def check_image(
    image_BHWC: Tensor, index_BK: Tensor, patch: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    """ValueError unless image, index, patch and statistics fit together."""
    if image_BHWC.ndim != 4 or image_BHWC.dtype not in (torch.uint8, *FLOATS):
        raise ValueError(
            f"want [B, H, W, C] of uint8 or floats, got {tuple(image_BHWC.shape)} {image_BHWC.dtype}"
        )
    B, H, W, C = image_BHWC.shape
    if patch < 1 or H % patch or W % patch:
        raise ValueError(f"want H and W multiples of the patch, got {H} x {W} and {patch}")
    if index_BK.ndim != 2 or index_BK.shape[0] != B or index_BK.dtype != torch.int64:
        raise ValueError(f"want index int64 [{B}, K], got {index_BK.dtype} {tuple(index_BK.shape)}")
    if index_BK.device != image_BHWC.device:
        raise ValueError(f"want one device, got {image_BHWC.device} and {index_BK.device}")
    if len(mean) != C or len(std) != C or min(std, default=1.0) <= 0:
        raise ValueError(f"want mean and positive std of {C} channels, got {tuple(mean)}, {tuple(std)}")


def gather_patches(
    image_BHWC: Tensor,
    index_BK: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalized rows of the chosen patches. `[B, H, W, C], [B, K] -> [B, K, P]` in `dtype`.

    Any strides: a channels-first batch comes as `permute(0, 2, 3, 1)`. Differentiable in a floating
    image; an index may repeat. ValueError when sizes, dtypes or statistics do not fit.
    """
    check_image(image_BHWC, index_BK, patch, mean, std)
    if dtype not in FLOATS:
        raise ValueError(f"want rows of fp32, bf16 or fp16, got {dtype}")
    return _op(image_BHWC, index_BK, patch, mean, std, dtype)
