"""`fastmim cka`: how far the features of each block stay what they were when patches are hidden.

fastmim cka runs/mae runs/rmae --data ImageNet/val --out cka

Writes cka.csv, a row for each checkpoint, layer and ratio, and cka.png and cka.pdf.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmim.commands.weights import add_reading, add_weights, check_counts, device_here, pretrained
from fastmim.data import find_images
from fastmim.data.feed.center import center_crops, spread_ids
from fastmim.evals.cka import LEAST, cka_under_occlusion
from fastmim.models.vit import Encoder

RATIOS = tuple(round(0.1 * i, 1) for i in range(1, 10))
AT = 0.7  # the ratio nearest to this is drawn over the blocks


@dataclass(frozen=True)
class Curve:
    """What one checkpoint gave. Layers are its blocks from 1, then `norm`."""

    name: str
    ratios: tuple[float, ...]
    layers: tuple[str, ...]
    values_RL: Tensor


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="fastmim cka", description=__doc__.partition("\n\n")[0])
    add_weights(parser, several=True)
    parser.add_argument("--data", type=Path, required=True, help="images, with or without labels")
    parser.add_argument("--out", type=Path, default=Path("cka"), help="files begin with this (cka)")
    parser.add_argument("--names", nargs="+", help="of the checkpoints in the figure (their paths')")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="shares hidden (0.1 ... 0.9)")
    parser.add_argument("--images", type=int, default=5000, help="evenly spaced over the set (5000)")
    parser.add_argument("--batch", type=int, default=256, help="images of which a Gram matrix is made (256)")
    parser.add_argument("--feature", choices=("mean", "cls", "tokens"), default="mean")
    parser.add_argument("--hide", choices=("drop", "mask_token", "zero_pixels"), default="drop")
    parser.add_argument("--estimator", choices=("unbiased", "biased"), default="unbiased")
    parser.add_argument("--seed", type=int, default=0, help="of what is hidden (0)")
    add_reading(parser)
    args = parser.parse_args(arguments)
    try:
        check_counts(args, "images", "batch", "workers")
        names = names_of(args.weights, args.names)
        curves = [curve(args, path, name) for path, name in zip(args.weights, names, strict=True)]
        for path in write(curves, args.out, ylabel=f"CKA, {args.feature}, {args.hide}"):
            print(path)
    except (ValueError, OSError) as error:
        parser.exit(2, f"fastmim: error: {error}\n")


def names_of(paths: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """A name for each checkpoint, each once. ValueError for another number of them."""
    if names is not None and len(names) != len(paths):
        raise ValueError(f"want a name for each of {len(paths)} checkpoints, got {len(names)}")
    found = list(names) if names is not None else [path.stem or str(path) for path in paths]
    return [name if found.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(found)]


def curve(args: argparse.Namespace, path: Path, name: str) -> Curve:
    """Every ratio of one checkpoint; prints as it goes."""
    encoder = pretrained(args, path).encoder
    if not isinstance(encoder, Encoder):
        raise ValueError(f"cka: want a vision transformer, whose patches can be hidden, got Swin in {path}")
    found = dict(
        cka_under_occlusion(
            encoder, batches(args, encoder), device_here(), ratios=args.ratios, pooled=args.feature,
            hide=args.hide, estimator=args.estimator, seed=args.seed,
        )
    )  # fmt: skip
    depth = encoder.config.depth
    layers = (*(str(i + 1) for i in range(depth)), *(["norm"] if encoder.norm is not None else []))
    values_RL = torch.stack(list(found.values())).cpu()
    for ratio, value_L in found.items():
        print(
            f"{name:>20}  {ratio:.2f} hidden  last block {value_L[depth - 1]:.3f}  lowest {value_L.min():.3f}"
        )
    return Curve(name, tuple(found), layers, values_RL)


def batches(args: argparse.Namespace, encoder: Encoder) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches alone, unless there is none: a smaller one would weigh as much as a whole one."""
    images = find_images(args.data)
    ids = spread_ids(len(images), args.images)
    least = LEAST[args.estimator]
    if len(ids) < least:
        raise ValueError(f"cka: want at least {least} images, got {len(ids)} in {args.data}")
    whole = len(ids) // args.batch * args.batch or len(ids)
    config = encoder.config
    return center_crops(
        images, config.size, ids=ids[:whole], channels=config.channels, fraction=args.crop,
        batch=min(args.batch, whole), threads=args.workers,
    )  # fmt: skip


def write(curves: Sequence[Curve], out: Path, ylabel: str) -> list[Path]:
    """The numbers, and the figure as a picture and as a PDF."""
    out.parent.mkdir(parents=True, exist_ok=True)
    table = out.with_name(f"{out.name}.csv")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["checkpoint", "layer", "ratio", "cka"])
        for one in curves:
            for ratio, value_L in zip(one.ratios, one.values_RL.tolist(), strict=True):
                for layer, value in zip(one.layers, value_L, strict=True):
                    writer.writerow([one.name, layer, ratio, f"{value:.6f}"])
    pictures = [out.with_name(f"{out.name}{suffix}") for suffix in (".png", ".pdf")]
    draw(curves, pictures, ylabel)
    return [table, *pictures]


def draw(curves: Sequence[Curve], paths: Sequence[Path], ylabel: str) -> None:
    """The last block over the ratios; the blocks at one ratio; every value of each checkpoint."""
    from fastmim.engine.pictures import no_backend_named

    with no_backend_named():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(max(7.0, 2.2 * columns), 3.0 + 1.9 * rows), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.0, 1.9 * rows))
    top, bottom = parts
    over_ratios, over_blocks = top.subplots(1, 2, sharey=True)
    for k, one in enumerate(curves):
        depth = len([layer for layer in one.layers if layer != "norm"])
        at = min(range(len(one.ratios)), key=lambda i: abs(one.ratios[i] - AT))
        style = {"color": f"C{k % 10}", "marker": "os^Dvp*"[k % 7], "markersize": 4, "linewidth": 1.4}
        over_ratios.plot(one.ratios, one.values_RL[:, depth - 1], label=one.name, **style)
        over_blocks.plot(range(1, depth + 1), one.values_RL[at, :depth], **style)
        over_blocks.set_xlabel(f"block, {one.ratios[at]:g} hidden", fontsize=9)
    over_ratios.set_xlabel("share of patches hidden, last block", fontsize=9)
    over_ratios.set_ylabel(ylabel, fontsize=9)
    over_ratios.legend(fontsize=7, frameon=False)
    for axis in (over_ratios, over_blocks):
        axis.set_ylim(min(0.0, min(float(one.values_RL.nan_to_num(0).min()) for one in curves)), 1.02)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    axes = bottom.subplots(rows, columns, squeeze=False).flatten()
    for axis, one in zip(axes, curves, strict=False):
        image = axis.imshow(one.values_RL, vmin=0, vmax=1, cmap="magma", aspect="auto", origin="lower")
        axis.set_title(one.name, fontsize=8)
        axis.set_yticks(range(len(one.ratios)), [f"{r:g}" for r in one.ratios], fontsize=6)
        step = max(1, len(one.layers) // 6)
        axis.set_xticks(range(0, len(one.layers), step), one.layers[::step], fontsize=6)
    for axis in axes[len(curves) :]:
        axis.axis("off")
    bottom.supxlabel("block", fontsize=8)
    bottom.supylabel("hidden", fontsize=8)
    bottom.colorbar(image, ax=list(axes), shrink=0.9).ax.tick_params(labelsize=7)
    for path in paths:
        figure.savefig(path)
