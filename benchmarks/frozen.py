"""MAE, R-MAE and C-MAE pre-trained alike on small images; then what their frozen features are worth.

python -m benchmarks.frozen CIFAR10 --steps 600          CIFAR10 holds train/CLASS/*.* and test/CLASS/*.*

Question   do the three objectives of Kong & Zhang (arXiv:2208.04164) each teach the encoder something, on a
           budget of minutes, and does any of them collapse on the way?
Expected   all three clearly above the same encoder with its first weights, in one probe at least;
           feature_std near 1 throughout.
How        the real command for each, recipe cifar10 (ViT-Ti, patch 4; batch norm in C-MAE's heads), with one
           batch, rate and length for all; then what `fastmim knn` and `fastmim ridge` do, on whole images.
           The health of those features is that of fastmim/methods/health.py: deviation of unit vectors
           times sqrt(D), effective rank.
           cmae:mask is C-MAE with `--variant mask`: without colors, where the paper reports trouble.

A row per method in benchmarks/results/frozen.jsonl, and frozen.png: loss, health in training, what was read.
`--name` gives another pair of files their name.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.provenance import DEVICE, RESULTS, ROOT, append, environment
from fastmim.commands.evaluate import labeled_features, load_encoder
from fastmim.engine.pictures import read_metrics, smoothed
from fastmim.evals.knn import knn
from fastmim.evals.ridge import ridge
from fastmim.interop.metadata import encoder_metadata
from fastmim.methods.health import spread
from fastmim.models.vit import Encoder

RANDOM = "random"
PROBES = ("knn", "ridge")
K = 20


def train(name: str, run_dir: Path, data: Path, flags: Sequence[str]) -> None:
    """One run by the real command; a run directory that is finished is left as it is."""
    if (run_dir / "encoder.safetensors").exists():
        return
    method, _, variant = name.partition(":")
    command = [sys.executable, "fastmim/train.py", "--method", method, "--recipe", "cifar10"]
    command += ["--variant", variant] if variant else []
    command += ["--data.path", str(data / "train"), "--run-dir", str(run_dir), *flags]
    if any((run_dir / "checkpoints").glob("step-*")):
        command += ["--resume"]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def random_encoder(like: Path, path: Path) -> None:
    """The encoder of a run with the weights that its seed begins with."""
    from safetensors.torch import save_file

    config = load_encoder(like).config
    torch.manual_seed(0)
    save_file(Encoder(config).state_dict(), path, encoder_metadata(config))


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


def draw(runs: dict[str, Path], rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss of each run, health of those that log it, accuracies of all."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for name, run in runs.items():
        steps, values = read_metrics(run / "metrics.jsonl")
        axes[0].plot(steps, smoothed(values["loss"], 15), label=name)
        if "loss_chance" in values:
            axes[0].plot(steps, values["loss_chance"], "--", color="gray", lw=1, label=f"{name}, chance")
            axes[0].plot(steps, values["loss_floor"], ":", color="gray", lw=1, label=f"{name}, floor")
        for metric in ("feature_std", "positive_similarity", "negative_similarity"):
            if metric in values:
                axes[1].plot(steps, smoothed(values[metric], 15), label=f"{name}, {metric}")
    axes[0].set(title="loss", xlabel="step", yscale="log")
    axes[1].set(title="health of the compared features", xlabel="step")
    wanted = ["cls/knn", "mean/knn", "cls/ridge", "mean/ridge"]
    for i, (name, row) in enumerate(rows.items()):
        places = [j + i * 0.8 / len(rows) for j in range(len(wanted))]
        axes[2].bar(places, [100 * row[key] for key in wanted], 0.75 / len(rows), label=name)
    axes[2].set(title="frozen features read, % right", xticks=[j + 0.3 for j in range(len(wanted))])
    axes[2].set_xticklabels(wanted)
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--methods", nargs="+", default=["mae", "rmae", "cmae"], metavar="METHOD[:VARIANT]")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="after a warm-up of a tenth of the run")
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
    for name, run in runs.items():
        train(name, run.absolute(), a.data.absolute(), flags)
    first = a.runs / "random.safetensors"
    random_encoder(next(iter(runs.values())), first)
    rows: dict[str, dict[str, Any]] = {}
    for name, encoder in {RANDOM: first, **runs}.items():
        rows[name] = read_once(a.runs, encoder, a.data, a.most, a.threads)
        trained = {"steps": a.steps, "batch": a.batch, "lr": a.lr}
        loss = {}
        if name in runs:
            last = json.loads((runs[name] / "metrics.jsonl").read_text().splitlines()[-1])
            loss = {key: last[key] for key in sorted(last.keys() - {"step", "epoch", "seconds"})}
        append(
            a.results / f"{a.name}.jsonl",
            {"method": name, **trained, **rows[name], "last": loss} | environment(),
        )
        shown = "  ".join(
            f"{key} {100 * rows[name][key]:.1f} %" for key in rows[name] if key.endswith(PROBES)
        )
        print(
            f"{name:>8}  {shown}  std {rows[name]['mean/std']:.2f}  rank {rows[name]['mean/rank']:.1f}",
            flush=True,
        )
    draw(runs, rows, a.results / f"{a.name}.png")
    above = {
        probe: [name for name in runs if clearly_above(rows[name], rows[RANDOM], probe)] for probe in PROBES
    }
    for probe, names in above.items():
        print(f"clearly above the first weights in {probe}: {', '.join(names) or 'none'}")
    return 0 if all(any(name in names for names in above.values()) for name in runs) else 1


def clearly_above(row: dict[str, Any], other: dict[str, Any], probe: str) -> bool:
    """By more than three standard errors of a difference of two shares of the test images."""
    a, b = best(row, probe), best(other, probe)
    return a - b > 3 * math.sqrt((a * (1 - a) + b * (1 - b)) / row["test_images"])


def best(row: dict[str, Any], probe: str) -> float:
    """Of both features."""
    return max(row[f"{feature}/{probe}"] for feature in ("cls", "mean"))


if __name__ == "__main__":
    sys.exit(main())
