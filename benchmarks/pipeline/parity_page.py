"""What `parity` found, as a page to read and a picture to look at; and how fast exact colors are."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastmim_kernels import color_blur, color_jitter, sample_seeds
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.clock import quantiles, take_turns
from benchmarks.pipeline import parity_reference as reference
from benchmarks.provenance import DEVICE
from fastmim.data.augment.color import ColorDraws, draw_colors
from fastmim.views import BYOL_FIRST, SIMSIAM, Color

SIDE, CELL, GAP = 224, 112, 4
MAGNIFIED = 8
SPEED_ROUNDS = 3
COLORS: dict[str, Color] = {"color_jitter": SIMSIAM, "color_blur": BYOL_FIRST}
ALL_EXACT = """\
There is no `--data.color exact|fast`. The one kind is exact: every color above is that of Pillow or
torchvision to the last bit, on every image. All that another kind could save is what the exact ops cost:"""
NOT_EXACT = """\
There is no `--data.color exact|fast`: the one kind is to be exact. **It is not here**: a stage above that is
to be equal to the last bit is not. What the ops cost:"""
NOTES = """\
* `rows first` resizes the rows of a box and then its columns, in two calls of Pillow. torchvision makes one,
  in which Pillow 13 takes the cheaper order, columns first for most tall boxes that shrink; each pass rounds
  to bytes. In earlier releases one call is rows first too.
* Gray of a color JPEG is its Y as stored for DALI; Pillow computes it from the rounded RGB.
* PIL's Gaussian blur is three box filters, torchvision's for tensors samples the Gaussian at 23 taps: another
  blur, here for comparison."""


# --- speed --------------------------------------------------------------------------------------------


def squares(samples: Sequence[Any], count: int = 16) -> list[Image.Image]:
    """The first images, each squeezed into the size of a crop."""
    return [s.image.resize((SIDE, SIDE)) for s in samples[:count]]


def jitter(images: Tensor, d: ColorDraws) -> Tensor:
    return color_jitter(images, d.order_B4, d.factors_B4, gray_B=d.gray_B)


def blur(images: Tensor, d: ColorDraws) -> Tensor:
    return color_blur(images, d.sigmas_B)


def by_pillow(images: Sequence[Image.Image], d: ColorDraws) -> None:
    for b, image in enumerate(images):
        reference.colored(image, d, b)


def speeds(images: Tensor) -> list[dict[str, Any]]:
    """Images per second of both ops: on one core of a CPU beside torchvision on PIL images, or on the GPU."""
    keys, threads = sample_seeds(0, 0, torch.arange(len(images))), torch.get_num_threads()
    pictures = [Image.fromarray(x) for x in images.cpu().numpy()]
    rows = []
    torch.set_num_threads(1)
    try:
        for op, call in (("color_jitter", jitter), ("color_blur", blur)):
            draws = draw_colors(keys, COLORS[op])
            still = draw_colors(keys, Color(blur=1.0, sigma=COLORS[op].sigma))
            runs: dict[str, Callable[[], object]] = {"fastmim": partial(call, images, draws)}
            if DEVICE == "cpu":
                theirs = still if op == "color_blur" else draw_colors(keys, without_blur(COLORS[op]))
                runs["torchvision on PIL images"] = partial(by_pillow, pictures, theirs)
            times = take_turns(list(runs.values()), SPEED_ROUNDS)
            for provider, taken in zip(runs, times, strict=True):
                rate = [len(images) / ms * 1e3 for ms in quantiles(taken)]
                row = {"kind": "speed", "op": op, "provider": provider, "images_per_s": rate[1]}
                rows.append({**row, "images_per_s_p20": rate[2], "images_per_s_p80": rate[0]})
    finally:
        torch.set_num_threads(threads)
    return rows


def without_blur(color: Color) -> Color:
    return Color(**{**vars(color), "blur": 0.0, "solarize": 0.0})


# --- picture ------------------------------------------------------------------------------------------


def draw(pictures: Sequence[tuple[Any, ...]], path: Path) -> None:
    """The worst image of each chain: as stored, ours, the reference's, their difference times eight."""
    worst: dict[str, tuple[float, tuple[Any, ...]]] = {}
    for picture in pictures:
        chain, *_, ours, theirs = picture
        error = float(np.abs(ours.astype(np.int16) - theirs).mean())
        if chain not in worst or error > worst[chain][0]:
            worst[chain] = error, picture
    columns = ("as stored", "ours", "torchvision", f"difference x{MAGNIFIED}")
    label, head = 96, 16
    size = label + len(columns) * (CELL + GAP), head + len(worst) * (CELL + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for x, column in enumerate(columns):
        pen.text((label + x * (CELL + GAP), 2), column, fill="black")
    for y, (error, (chain, name, original, ours, theirs)) in enumerate(worst.values()):
        top = head + y * (CELL + GAP)
        pen.text((2, top + 4), f"{chain}\n{name[:9]}\nerror {error:.3f}", fill="black")
        original = original.copy()
        original.thumbnail((CELL, CELL))
        for x, cell in enumerate((original, *map(small, (ours, theirs)), difference(ours, theirs))):
            sheet.paste(cell, (label + x * (CELL + GAP), top))
    # 256 colors, without patterns: a quarter of the bytes
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def small(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BOX)


def difference(ours: np.ndarray, theirs: np.ndarray) -> Image.Image:
    """The largest difference below each pixel of the cell, eight times."""
    error = np.abs(ours.astype(np.int16) - theirs)
    each = max(1, len(error) // CELL)
    tiles = error[: CELL * each, : CELL * each].reshape(CELL, each, CELL, each, 3)
    return Image.fromarray((MAGNIFIED * tiles.max((1, 3))).clip(0, 255).astype(np.uint8))


# --- page ---------------------------------------------------------------------------------------------


def page(rows: Sequence[dict[str, Any]], env: dict[str, Any], source: str) -> str:
    """All of it in Markdown, from the rows alone."""
    of = {kind: [r for r in rows if r["kind"] == kind] for kind in ("stage", "boxes", "file", "speed")}
    exact = all(r["equal_share"] == 1 for r in of["stage"] if r["expect_equal"])
    versions = ", ".join(f"{name} {v}" for name, v in env["versions"].items() if v)
    parts = [
        "# Our pixels and those of Pillow and torchvision",
        f"Written by `python -m benchmarks.pipeline.parity`, on {of['stage'][0]['images']} images of\n"
        f"`{source}`; the rows are in `parity.jsonl`. Errors are in levels of 255. Each stage has the same\n"
        "input and the same draws on both sides.",
        "## Stage by stage",
        table(
            ("stage", "against", "equal images", "mean error", "PSNR", "worst image", "its worst value"),
            [stage_line(row) for row in of["stage"]],
        ),
        NOTES,
        "![as stored, ours, torchvision's, difference](parity.png)",
        "Above: of each chain the image with the largest mean error; black is no difference.",
        "## Where a box falls",
        *boxes_part(of["boxes"]),
        "## Kinds of file",
        "Mean and largest difference to Pillow's conversion to RGB; of 16-bit gray to its levels, scaled.",
        table(*kinds_table(of["file"])),
        "## Exact colors, and no others",
        *speed_part(of["speed"], ALL_EXACT if exact else NOT_EXACT),
        f"Measured at load {env['load']} on {env['device']}, {env['time']}, commit {env['commit']}"
        f"{' with changes' if env['dirty'] else ''}, sources {env['sources']}; {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def boxes_part(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    text = (
        "`draw_boxes` against torchvision's `RandomResizedCrop.get_params` on the sizes of these images,\n"
        f"{rows[0]['draws']:,} boxes on each side: the Kolmogorov-Smirnov distance and its p-value. Of\n"
        f"{len(rows)} tests of equal laws the smallest p is below {0.5 / len(rows):.3f} in two of five runs."
    )
    lines = [
        (
            r["law"],
            r["quantity"],
            *(f"{r[key]:.4f}" for key in ("ours", "theirs", "distance")),
            f"{r['p']:.3f}",
        )
        for r in rows
    ]
    return text, table(("boxes of", "quantity", "mean, ours", "mean, torchvision", "distance", "p"), lines)


def speed_part(rows: Sequence[dict[str, Any]], text: str) -> tuple[str, str]:
    where = "" if DEVICE == "cuda" else " of 224 px on one core"
    lines = [
        (f"`{r['op']}`", r["provider"], f"{r['images_per_s']:,.0f}",
         f"{r['images_per_s_p20']:,.0f} to {r['images_per_s_p80']:,.0f}")
        for r in rows
    ]  # fmt: skip
    return text, table(("op", "by", f"images/s{where}", "p20 to p80"), lines)


def stage_line(row: dict[str, Any]) -> tuple[str, ...]:
    share = f"{100 * row['equal_share']:.4g} %"
    if row["worst"] is None:
        return row["stage"], row["reference"], share, "0", "", "", ""
    worst = row["worst"]
    at = f"{worst['ours']} for {worst['theirs']} at {tuple(worst['at'])}"
    numbers = f"{row['mae']:.4f}", f"{row['psnr_db']:.1f} dB"
    return row["stage"], row["reference"], share, *numbers, f"{worst['image']}, {row['worst_mae']:.3f}", at


def kinds_table(rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A line for each kind, a column for each decoder."""
    names = list(dict.fromkeys(r["decoder"] for r in rows))
    lines: dict[str, dict[str, str]] = {}
    for r in rows:
        said = r["refused"] if "refused" in r else f"{r['mae']:.3f}, {r['largest']}"
        line = lines.setdefault(r["file"], {"convention": r["convention"]})
        line[r["decoder"]] = "equal" if r.get("largest") == 0 else said
    return (
        ("file", *names, "convention"),
        [(kind, *(line[n] for n in names), line["convention"]) for kind, line in lines.items()],
    )


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
