"""Launches of every kernel at the shapes of real training: batch 1,024, ViT-B and ViT-L, decoders and heads.

A case is one call of a launcher, and one or several kernels. Its op and mode are those of the rows that
`benchmarks/ops` measure, so that `forecast` finds it; bytes are the least that the op can move.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

BF16, INT64, UINT8 = torch.bfloat16, torch.int64, torch.uint8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
B, N, K, PATCH, SIDE = 1024, 196, 49, 16, 224  # images, patches, visible ones, their side, that of an image
L, P = N - K, PATCH * PATCH * 3
FromArguments = Callable[[dict[str, Any]], float]


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    op: str
    mode: str  # forward, backward, or what the rows call it
    dtype: str = "bfloat16"
    shape: dict[str, int]
    rows: tuple[str, ...]  # the sizes in `shape` with whose product time grows; the others must be equal
    bytes: int
    launch: tuple  # launcher and arguments
    # of each kernel, by the begin of its name; "" is every other one
    elements: dict[str, float | FromArguments]  # what its instructions are counted for
    flops: Mapping[str, float] = field(default_factory=dict)  # of the definition, for an element
    traffic: dict[str, float] = field(default_factory=dict)  # likewise bytes; else the case's, by elements
    turns: Mapping[str, Any] = field(default_factory=dict)  # of a program round its longest loop

    def work(self, kernel: str, arguments: dict[str, Any]) -> dict[str, float]:
        """Of one launch: elements, flops and bytes of each (0: the case's), turns of the longest loop."""
        function, found = kernel.rpartition(".")[2], {}
        for what, default in (("elements", 0), ("flops", 0), ("traffic", 0), ("turns", 1)):
            entries = getattr(self, what)
            names = [name for name in entries if function.startswith(name)]
            entry = entries[max(names, key=len)] if names else default
            found[what] = entry(arguments) if callable(entry) else entry
        return found


def cases() -> Iterator[Case]:
    yield from pixel_cases()
    for label, T, D in (
        ("ViT-B encoder", 50, 768),
        ("ViT-B, all tokens", 197, 768),
        ("ViT-L encoder", 50, 1024),
        ("decoder", 197, 512),
    ):
        yield from block_cases(label, T, D)
    yield from token_cases()
    for label, segments, H, d in (
        ("ViT-B encoder", (50,), 12, 64),
        ("ViT-B, all tokens", (197,), 12, 64),
        ("R-MAE's two views", (50, 148), 12, 64),
        ("decoder", (197,), 16, 32),
    ):
        yield from attention_cases(label, segments, H, d)
    yield from bias_cases("ViT-B, all tokens", (197,), 12, 64)
    yield from code_cases()
    yield from contrast_cases()
    yield from mask_cases()
    yield from image_cases()


def module(name: str) -> Any:
    return import_module(f"fastmim_kernels.{name}")


def new(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def pixel_cases() -> Iterator[Case]:
    """What reads patches of images, and the losses."""
    run: Any
    gather, loss, image_loss = map(module, ("gather_patches", "norm_pix_loss", "norm_pix_loss_image"))
    image, seen, scored = new(B, SIDE, SIDE, 3, dtype=UINT8), new(B, K, dtype=INT64), new(B, L, dtype=INT64)
    norm = PATCH, MEAN, STD
    values, shape = B * K * P, {"B": B, "K": K, "P": P}
    floats = new(*image.shape, dtype=torch.float32)
    for form, mode, traffic, run in (
        ("uint8", "forward", values * 3, (gather.launch_forward, image, seen, *norm, BF16)),
        ("float32", "forward", values * 6, (gather.launch_forward, floats, seen, *norm, BF16)),
        (
            "float32", "backward", values * 2 + 4 * image.numel(),
            (gather.launch_backward, new(B, K, P), seen, image.shape, torch.float32, PATCH, STD),
        ),
    ):  # fmt: skip
        yield Case(
            name=f"gather_patches {mode}, {form}", op="gather_patches", mode=mode,
            dtype=f"{form} to bfloat16", shape=shape, rows=("B",), bytes=traffic, elements={"": values},
            launch=run,
        )  # fmt: skip
    pred, shape = new(B, L, P), {"B": B, "L": L, "P": P}
    values = pred.numel()
    target, rows = (image, scored, *norm, True, 1e-6), pred.flatten(0, 1)
    dloss = new(B, L, dtype=torch.float32)
    for mode, traffic, run in (
        ("forward", 3, (image_loss.launch_forward, pred, *target)),
        ("backward", 5, (image_loss.launch_backward, dloss, pred, *target)),
    ):
        yield Case(
            name=f"norm_pix_loss_image {mode}", op="norm_pix_loss_image", mode=mode,
            dtype="bfloat16, uint8", shape=shape, rows=("B", "L"), bytes=values * traffic,
            elements={"": values}, launch=run,
        )  # fmt: skip
    plain, shape = (rows, rows, False, 1e-6), {"M": B * L, "D": P}
    for mode, traffic, run in (
        ("forward", 4, (loss.launch_forward, *plain)),
        ("backward", 8, (loss.launch_backward, dloss.flatten(), *plain, (True, True))),
    ):
        yield Case(
            name=f"norm_pix_loss {mode}, R-MAE's distance", op="norm_pix_loss", mode=mode, shape=shape,
            rows=("M",), bytes=values * traffic, elements={"": values}, launch=run,
        )  # fmt: skip


def block_cases(label: str, T: int, D: int) -> Iterator[Case]:
    """add_layer_norm and bias_gelu of one transformer block."""
    run: Any
    add_norm, gelu = map(module, ("add_layer_norm", "bias_gelu"))
    x, vector, statistic = new(B, T, D), new(D), new(B * T, dtype=torch.float32)
    saved, keep = (x, statistic, statistic, vector), new(B, dtype=torch.float32)
    share = {"": lambda a: a["SHARE"] / a["ROWS"]}
    some, all_ = (False, True, True, True, False), (True,) * 5
    forward, back = (add_norm.launch_forward, x, x, vector, vector), (add_norm.launch_backward, x, x, *saved)
    for form, mode, passes, run, turns in (
        ("plain", "forward", 4, (*forward, None, None, 1e-6), {}),
        ("plain", "backward", 4, (*back, None, None, None, BF16, some), share),
        ("scale and keep", "forward", 4, (*forward, vector, keep, 1e-6), {}),
        ("scale and keep", "backward", 6, (*back, x, vector, keep, BF16, all_), share),
    ):
        yield Case(
            name=f"add_layer_norm {mode}, {form}, {label}", op="add_layer_norm", mode=f"{mode}, {form}",
            shape={"B": B, "T": T, "D": D}, rows=("B", "T"), bytes=passes * 2 * x.numel(),
            elements={"": x.numel()}, launch=run, turns=turns,
        )  # fmt: skip
    hidden, bias = new(B * T, 4 * D), new(4 * D)
    for mode, passes, run, turns in (
        ("forward", 2, (gelu.launch_forward, hidden, bias), {}),
        ("backward", 3, (gelu.launch_backward, hidden, hidden, bias, (True, True)), share),
    ):
        yield Case(
            name=f"bias_gelu {mode}, {label}", op="bias_gelu", mode=mode, shape={"M": B * T, "D": 4 * D},
            rows=("M",), bytes=passes * 2 * hidden.numel(), elements={"": hidden.numel()}, launch=run,
            turns=turns,
        )  # fmt: skip


def token_cases() -> Iterator[Case]:
    """Tokens out of their places and back, and the teacher's average."""
    run: Any
    restore, gather, ema = map(module, ("restore_tokens", "gather_tokens", "ema_update"))
    D, T = 512, N + 1
    tokens, source, out = new(B * (K + 1), D), new(B, T, dtype=INT64), new(B, T, D)
    traffic = 2 * (out.numel() + tokens.numel()) + 8 * source.numel()
    share = {"": lambda a: a["SPLIT"] / a["ROWS"]}
    for mode, run, turns in (
        ("forward", (restore.launch_forward, tokens, source, new(D), new(T, D)), {}),
        ("backward", (restore.launch_backward, out, source, len(tokens), (True, True, False)), share),
    ):
        yield Case(
            name=f"restore_tokens {mode}", op="restore_tokens", mode=mode, rows=("B",),
            shape={"B": B, "N": T, "R": len(tokens), "D": D}, bytes=traffic, elements={"": out.numel()},
            launch=run, turns=turns,
        )  # fmt: skip
    D = 768
    every, seen, kept = new(B, N, D), new(B, K, dtype=INT64), new(B, K + 1, D)
    for mode, values, run, turns in (
        ("forward", kept, (gather.launch_forward, every, seen, new(N, D), new(D)), {}),
        ("backward", every, (gather.launch_backward, kept, seen, N, True, (True, False, False)), share),
    ):
        read = B * K * D if mode == "forward" else kept.numel()
        yield Case(
            name=f"gather_tokens {mode}", op="gather_tokens", mode=mode, rows=("B",),
            shape={"B": B, "N": N, "K": K, "D": D}, bytes=2 * (values.numel() + read) + 8 * B * K,
            elements={"": values.numel()}, launch=run, turns=turns,
        )  # fmt: skip
    for student in (torch.float32, BF16):
        # one matrix of ViT-B's MLP: the op takes all in one launch, a program for every 4,096 values
        pair = [new(768, 3072, dtype=torch.float32)], [new(768, 3072, dtype=student)], 0.996
        name = str(student).removeprefix("torch.")
        yield Case(
            name=f"ema_update, float32 of {name}", op="ema_update", mode="update", dtype=f"float32 of {name}",
            shape={"values": 768 * 3072}, rows=("values",), bytes=768 * 3072 * (8 + student.itemsize),
            elements={"": 768 * 3072}, launch=(ema.launch, *pair),
        )  # fmt: skip


def attention_cases(label: str, segments: tuple[int, ...], H: int, d: int) -> Iterator[Case]:
    """The tile kernels, on views of one tensor as a fused linear layer leaves them. An element is a logit."""
    run: Any
    tile = module("attention.tile_triton")
    T = sum(segments)
    q, k, v = new(B, T, 3, H, d).unbind(2)
    out, lse = new(B, T, H, d), new(B, H, T, dtype=torch.float32)
    tiles = {"_backward": lambda a: -(-a["length"] // a["WIDTH"]) if "WIDTH" in a else 0}
    products = {"_forward": 2, "_backward_tile": 5, "_backward_queries": 3, "_backward_keys": 4}
    products = {name: 2 * d * number for name, number in products.items()}
    for mode, passes, run in (
        ("forward", 4, (tile.launch_forward, q, k, v, segments)),
        ("backward", 8, (tile.launch_backward, out, q, k, v, out, lse, segments, (True,) * 3)),
    ):
        yield Case(
            name=f"attention {mode}, {label}", op="attention", mode=mode, rows=("B", "H"),
            shape={"B": B, "T": T, "segments": len(segments), "H": H, "d": d}, bytes=passes * 2 * out.numel(),
            elements={"": lambda a: B * H * a["count"] * a["length"] ** 2}, flops=products, launch=run,
            turns=tiles,
        )  # fmt: skip


def bias_cases(label: str, segments: tuple[int, ...], H: int, d: int) -> Iterator[Case]:
    """The tile kernels with a bias of the logits, whose gradient is a kernel of its own."""
    run: Any
    tile = module("attention.tile_triton")
    T, (n,) = sum(segments), segments
    q, k, v = new(B, T, 3, H, d).unbind(2)
    out, lse, bias = new(B, T, H, d), new(B, H, T, dtype=torch.float32), [new(H, n, n)]
    tiles = {
        "_backward_bias": lambda a: a["B"],
        "_backward": lambda a: -(-a["length"] // a["WIDTH"]) if "WIDTH" in a else 0,
    }
    products = {
        "_forward": 4 * d,
        "_backward_queries": 6 * d,
        "_backward_keys": 8 * d,
        "_backward_bias": 4 * d,
    }
    gradients = out, q, k, v, out, lse, segments
    for mode, passes, run in (
        ("forward", 4, (tile.launch_forward, q, k, v, segments, bias)),
        ("backward", 8, (tile.launch_backward, *gradients, (True,) * 3, bias)),
        ("backward of bias", 5, (tile.launch_backward_bias, *gradients, bias)),
    ):
        yield Case(
            name=f"attention with a bias {mode}, {label}", op="attention_bias", mode=mode, rows=("B", "H"),
            shape={"B": B, "T": T, "H": H, "d": d}, bytes=passes * 2 * out.numel(),
            elements={"": B * H * n**2}, flops=products, launch=run, turns=tiles,
        )  # fmt: skip


def code_cases() -> Iterator[Case]:
    """code_loss of DINO: 2 + 8 crops, 65,536 codes. An element is a logit, of student or teacher."""
    run: Any
    loss = module("code_loss_triton")
    images, codes = 128, 65536
    student, teacher = new(10 * images, codes), new(2 * images, codes)
    center, pairs = new(codes, dtype=torch.float32), new(10 * images, 2, dtype=INT64)
    lse_r, lse_u = new(10 * images, dtype=torch.float32), new(2 * images, dtype=torch.float32)
    dloss, temperatures = new(10 * images, 2, dtype=torch.float32), (0.1, 0.04)
    blocks = {
        "_teacher": lambda a: -(-a["K"] // a["BLOCK"]), "_forward": lambda a: -(-a["K"] // a["BLOCK"]),
    }  # fmt: skip
    saved = student, teacher, center, pairs
    for mode, passes, run in (
        ("forward", 1, (loss.launch_forward, *saved, *temperatures)),
        ("backward", 2, (loss.launch_backward, dloss, *saved, lse_r, lse_u, *temperatures)),
    ):
        yield Case(
            name=f"code_loss {mode}", op="code_loss", mode=mode, rows=("B",),
            shape={"B": images, "K": codes}, bytes=2 * (passes * student.numel() + teacher.numel()),
            elements={"": student.numel(), "_teacher": teacher.numel()}, traffic={"_teacher": 2}, launch=run,
            turns=blocks,
        )  # fmt: skip


def contrast_cases() -> Iterator[Case]:
    """info_nce per position and over all tokens. An element is a logit, of the norms a value."""
    nce = module("info_nce_triton")
    keys = {
        "_forward": lambda a: -(-a["G"] // a["KEYS"]),
        "_backward_keys": lambda a: -(-a["B"] // a["ROWS"]),
    }
    for form, batch, positions in (("per position", 4096, N), ("all tokens", B * N, 1)):
        D = 256
        q, rows = new(batch, positions, D), new(batch, positions, dtype=torch.float32)
        logits = batch * batch * positions
        settings = 0.2, 0, True
        for mode, run in (
            ("forward_backward", (nce.launch_forward, q, q, *settings, True)),  # queries' gradient included
            ("backward of keys", (nce.launch_backward_keys, rows, q, q, rows, rows, rows, *settings)),
        ):
            yield Case(
                name=f"info_nce {mode}, {form}", op="info_nce", mode=f"{mode}, {form}", rows=(),
                shape={"B": batch, "N": positions, "D": D}, bytes=3 * 2 * q.numel() + 8 * rows.numel(),
                elements={"": logits, "_norm": q.numel()},
                flops={"": 4 * D, "_norm": 0}, traffic={"_norm": 2}, launch=run, turns=keys,
            )  # fmt: skip


def mask_cases() -> Iterator[Case]:
    """Masks. An element is a patch; how often block_mask draws is chance: 16 tries are counted."""
    split, blocks = map(module, ("split_patches", "block_masks"))
    keys, mask, shape = new(B, dtype=INT64), new(B, N, dtype=torch.bool), {"B": B, "N": N}
    bits = {"": lambda a: 32 + a["INDEX_BITS"]}
    tries = {"": lambda a: 16}
    area = (14, 14), 16, N, (0.3, 1 / 0.3)
    for mode, size, turns, run in (
        ("patches", 8, bits, (split.launch, keys, N, K, 0)),
        ("cells", 8, bits, (split.launch, keys, N, 80, 0, 14, 2)),
        ("of a mask", 9, {}, (split.launch_mask, mask, L)),
        ("blocks", 1, tries, (blocks.launch, keys, None, 75 << 8, *area, 0, blocks.MAX_TRIES, 0)),
        ("uniform", 1, bits, (blocks.launch_uniform, keys, keys, N, 0)),
    ):
        yield Case(
            name=f"split_patches, {mode}", op="split_patches", mode=mode, shape=shape, rows=("B",),
            dtype="bool" if mode in ("blocks", "uniform") else "int64",
            bytes=B * (8 + N * size), elements={"": B * N}, launch=run, turns=turns,
        )  # fmt: skip


def image_cases() -> Iterator[Case]:
    """Photometric ops and the crop: bytes in, bytes out. An element is a byte of the view, in each pass."""
    crop, jitter, blur = map(module, ("resized_crop", "color_jitter", "color_blur"))
    images = new(B, SIDE, SIDE, 3, dtype=UINT8)
    shape, values = {"B": B, "H": SIDE, "W": SIDE, "C": 3}, images.numel()
    order, factors, flag = new(B, 4, dtype=INT64), new(B, 4, dtype=torch.float32), new(B, dtype=torch.bool)
    yield Case(
        name="color_jitter", op="color_jitter", mode="jitter", dtype="uint8", shape=shape, rows=("B",),
        bytes=2 * values, elements={"": values}, launch=(jitter.launch, images, order, factors, flag, flag),
        turns={"": lambda a: 4},  # stages
    )  # fmt: skip
    yield Case(
        name="color_blur, radius 2", op="color_jitter", mode="blur", dtype="uint8", shape=shape, rows=("B",),
        bytes=2 * values, elements={"": values},
        launch=(blur.launch, images, new(B, dtype=torch.float32), flag),
        turns={"": lambda a: 7},  # steps from -3 to 3
    )  # fmt: skip
    count, box = 64, (375, 500)
    boxes = torch.tensor([[0, 0, *box]] * count, device="cpu")
    photographs = [new(*box, 3, dtype=UINT8)] * count
    flips = torch.zeros(count, dtype=torch.bool, device="cpu")
    view = count * SIDE * SIDE * 3
    for filter in ("bicubic", "lanczos"):
        yield Case(
            name=f"resized_crop, {filter}", op="resized_crop", mode=filter, dtype="uint8", rows=("B",),
            shape={"B": count, "H": box[0], "W": box[1], "side": SIDE, "C": 3},
            bytes=count * box[0] * box[1] * 3 + view, elements={"": view, "_rows": count * box[0] * SIDE * 3},
            launch=(crop.launch, photographs, boxes, flips, SIDE, SIDE, crop.SUPPORT[filter]),
            turns={"": lambda a: a["K"]},
        )  # fmt: skip
