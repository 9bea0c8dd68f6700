"""`fastmim shape-bias`: where shape and texture disagree, which of the two a classifier names.

fastmim shape-bias runs/finetuned --data cue-conflict --out shape_bias

Writes shape_bias.csv, and shape_bias.png with a point for each category and a line at each mean.
"""

import argparse
import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastmim.commands.cka import names_of
from fastmim.commands.weights import add_reading, add_weights, check_counts, device_here, pretrained
from fastmim.data import find_images
from fastmim.data.feed.center import center_crops
from fastmim.evals.shape_bias import CATEGORIES, IMAGENET_CLASSES, cues_of, decisions, shape_bias
from fastmim.interop.classifier import Classifier


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fastmim shape-bias", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_weights(parser, several=True)
    parser.add_argument("--data", type=Path, required=True, help="SHAPE/SHAPEn-TEXTUREm.png, as published")
    parser.add_argument("--out", type=Path, default=Path("shape_bias"), help="files begin with this")
    parser.add_argument("--names", nargs="+", help="of the checkpoints in the figure (their paths')")
    parser.add_argument(
        "--classes", type=Path, metavar="JSON",
        help="numbers of the classifier's classes by category (ImageNet-1k's)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=64, help="images at a time (64)")
    add_reading(parser)
    args = parser.parse_args(arguments)
    try:
        check_counts(args, "batch", "workers")
        names = names_of(args.weights, args.names)
        categories = CATEGORIES if args.classes is None else read_classes(args.classes)
        found = {}
        for name, path in zip(names, args.weights, strict=True):
            found[name] = of_classifier(args, path, categories)
            print(f"{name:>20}  " + "  ".join(words(found[name])))
        for path in write(found, list(categories), args.out):
            print(path)
    except (ValueError, OSError) as error:
        parser.exit(2, f"fastmim: error: {error}\n")


def words(row: Mapping[str, float]) -> list[str]:
    shown = ("shape_bias", "shape_fraction", "texture_fraction")
    return [f"{name} {100 * row[name]:.1f} %" for name in shown] + [f"{row['images']:.0f} images"]


def read_classes(path: Path) -> dict[str, tuple[int, ...]]:
    """Categories by name, each with numbers of classes. ValueError for a file that is none."""
    try:
        found = {str(name): tuple(map(int, ids)) for name, ids in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f'--classes: want JSON as {{"cat": [281, 282], ...}}, got another in {path}'
        ) from None
    if len(found) < 2:
        raise ValueError(f"--classes: want at least two categories, got {len(found)} in {path}")
    return found


def of_classifier(
    args: argparse.Namespace, path: Path, categories: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """What `shape_bias` says of one. ValueError for one that does not have the classes."""
    classifier = Classifier(pretrained(args, path)).to(device_here()).eval()
    if args.classes is None and classifier.num_classes != IMAGENET_CLASSES:
        raise ValueError(
            f"shape-bias: not available: want a classifier of ImageNet's {IMAGENET_CLASSES} classes, got "
            f"{classifier.num_classes} in {path}; --classes says which are of which category"
        )
    images = find_images(args.data)
    shape_N, texture_N = cues_of(list(images.names), list(categories))
    config = classifier.encoder.config
    crops = center_crops(
        images, config.size, channels=config.channels, fraction=args.crop, batch=args.batch,
        threads=args.workers,
    )  # fmt: skip
    decided = [decisions(classifier(pixels.to(device_here())), categories).cpu() for pixels, _ in crops]
    return shape_bias(torch.cat(decided), shape_N, texture_N, list(categories))


def write(found: Mapping[str, Mapping[str, float]], categories: Sequence[str], out: Path) -> list[Path]:
    out.parent.mkdir(parents=True, exist_ok=True)
    table, picture = out.with_name(f"{out.name}.csv"), out.with_name(f"{out.name}.png")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = list(next(iter(found.values())))
        writer.writerow(["checkpoint", *columns])
        writer.writerows([name, *(f"{row[column]:.6g}" for column in columns)] for name, row in found.items())
    draw(found, categories, picture)
    return [table, picture]


def draw(found: Mapping[str, Mapping[str, float]], categories: Sequence[str], path: Path) -> None:
    """A row for each category, a point in it for each checkpoint; lines at what all images say."""
    from fastmim.engine.pictures import no_backend_named

    with no_backend_named():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 1.2 + 0.28 * len(categories)), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for k, (name, row) in enumerate(found.items()):
        values = [row[f"{category}/shape_bias"] for category in categories]
        color, marker = f"C{k % 10}", "os^Dvp*"[k % 7]
        axis.plot(values, range(len(categories)), marker, color=color, markersize=5, label=name, alpha=0.85)
        if not math.isnan(row["shape_bias"]):
            axis.axvline(row["shape_bias"], color=color, linewidth=1)
    axis.set_yticks(range(len(categories)), categories, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("named by texture  ←  share of decisions for shape  →  named by shape", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)
    figure.savefig(path)
