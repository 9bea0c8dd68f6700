"""Every Triton kernel compiles, without a GPU, for the GPUs it is meant for, and spills no register.

The compilations run in processes of their own, this file as a script: `@triton.jit` there must not see
TRITON_INTERPRET. `benchmarks/machine_code` looks further, at the shapes of training.
"""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path

import fastmim_kernels
import pytest
import torch

from benchmarks.machine_code.compiling import ARCHITECTURES, compiled, resources

ROOT = Path(__file__).resolve().parents[2]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# side, patch, decoder width, dtypes: ViT-B/16, ViT-H/14, a tiny ViT on images of 32 pixels
MODELS = {
    "B/16": (224, 16, 512, (BF16, FP16, FP32)),
    "H/14": (224, 14, 512, (BF16,)),
    "Ti/4": (32, 4, 192, (BF16, FP32)),
}
# width and tokens: a tiny encoder, the decoder, ViT-B and H; the widest that add_layer_norm takes
WIDTHS = {
    "width 192": (192, 17, (BF16, FP32)),
    "width 512": (512, 197, (BF16,)),
    "width 768": (768, 50, (BF16, FP16, FP32)),
    "width 1280": (1280, 50, (BF16,)),
    "width 8192": (8192, 50, (BF16, FP32)),
}
# widths of info_nce: a tiny encoder, the heads of CMAE and of C-MAE, the most
FEATURES = {192: (BF16,), 256: (BF16, FP16, FP32), 768: (BF16, FP16, FP32), 1024: (BF16, FP32)}
# of masks: CIFAR, ViT-B/16 at 224, 256, 384 and 512 pixels
GRIDS = (8, 14, 16, 24, 32)
ASPECT = 0.3, 1 / 0.3
BLOCK_FP64 = {"mul.f64", "sqrt.rn.f64", "selp.f64", "cvt.rn.f64.s64", "cvt.rzi.s32.f64"}
# segments and width of a head: MAE's encoder and decoder, R-MAE's views
HEADS = {
    "MAE": ((50,), 64, (BF16, FP16)),
    "decoder": ((197,), 32, (BF16,)),
    "R-MAE": ((50, 148), 64, (BF16,)),
}
# few rows, every number of tiles of keys, every width of the last one, at every width of a head
EVERY_HEAD = HEADS | {
    f"{length} tokens of {d}": ((length,), d, (BF16,))
    for d in (16, 24, 32, 40, 56, 64, 80, 112, 128)
    for length in (5, 30, 64, 80, 128, 180, 197, 256)
}
# all of these are minutes of compilation: `make compile-ahead`; each run of the tests takes what ViT-B takes,
# and of patches each size once and each width of an element
ALL = os.environ.get("FASTMIM_COMPILE_ALL") == "1"
ONCE = {"B/16": (BF16,), "H/14": (BF16,), "Ti/4": (FP32,)}
BLOCKS = WIDTHS if ALL else {"width 768": (768, 50, (BF16,))}
CONTRAST = FEATURES if ALL else {256: (BF16,)}
MASKS = GRIDS if ALL else (14,)
ATTENTION = EVERY_HEAD if ALL else {name: HEADS[name] for name in ("MAE", "decoder")}
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes that one program may hold
IMAGES = 64


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_and_spills_nothing(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)  # cold: what is compiled is what is here now
    # the script's folder, and not this repository's, is what Python would look into
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    halves = [
        subprocess.Popen(
            [sys.executable, __file__, half],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for half in ("0", "1")
    ]
    rows = []
    for script in halves:
        out, err = script.communicate()
        assert script.returncode == 0, err[-4000:]
        rows += [json.loads(line) for line in out.splitlines()]
    assert {row["kernel"] for row in rows} == kernels_of_the_package()
    assert {row["sm"] for row in rows} == set(ARCHITECTURES)
    assert [row for row in rows if row["STACK"] or row["LOCAL"]] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[row["sm"]] or row["tensor"] > 512] == []
    # one rounding for each fp64 operation, as the CPU does it: its weights are ours to the last bit
    weights = [row for row in rows if row["kernel"] == "resized_crop._weights_kernel"]
    assert weights and not any("fma" in operation for row in weights for operation in row["fp64"])
    assert all("div.rn.f64" in row["fp64"] for row in weights)
    lanczos = [row for row in weights if row["case"].endswith("by 3")]
    assert lanczos and all(sine_constants() <= set(row["doubles"]) for row in lanczos)
    # a line of an uint8 patch of 16 pixels is read 16 bytes at a time
    dense = [row for row in rows if row["case"] == "B/16 bfloat16 gather bytes"]
    assert dense and all(row["vector"] == 4 for row in dense)
    # a mask of blocks is the reference's bit for bit: its fp64 knows products and a root, which IEEE rounds
    # alike everywhere, and no sum to be fused; its constants came through whole, not by way of fp32
    blocks = [row for row in rows if row["case"].startswith("grid of") and "_block_kernel" in row["kernel"]]
    assert blocks and all({"mul.f64", "sqrt.rn.f64"} <= set(row["fp64"]) <= BLOCK_FP64 for row in blocks)
    assert all(block_constants() <= set(row["doubles"]) for row in blocks)


def sine_constants() -> set[str]:
    """Coefficients of the sine in Lanczos' filter, in hex."""
    series = import_module("fastmim_kernels.resized_crop").SINE.value
    return {struct.pack(">d", value).hex().upper() for value in series}


def block_constants() -> set[str]:
    """What the sides of blocks are multiplied by, in hex. The compiler multiplies the first two itself."""
    found = set()
    for lowest, top, *bits in import_module("fastmim_kernels.block_masks").side_factors(*ASPECT):
        found |= {struct.pack(">d", value).hex().upper() for value in (lowest, lowest * top, *bits)}
    return found


def kernels_of_the_package() -> set[str]:
    """Names of all functions that a launcher launches: by habit they end in `_kernel`."""
    root, names = Path(fastmim_kernels.__path__[0]), set()
    for path in root.rglob("*.py"):
        found = re.findall(r"@triton\.jit\ndef (\w*_kernel)\(", path.read_text())
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        names |= {f"{module}.{function}" for function in found}
    return names


def cases() -> Iterator[tuple]:
    """Name, launcher and arguments of every launch, at the shapes of every model."""
    gather, loss, image_loss, restore, split = (
        import_module(f"fastmim_kernels.{name}")
        for name in (
            "gather_patches", "norm_pix_loss", "norm_pix_loss_image", "restore_tokens", "split_patches"
        )
    )  # fmt: skip
    new, int64 = torch.empty, torch.int64
    yield "most patches split", split.launch, new(IMAGES, dtype=int64), split.MAX_N, split.MAX_N // 4, 0
    for model, (side, patch, width, dtypes) in MODELS.items():
        N, P = (side // patch) ** 2, patch * patch * 3
        K, L = N // 4, N - N // 4
        yield f"{model} split", split.launch, new(IMAGES, dtype=int64), N, K, 0
        seen, scored = new(IMAGES, K, dtype=int64), new(IMAGES, L, dtype=int64)
        source, bytes_ = new(IMAGES, N + 1, dtype=int64), new(IMAGES, side, side, 3, dtype=torch.uint8)
        for dtype in dtypes if ALL else ONCE[model]:
            name = f"{model} {str(dtype).removeprefix('torch.')}"
            channels_first = new(IMAGES, 3, side, side, dtype=dtype).permute(0, 2, 3, 1)
            drows, pred = new(IMAGES, K, P, dtype=dtype), new(IMAGES, L, P, dtype=dtype)
            norm = patch, MEAN, STD
            yield f"{name} gather bytes", gather.launch_forward, bytes_, seen, *norm, dtype
            yield f"{name} gather floats", gather.launch_forward, channels_first, seen, *norm, dtype
            shape = channels_first.shape
            yield f"{name} gather back", gather.launch_backward, drows, seen, shape, dtype, patch, STD
            dloss, rows = new(IMAGES, L), pred.flatten(0, 1)
            yield f"{name} loss", loss.launch_forward, rows, rows.float(), True, 1e-6
            yield f"{name} distance", loss.launch_forward, rows, rows, False, 1e-6
            back = loss.launch_backward, dloss.flatten()
            yield f"{name} loss back", *back, rows, rows.float(), True, 1e-6, (True, False)
            yield f"{name} distance back", *back, rows, rows, False, 1e-6, (True, True)
            for form in ((1, 1.0), (2, 2.0)) if ALL or name == "B/16 bfloat16" else ():
                plain = rows, rows, False, 1e-6
                yield f"{name} loss {form}", loss.launch_forward, *plain, *form
                yield f"{name} loss {form} back", *back, *plain, (True, False), *form
                target = bytes_, scored, *norm, False, 1e-6, *form
                yield f"{name} loss {form} of bytes", image_loss.launch_forward, pred, *target
                yield f"{name} loss {form} of bytes back", image_loss.launch_backward, dloss, pred, *target
            for kind, image in {"bytes": bytes_, "floats": channels_first}.items():
                target = image, scored, *norm, True, 1e-6
                yield f"{name} loss of {kind}", image_loss.launch_forward, pred, *target
                yield f"{name} loss of {kind} back", image_loss.launch_backward, dloss, pred, *target
            vectors = new(width), new(N + 1, width)
            tokens = new(IMAGES * (K + 1), width, dtype=dtype)
            yield f"{name} restore", restore.launch_forward, tokens, source, *vectors
            dout = new(IMAGES, N + 1, width, dtype=dtype)
            for needs in ((True, True, False), (True, True, True), (False, True, False)):
                yield f"{name} restore back", restore.launch_backward, dout, source, len(tokens), needs
    yield from mask_cases()
    yield from block_cases()
    yield from contrast_cases()
    yield from attention_cases()
    yield from code_cases()
    yield from crop_cases()
    yield from color_cases()


def crop_cases() -> Iterator[tuple]:
    """Launches of resized_crop: color and gray images, every filter."""
    crop = import_module("fastmim_kernels.resized_crop")
    boxes, flips = (
        torch.tensor([[0, 0, 375, 500]] * 2, device="cpu"),
        torch.tensor([True, False], device="cpu"),
    )
    for channels in (3, 1):
        images = [torch.empty(375, 500, channels, dtype=torch.uint8) for _ in range(2)]
        for support in crop.SUPPORT.values():
            yield f"crop of {channels} by {support}", crop.launch, images, boxes, flips, 224, 224, support


def mask_cases() -> Iterator[tuple]:
    """Launches of the masks that are not drawn patch by patch, with a count for all or one for each."""
    split, blocks = (import_module(f"fastmim_kernels.{name}") for name in ("split_patches", "block_masks"))
    keys, counts = (torch.empty(IMAGES, dtype=torch.int64) for _ in range(2))
    mask = torch.empty(IMAGES, split.MAX_N, dtype=torch.bool)
    yield "most patches grouped", split.launch, keys, split.MAX_N, split.MAX_N // 4, 0, 64, 2
    yield "most patches of a mask", split.launch_mask, mask, split.MAX_N // 2
    yield "most patches uniform", blocks.launch_uniform, keys, counts, split.MAX_N, 0
    # Triton compiles an argument of one in, as a constant that knows no tensor's methods
    yield "ones of blocks", blocks.launch, keys, None, 1 << 8, (2, 2), 1, 1, ASPECT, 10, 1, 1
    yield "ones of a mask", split.launch_mask, mask[:, :1], 0
    yield "ones uniform", blocks.launch_uniform, keys, counts, 1, 1
    yield "ones grouped", split.launch, keys, 4, 1, 1, 2, 2
    for side in MASKS:
        N, case = side * side, f"grid of {side}"
        yield f"{case} grouped", split.launch, keys, N, N // 4, 0, side, 2
        yield f"{case} of a mask", split.launch_mask, mask[:, :N], N // 2
        yield f"{case} uniform", blocks.launch_uniform, keys, counts, N, 0
        areas = (side, side), 16, N, ASPECT
        for name, targets, patience in (("BEiT", None, 10), ("exact", None, 0), ("iBOT", counts, 10)):
            rest = patience, blocks.MAX_TRIES, 0
            yield f"{case} {name}", blocks.launch, keys, targets, N << 8, *areas, *rest


def block_cases() -> Iterator[tuple]:
    """Launches of the ops of a transformer block, at the widths of MODELS' encoders and decoders."""
    add_norm, gelu, ema, gather = (
        import_module(f"fastmim_kernels.{name}")
        for name in ("add_layer_norm", "bias_gelu", "ema_update", "gather_tokens")
    )
    new = torch.empty
    tensors = {dtype: new(768, 3072, dtype=dtype) for dtype in (FP32, BF16, FP16)}
    for teacher, student in ((FP32, FP32), (FP32, BF16), (BF16, BF16), (FP16, FP16)):
        pair = [tensors[teacher]], [tensors[student]], 0.996
        yield f"ema {teacher} of {student}", ema.launch, *pair
    every = [(t, s) for t in tensors.values() for s in tensors.values()]
    yield "ema of every dtype", ema.launch, *([pair[i] for pair in every] for i in range(2)), 0.996
    odd = [tensors[FP32].view(-1)[1:]], [tensors[BF16].view(-1)[1:]]
    yield "ema at odd addresses", ema.launch, *odd, 0.996
    for name, (width, tokens, dtypes) in BLOCKS.items():
        for dtype in dtypes:
            case = f"{name} {str(dtype).removeprefix('torch.')}"
            rows = new(IMAGES, tokens, width, dtype=dtype)
            hidden, bias = new(IMAGES * tokens, 4 * width, dtype=dtype), new(4 * width)
            yield f"{case} gelu", gelu.launch_forward, hidden, bias
            for needs in ((True, True), (True, False)):
                yield f"{case} gelu back", gelu.launch_backward, hidden, hidden, bias, needs
            vector, keep, statistic = new(width), new(IMAGES), new(IMAGES * tokens)
            index = new(IMAGES, tokens // 4, dtype=torch.int64)
            seen = new(IMAGES, tokens // 4 + 1, width, dtype=dtype)
            yield f"{case} gather", gather.launch_forward, rows, index, new(tokens, width), vector
            yield f"{case} gather plain", gather.launch_forward, rows, index, None, None
            for needs in ((True, False, False), (True, True, True), (False, True, False)):
                yield f"{case} gather back", gather.launch_backward, seen, index, tokens, True, needs
            forward = add_norm.launch_forward, rows, rows, vector, vector
            back = add_norm.launch_backward, rows, rows, rows, statistic, statistic, vector
            yield f"{case} add norm", *forward, None, None, 1e-6
            yield f"{case} add norm scaled", *forward, vector, keep, 1e-6
            some, all_ = (False, True, True, True, False), (True,) * 5
            yield f"{case} add norm back", *back, None, None, None, dtype, some
            yield f"{case} add norm scaled back", *back, rows, vector, keep, dtype, all_


def contrast_cases() -> Iterator[tuple]:
    """Launches of info_nce: queries of one GPU, keys of four; then every token of some images."""
    nce = import_module("fastmim_kernels.info_nce_triton")
    new = torch.empty
    for width, dtypes in CONTRAST.items():
        for dtype in dtypes:
            case = f"width {width} {str(dtype).removeprefix('torch.')}"
            for name, B, G, N in (("per position", 256, 1024, 196), ("all tokens", 12544, 12544, 1)):
                q, k = new(B, N, width, dtype=dtype), new(G, N, width, dtype=dtype)
                settings = 0.2, G - B, True
                yield f"{case} {name}", nce.launch_forward, q, k, *settings, True
                if name == "per position":
                    yield f"{case} {name} loss only", nce.launch_forward, q, k, *settings, False
                    yield f"{case} {name} plain", nce.launch_forward, q, k, 0.2, 0, False, True
                    labels = new(B, N, dtype=torch.int64)
                    yield f"{case} {name} labels", nce.launch_forward, q, k, 0.2, 0, True, True, labels
                rows = new(B, N)
                saved = q, k, rows, rows, new(G, N)
                yield f"{case} {name} keys back", nce.launch_backward_keys, rows, *saved, *settings


def attention_cases() -> Iterator[tuple]:
    """Launches of the tile kernels, on views of one tensor as a fused linear layer leaves them."""
    tile = import_module("fastmim_kernels.attention.tile_triton")
    for name, (segments, d, dtypes) in ATTENTION.items():
        T, H = sum(segments), 12
        for dtype in dtypes:
            case = f"{name} {str(dtype).removeprefix('torch.')} attention"
            q, k, v = torch.empty(IMAGES, T, 3, H, d, dtype=dtype).unbind(2)
            out, lse = torch.empty(IMAGES, T, H, d, dtype=dtype), torch.empty(IMAGES, H, T)
            yield case, tile.launch_forward, q, k, v, segments
            for needs in ((True, True, True), (False, True, True)):
                yield f"{case} back", tile.launch_backward, out, q, k, v, out, lse, segments, needs
            if len(segments) > 1 and not ALL:
                continue
            biases = [torch.empty(H, n, n, dtype=dtype) for n in segments]
            back, needs = (out, q, k, v, out, lse, segments), (True, True, True)
            yield f"{case} biased", tile.launch_forward, q, k, v, segments, biases
            yield f"{case} biased back", tile.launch_backward, *back, needs, biases
            yield f"{case} bias", tile.launch_backward_bias, *back, biases


def code_cases() -> Iterator[tuple]:
    """Launches of code_loss: DINO's pairs, iBOT's, and codes that fill no block."""
    loss = import_module("fastmim_kernels.code_loss_triton")
    new = torch.empty
    half, single, other = torch.bfloat16, torch.float32, torch.float16
    for codes, pairs, dtypes in ((65536, 2, (half, single)), (8192, 1, (other,)), (1000, 5, (half,))):
        for dtype in dtypes:
            case = f"{codes} codes {str(dtype).removeprefix('torch.')}"
            student, teacher, center = new(40, codes, dtype=dtype), new(8, codes, dtype=dtype), new(codes)
            of = new(40, pairs, dtype=torch.int64)
            yield case, loss.launch_forward, student, teacher, center, of, 0.1, 0.04
            saved = student, teacher, center, of, new(40), new(8)
            yield f"{case} back", loss.launch_backward, new(40, pairs), *saved, 0.1, 0.04


def color_cases() -> Iterator[tuple]:
    """Launches of the photometric ops: photographs, one channel, channels first, a single pixel."""
    jitter, blur = (import_module(f"fastmim_kernels.{name}") for name in ("color_jitter", "color_blur"))
    new = torch.empty
    order, factors, flag = new(IMAGES, 4, dtype=torch.int64), new(IMAGES, 4), new(IMAGES, dtype=torch.bool)
    for shape in ((224, 224, 3), (32, 32, 1), (1, 1, 3), (1, 1, 1))[: None if ALL else 1]:
        images = new(IMAGES, *shape, dtype=torch.uint8)
        yield f"jitter {shape}", jitter.launch, images, order, factors, flag, flag
        yield f"blur {shape}", blur.launch, images, new(IMAGES), flag
    if not ALL:
        return
    planes = new(IMAGES, 3, 224, 224, dtype=torch.uint8).permute(0, 2, 3, 1)
    yield "jitter of planes", jitter.launch, planes, order, factors, flag, flag
    yield "blur of planes", blur.launch, planes, new(IMAGES), flag


def main(half: int) -> None:
    torch.set_default_device("meta")
    for case, launcher, *arguments in islice(cases(), half, None, 2):
        for sm in ARCHITECTURES:
            found = compiled(lambda f=launcher, a=arguments: f(*a), sm)
            assert found, f"{case}: nothing was launched"
            for launch in found:
                name, kernel = launch.name, launch.kernel
                ptx = kernel.asm["ptx"]
                widths = re.findall(r"ld\.global\S*\.v(\d)\.", ptx)
                row = {"case": case, "kernel": name, "sm": sm, **resources(kernel)}
                row |= {"shared": kernel.metadata.shared, "tensor": getattr(kernel.metadata, "tmem_size", 0)}
                row["fp64"] = sorted(set(re.findall(r"^\s*(?:@\S+\s+)?(\S*\.f64\S*)", ptx, re.MULTILINE)))
                row["doubles"] = sorted(set(re.findall(r"\b0d([0-9A-F]{16})\b", ptx)))
                print(json.dumps({**row, "vector": max(map(int, widths), default=1)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
