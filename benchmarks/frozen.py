"""Every method pre-trained alike on small images; then what its frozen features are worth.

python -m benchmarks.frozen CIFAR10 --steps 400          CIFAR10 holds train/CLASS/*.* and test/CLASS/*.*

Question   does each objective teach the encoder something, on a budget of minutes, and does any of them
           collapse on the way?
Expected   each clearly above its own encoder with first weights, in one probe at least; feature_std well
           above 0 throughout.
How        the real command for each, recipe cifar10 (ViT-Ti, patch 4; batch norm in C-MAE's heads), with one
           batch, rate and length for all; then what `fastmim knn` and `fastmim ridge` do, on whole images.
           BEiT and CAE predict codes of k-means, which is trained first. Teachers whose published momentum
           is that of runs a thousand times as long follow faster, see SHORT.
           The health of the features is that of fastmim/methods/health.py: deviation of unit vectors times
           sqrt(D), effective rank. NAME:VARIANT trains a variant: cmae:mask is C-MAE without colors.

A row per method in benchmarks/results/frozen.jsonl as soon as it is read, with its curves, and frozen.png of
all rows that were trained alike: what was read, and of each run its loss and health. So methods can be run
one by one. `--name` gives another pair of files their name.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.provenance import DEVICE, RESULTS, ROOT, append, environment
from fastmim.commands.evaluate import labeled_features
from fastmim.engine.pictures import read_metrics, smoothed
from fastmim.evals.knn import knn
from fastmim.evals.ridge import ridge
from fastmim.interop.encoders import load_encoder
from fastmim.interop.metadata import encoder_metadata
from fastmim.methods import METHODS
from fastmim.methods.health import spread
from fastmim.methods.tokens import TokensConfig
from fastmim.recipes import METHOD_RECIPES, SCALES

FIRST = "first weights of "
PROBES = ("knn", "ridge")
K = 20
EMA = ("--method.ema", "0.99")
SHORT = {"cmae_huang": EMA, "ibot": EMA, "data2vec": EMA, "dino": EMA}  # a teacher that moves within the run
TOKENIZER = "kmeans"
POINTS = 120  # of a curve that are kept
HEALTH = ("feature_std", "token_accuracy", "accuracy")  # the first that a run logs


def train(name: str, run_dir: Path, data: Path, flags: Sequence[str]) -> None:
    """One run by the real command; a run directory that is finished is left as it is."""
    if (run_dir / "encoder.safetensors").exists():
        return
    method, _, variant = name.partition(":")
    command = [sys.executable, "fastmim/train.py", "--method", method, "--recipe", "cifar10"]
    command += ["--variant", variant] if variant else []
    command += ["--data.path", str(data / "train"), "--run-dir", str(run_dir), *flags]
    command += SHORT.get(name, ())
    if issubclass(METHODS[method], TokensConfig):
        command += ["--method.tokenizer", str(tokenizer(run_dir.with_name(TOKENIZER), data))]
    if any((run_dir / "checkpoints").glob("step-*")):
        command += ["--resume"]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def tokenizer(run_dir: Path, data: Path) -> Path:
    """A run of k-means on the same images, made once: seconds."""
    if not (run_dir / "tokenizer.safetensors").exists():
        command = [sys.executable, "fastmim/train.py", "--method", TOKENIZER, "--recipe", "cifar10"]
        command += ["--data.path", str(data / "train"), "--run-dir", str(run_dir), "--data.cache", "ram"]
        command += ["--steps", "150", "--batch", "128"]
        subprocess.run(command, cwd=ROOT, check=True)
    return run_dir


def first_weights(name: str, path: Path) -> None:
    """The encoder of a method's run as it begins: first weights differ as much as what is made of them."""
    from safetensors.torch import save_file

    run = SCALES["cifar10"](METHOD_RECIPES[name.partition(":")[0]]())
    method = replace(run.method, tokenizer=None) if isinstance(run.method, TokensConfig) else run.method
    torch.manual_seed(run.seed)
    encoder = method.build(run.model).encoder
    state = {key: value for key, value in encoder.state_dict().items() if key != "mask_token"}
    save_file(state, path, encoder_metadata(run.model))


def read(encoder: Path, data: Path, most: int, threads: int) -> dict[str, Any]:
    """Accuracies of both features, and the health of the test images'."""
    model = load_encoder(encoder)
    how: dict[str, Any] = {"fraction": 1.0, "most": most, "device": torch.device(DEVICE), "threads": threads}
    known, labels, _ = labeled_features(model, data / "train", **how)
    asked, truth, _ = labeled_features(model, data / "test", **how)
    row: dict[str, Any] = {"train_images": len(labels), "test_images": len(truth)}
    for feature in known:
        both = known[feature], labels, asked[feature], truth
        row[f"{feature}/knn"] = dict(knn(*both, (K,)))[f"knn_{K}"]
        row[f"{feature}/ridge"] = dict(ridge(*both))["ridge"]
        unit = F.normalize(asked[feature], dim=1)[:, None]
        std, rank = spread(unit, torch.ones(unit.shape[:2], device=unit.device))
        row[f"{feature}/std"], row[f"{feature}/rank"] = float(std), float(rank)
    return row


def read_once(runs: Path, encoder: Path, data: Path, most: int, threads: int) -> dict[str, Any]:
    """What `read` says, kept among the runs: reading takes minutes, and may be interrupted like training."""
    model = load_encoder(encoder)
    digest = hashlib.sha256(f"{data.absolute()} {most} {model.config}".encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    kept = runs / f"read-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        row = read(encoder, data, most, threads)
        kept.with_suffix(".new").write_text(json.dumps(row))
        kept.with_suffix(".new").replace(kept)
    return json.loads(kept.read_text())


def curves(run: Path) -> dict[str, list[float]]:
    """Loss and health of a run, smoothed, at `POINTS` of its steps."""
    steps, values = read_metrics(run / "metrics.jsonl")
    found = next((metric for metric in HEALTH if metric in values), None)
    names = ["loss"] + ([found] if found else [])
    at = np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int))
    thinned = {name: [round(float(x), 5) for x in smoothed(values[name], 15)[at]] for name in names}
    return {"step": steps[at].tolist()} | thinned


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracies of all, and a panel for each run: its loss, and what it logs of its health."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    runs = {name: row["curves"] for name, row in rows.items() if not name.startswith(FIRST)}
    columns = min(4, len(runs))
    lines = math.ceil(len(runs) / columns)
    figure = plt.figure(figsize=(4.2 + 2.9 * columns, max(3.2, 2.3 * lines)), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(4.2, 2.9 * columns))
    bars, panels = parts
    draw_bars(bars.subplots(), rows)
    axes = panels.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, curve) in zip(axes, runs.items(), strict=False):
        axis.plot(curve["step"], curve["loss"], color="C0")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        for metric in curve.keys() & set(HEALTH):
            other = axis.twinx()
            other.plot(curve["step"], curve[metric], color="C1", lw=1)
            other.set_ylim(0, 1.2)
            other.tick_params(labelsize=7, colors="C1")
            other.set_ylabel(metric, fontsize=7, color="C1")
    for axis in axes[len(runs) :]:
        axis.axis("off")
    panels.supxlabel("step", fontsize=8)
    panels.supylabel("loss", fontsize=8, color="C0")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_bars(axis: Any, rows: dict[str, dict[str, Any]]) -> None:
    """The better of both features in each probe, with a mark where first weights are."""
    names = [name for name in rows if not name.startswith(FIRST)]
    for i, probe in enumerate(PROBES):
        places = [j + 0.4 * i for j in range(len(names))]
        axis.barh(places, [100 * best(rows[name], probe) for name in names], 0.36, color=f"C{i}", label=probe)
        firsts = [100 * best(rows[FIRST + name], probe) for name in names]
        axis.plot(firsts, places, "|", color="black", ms=9, mew=2)
    axis.set_yticks([j + 0.2 for j in range(len(names))], names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("frozen features, % right; | with first weights", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=7, loc="lower right")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD[:VARIANT]")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=7e-4, help="after a warm-up of a tenth of the run")
    parser.add_argument("--most", type=int, default=10_000, help="images read of each set")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "frozen", help="finished ones are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="frozen", help="of the rows and the picture in there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for every training run")
    a = parser.parse_args(arguments)
    a.runs.mkdir(parents=True, exist_ok=True)
    a.results.mkdir(parents=True, exist_ok=True)
    images = sum(1 for _ in (a.data / "train").rglob("*.*"))
    flags = ["--steps", str(a.steps), "--batch", str(a.batch), "--optim.lr", str(a.lr), "--data.cache", "ram"]
    flags += ["--optim.warmup-epochs", str(a.steps / 10 * a.batch / images), *a.flags]
    runs = {name: a.runs / name.replace(":", "-") for name in a.methods}
    results = a.results / f"{a.name}.jsonl"
    trained = {"steps": a.steps, "batch": a.batch, "lr": a.lr}
    for name, run in runs.items():
        train(name, run.absolute(), a.data.absolute(), flags)
        first = a.runs / f"first-{run.name}.safetensors"
        first_weights(name, first)
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        loss = {key: last[key] for key in sorted(last.keys() - {"step", "epoch", "seconds"})}
        for who, encoder in ((FIRST + name, first), (name, run)):
            row = read_once(a.runs, encoder, a.data, a.most, a.threads)
            of_run = {} if encoder == first else {"last": loss, "curves": curves(run)}
            append(results, {"method": who, **trained, **row} | of_run | environment())
            shown = "  ".join(f"{key} {100 * row[key]:.1f} %" for key in row if key.endswith(PROBES))
            print(f"{who:>27}  {shown}  std {row['mean/std']:.2f}  rank {row['mean/rank']:.1f}", flush=True)
    rows = rows_alike(results, trained)
    draw(rows, a.results / f"{a.name}.png")
    names = [name for name in rows if not name.startswith(FIRST)]
    above = {
        probe: [name for name in names if clearly_above(rows[name], rows[FIRST + name], probe)]
        for probe in PROBES
    }
    for probe, clear in above.items():
        print(f"clearly above the first weights in {probe}: {', '.join(clear) or 'none'}")
    return 0 if all(any(name in clear for clear in above.values()) for name in names) else 1


def rows_alike(results: Path, trained: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The last row of each method that was trained alike, also by earlier commands: a table may take days."""
    rows: dict[str, dict[str, Any]] = {}
    for line in results.read_text().splitlines():
        row = json.loads(line)
        alike = all(row[key] == value for key, value in trained.items())
        if alike and ("curves" in row or row["method"].startswith(FIRST)):
            rows[row["method"]] = row
    return {name: row for name, row in rows.items() if name.removeprefix(FIRST) in rows}


def clearly_above(row: dict[str, Any], other: dict[str, Any], probe: str) -> bool:
    """By more than three standard errors of a difference of two shares of the test images."""
    a, b = best(row, probe), best(other, probe)
    return a - b > 3 * math.sqrt((a * (1 - a) + b * (1 - b)) / row["test_images"])


def best(row: dict[str, Any], probe: str) -> float:
    """Of both features."""
    return max(row[f"{feature}/{probe}"] for feature in ("cls", "mean"))


if __name__ == "__main__":
    sys.exit(main())
