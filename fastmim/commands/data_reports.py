"""What `fastmim data ...` prints; each command returns its exit status."""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastmim.data.feed.sizes import bytes_as_text
from fastmim.data.feed.verify import changed_shards, verify
from fastmim.data.sources.images import Images
from fastmim.data.sources.index import index_file
from fastmim.data.sources.left_out import plain
from fastmim.data.sources.pack import PackConfig, pack_images
from fastmim.data.sources.source import MANIFEST, find_images, read_manifest
from fastmim.data.sources.stats import SAMPLE, stats

SHOWN_CLASSES = 20  # more are cut in the middle
EXAMPLES = 5


def _pack(args: Namespace) -> int:
    config = PackConfig(short_side=args.short_side, quality=args.quality, shard_mb=args.shard_mb)
    images = find_images(args.source)
    with _bar(len(images), "pack") as bar:
        manifest = pack_images(images, args.folder, config, args.workers, bar.update)
    shards = manifest["shards"]
    packed, bad = (
        sum(counts) for counts in zip(*((s["images"], len(s["bad"])) for s in shards), strict=True)
    )
    total = sum(shard["bytes"] for shard in shards)
    print(f"{packed:,} images in {len(shards)} shards, {bytes_as_text(total)}: {plain(str(args.folder))}")
    _say_left_out(images)
    if bad:
        print(f"{bad:,} bad images left out, each named in {args.folder / 'bad_samples.jsonl'}")
    return 0


def _verify(args: Namespace) -> int:
    images = find_images(args.path)
    bad = 0
    with _bar(len(images), "verify") as bar:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where a run decodes
        for sample_id, reason in verify(images, args.workers, args.decoder, device):
            bar.update(1)
            if reason is not None:
                bad += 1
                bar.write(f"{plain(images.names[sample_id])}: {plain(reason)}")
    manifest = read_manifest(images.root) if images.index.kind == "tar" else None
    changed = list(changed_shards(images.root, manifest)) if manifest else []
    for name in changed:
        print(f"{name}: not as packed: its SHA-256, or that of its index, is not the one in {MANIFEST}")
    what = f", {len(changed)} shards changed" if changed else ""
    print(f"{len(images) - bad:,} of {len(images):,} images are good, {bad:,} bad{what}")
    _say_left_out(images)
    return int(bool(bad or changed))


def _index(args: Namespace) -> int:
    start = time.perf_counter()
    images = find_images(args.path, refresh=True)
    seconds = time.perf_counter() - start
    print(f"{len(images):,} images, {_classes(images)}, indexed in {seconds:.2f} s")
    for name in images.names[:EXAMPLES]:
        print(f"  {plain(name)}")
    _say_left_out(images)
    kept = index_file(args.path)
    print(f"kept in {kept}" if kept.exists() else "not kept: it is small, or changed just now")
    return 0


def _stats(args: Namespace) -> int:
    images = find_images(args.path)
    with _bar(min(SAMPLE, len(images)), "stats") as bar:
        report = stats(images, args.workers, bar.update)
    if args.json:
        print(json.dumps(report | {"left_out": str(images.left_out)}, indent=2))
        return 0
    print(f"{len(images):,} images ({report['kind']}), {_classes(images)}")
    _say_left_out(images)
    if report["bad_in_sample"]:
        print(f"{report['bad_in_sample']} of {report['sample']} cannot be decoded: see fastmim data verify")
    if "mean" in report:
        which = "all" if report["sample"] == len(images) else f"{report['sample']:,} evenly spaced"
        print(f"of {which} images:")
        for name in ("height", "width", "short_side", "bytes"):
            x = report[name]
            print(f"  {name:<11} min {x['min']:,}  median {x['median']:,.0f}  max {x['max']:,}")
        print(f"  {'formats':<11} " + ", ".join(f"{name} {n:,}" for name, n in report["formats"].items()))
        for name in ("mean", "std"):
            print(f"  {name:<11} " + " ".join(f"{x:.4f}" for x in report[name]) + "  (R G B, 0 to 1)")
    if images.labels is not None:
        _print_classes(report["images_per_class"])
    return 0


def _print_classes(counts: dict[str, int]) -> None:
    numbers = list(counts.values())
    print(f"images per class: min {min(numbers):,}  median {np.median(numbers):,.0f}  max {max(numbers):,}")
    ranked = sorted(counts, key=lambda name: -counts[name])
    half = SHOWN_CLASSES // 2
    cut = len(ranked) > SHOWN_CLASSES
    for name in [*ranked[:half], *ranked[-half:]] if cut else ranked:
        print(f"  {counts[name]:>9,}  {plain(name)}")
    if cut:
        print(f"  the {half} largest and {half} smallest of {len(ranked):,}; --json has all")


def _classes(images: Images) -> str:
    return f"{len(images.classes):,} classes" if images.labels is not None else "no labels"


def _say_left_out(images: Images) -> None:
    if images.left_out:
        print(f"left out: {images.left_out}")


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, desc=what, unit="img", disable=None, file=sys.stderr)


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "pack": _pack,
    "verify": _verify,
    "index": _index,
    "stats": _stats,
}
