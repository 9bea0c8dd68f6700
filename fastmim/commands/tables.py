"""`fastmim tables`: the runs behind the tables of arXiv:2208.04164, one after the other, and what they gave.

fastmim tables 1 3 4 8 --data CIFAR10 --out tables
fastmim tables 1 --data IMAGENET --scale full --launch "deepspeed --hostfile hosts"

DATA has train/CLASS and val/CLASS, or test/CLASS. OUT/runs holds the runs: what is finished is kept, what was
stopped goes on, and rows that share a run share it between tables. After each row OUT/table_N.md and
table_N.csv are written anew, this run's numbers beside the paper's.

    tiny    two cores: ViT of 6 blocks, 32 px. Rows of more than 100 epochs get twice the images of the others
    small   one GPU: ViT-Ti/4 of 12 blocks, 32 px
    full    the paper's: ViT-B/16 (Table 5: ViT-S/16), 224 px, its epochs; says the GPU hours first
"""

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastmim.commands.paper import COLUMNS, SCRATCH, TABLES, Row, Table
from fastmim.commands.transfer import for_train
from fastmim.engine.doctor import versions

TRAIN = Path(__file__).parents[1] / "train.py"
IMAGENET_IMAGES = 1_281_167
GPU_FLOPS = 0.45 * 989e12  # what training reaches of an H100's bf16 rate
TOKENS = ("beit", "cae")  # methods that want a tokenizer
TRANSFERS = {"FT": "finetune", "10% FT": "finetune", "linear": "linear"}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the runs of a table are: flags of every run, and images seen by each kind of them."""

    words: str
    model: tuple[str, ...]  # of every pre-training and of scratch rows
    pretrain: tuple[str, ...]
    images: int | None  # that pre-training of 100 epochs sees; None: its epochs of the set
    batch: int
    finetune: tuple[str, ...]
    finetune_images: int | None
    linear: tuple[str, ...]
    linear_images: int | None
    tokenizer: tuple[str, ...]


CIFAR = ("--recipe", "cifar10", "--data.cache", "ram")
SMALL_MODEL = ("--model.depth", "6")
SCALES: dict[str, Scale] = {
    "tiny": Scale(
        words="ViT of 6 blocks of width 192, patch 4, 32 px",
        model=SMALL_MODEL, pretrain=(*CIFAR, "--optim.lr", "7e-4"), images=32_000, batch=32,
        finetune=(*CIFAR, "--optim.lr", "1e-3", "--method.rand-augment", "0"), finetune_images=16_000,
        linear=(*CIFAR, "--optim.lr", "3.2"), linear_images=16_000,
        tokenizer=("--tokenizer", "kmeans", *CIFAR, "--steps", "150", "--batch", "128"),
    ),
    "small": Scale(
        words="ViT-Ti, patch 4, 32 px", model=(),
        pretrain=("--recipe", "cifar10", "--data.cache", "device"), images=1_000_000, batch=256,
        finetune=("--recipe", "cifar10", "--data.cache", "device"), finetune_images=500_000,
        linear=("--recipe", "cifar10", "--data.cache", "device", "--optim.lr", "6.4"), linear_images=500_000,
        tokenizer=("--tokenizer", "kmeans", "--recipe", "cifar10", "--steps", "400", "--batch", "256"),
    ),
    "full": Scale(
        words="ViT-B/16, 224 px", model=(), pretrain=("--recipe", "imagenet"), images=None, batch=0,
        finetune=("--recipe", "imagenet"), finetune_images=None, linear=("--recipe", "imagenet"),
        linear_images=None, tokenizer=("--tokenizer", "dvae_large", "--recipe", "imagenet"),
    ),
}  # fmt: skip


class Stopped(RuntimeError):
    """A run of a table did not end well."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fastmim tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", type=int, choices=sorted(TABLES), metavar="N", help="1 to 8")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row; then mean and spread (1)")
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="these rows alone")
    add_maker(parser)
    args = parser.parse_args(arguments)
    try:
        if args.seeds < 1:
            raise ValueError(f"want --seeds of at least 1, got {args.seeds}")
        maker = Maker(args, SCALES[args.scale])
        for number in args.tables:
            table = with_rows(TABLES[number], args.rows)
            if args.scale == "full":
                print(f"table {number}: about {gpu_hours(table):,.0f} GPU hours on H100s", flush=True)
            maker.make(number, table)
    except (ValueError, OSError) as error:
        parser.exit(2, f"fastmim: error: {error}\n")
    except Stopped as error:
        parser.exit(1, f"fastmim: error: {error}; the same command goes on from here\n")


def add_maker(parser: argparse.ArgumentParser) -> None:
    """What runs are made of, and where."""
    parser.add_argument("--data", type=Path, required=True, help="has train/CLASS, and val/ or test/CLASS")
    parser.add_argument("--out", type=Path, default=Path("tables"), help="runs and results (tables)")
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--tokenizer", type=Path, help="of BEiT and CAE (trained first)")
    parser.add_argument("--launch", default=None, help="what starts a run (python; deepspeed with full)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and do nothing")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for every training run")


def with_rows(table: Table, labels: Sequence[str] | None) -> Table:
    """The table with these rows alone. ValueError for a row that there is not."""
    if labels is None:
        return table
    known = {row.label: row for row in table.rows}
    if unknown := [label for label in labels if label not in known]:
        raise ValueError(f"--rows: want some of {', '.join(known)}; got {', '.join(unknown)}")
    return Table(table.title, table.columns, tuple(known[label] for label in labels))


def gpu_hours(table: Table) -> float:
    """Of a table at full scale: the arithmetic of its runs at the rate that training reaches."""
    from fastmim.methods import METHODS, suited
    from fastmim.methods.transfer import TRANSFERS as KINDS
    from fastmim.models import VITS

    total = 0.0
    for row in table.rows:
        model = VITS[row.model]
        if row.method in METHODS:
            config, own = suited(row.method, model)
            total += config.work(own).flops * row.epochs
        for column in table.columns:
            if column in TRANSFERS:
                epochs = {"linear": 90.0, "FT": 100.0, "10% FT": 10.0}[column]
                epochs = row.epochs if row.method == SCRATCH and column == "FT" else epochs
                total += KINDS[TRANSFERS[column]]().work(model).flops * epochs
    return total * IMAGENET_IMAGES / GPU_FLOPS / 3600


class Maker:
    """Makes the runs of tables, as far as they are not made."""

    def __init__(self, args: argparse.Namespace, scale: Scale):
        self.args, self.scale, self.runs = args, scale, args.out / "runs"
        self.train = args.data / "train"
        self.val = next(
            (args.data / n for n in ("val", "test") if (args.data / n).is_dir()), args.data / "val"
        )
        for folder in (self.train, self.val):
            if not folder.is_dir():
                raise ValueError(f"--data: want train/CLASS and val/CLASS or test/CLASS, got no {folder}")
        default = "deepspeed" if args.scale == "full" else sys.executable
        self.launch = shlex.split(args.launch or default)

    def make(self, number: int, table: Table) -> None:
        """Every row of a table, and what is written of them."""
        cells: dict[str, dict[str, list[float]]] = {}
        for row in table.rows:
            cells[row.label] = {}
            for seed in range(self.args.seeds):
                for column, value in self.row(row, table.columns, seed).items():
                    cells[row.label].setdefault(column, []).append(value)
            if not self.args.dry_run:
                self.write(number, table, cells)

    def row(self, row: Row, columns: Sequence[str], seed: int) -> dict[str, float]:
        """What a row's run gives in each column. Stopped where a run ends badly."""
        weights = None if row.method == SCRATCH else self.pretrained(row, seed)
        found = {}
        for column in columns:
            if column in TRANSFERS:
                found[column] = self.transferred(row, weights, column, seed)
            elif column == "PSNR" and "PSNR" in row.paper and weights is not None:
                found[column] = self.psnr(weights)
        return found

    # --- the runs -----------------------------------------------------------------------------------------

    def pretrained(self, row: Row, seed: int) -> Path:
        s = self.scale
        run_dir = self.place(row.key, seed)
        words = ["--method", row.method, *s.pretrain, *self.model_of(row), *row.flags, "--seed", str(seed)]
        words += ["--data.path", str(self.train)]
        if row.subset is not None:
            words += ["--data.subset", row.subset]
        if row.method in TOKENS:
            words += ["--method.tokenizer", str(self.args.tokenizer or self.tokenizer())]
        epoch = self.num_images
        if row.subset is not None:  # repeated, so that batches are full
            epoch = IMAGENET_IMAGES if s.images is None else max(s.images, s.batch)
            words += ["--data.epoch-images", str(epoch)]
        words += self.length(s.images, s.batch, row.epochs, epoch)
        self.run(words, run_dir, "encoder.safetensors")
        return run_dir

    def model_of(self, row: Row) -> tuple[str, ...]:
        return ("--model", row.model) if self.args.scale == "full" else self.scale.model

    def length(self, images: int | None, batch: int, epochs: float, epoch: int) -> list[str]:
        """How long a run is: its epochs, or steps in which it sees so many images; `epoch` has how many.

        Of steps a tenth warm up.
        """
        if images is None:
            return ["--epochs", f"{epochs:g}"]
        factor = 2 if epochs > 100 else 1
        steps = max(1, factor * images // batch)
        share = 0.1 * steps / max(1, epoch // batch)
        return ["--steps", str(steps), "--batch", str(batch), "--optim.warmup-epochs", f"{share:.6g}"]

    @cached_property
    def num_images(self) -> int:
        from fastmim.data import find_images

        return len(find_images(self.train))

    def tokenizer(self) -> Path:
        run_dir = self.runs / "tokenizer"
        kind = self.scale.tokenizer[1]
        words = ["--method", kind, *self.scale.tokenizer[2:], "--data.path", str(self.train)]
        self.run(words, run_dir, "tokenizer.safetensors")
        return run_dir

    def transferred(self, row: Row, weights: Path | None, column: str, seed: int) -> float:
        """Top-1 in percent at the end."""
        kind, s = TRANSFERS[column], self.scale
        run_dir = self.place(f"{row.key}-{column.replace('%', '').replace(' ', '-').lower()}", seed)
        words = [str(weights)] if weights is not None else ["--from", "scratch", *self.model_of(row)]
        words += ["--data.path", str(self.train), "--data.val", str(self.val), "--seed", str(seed)]
        words += s.linear if kind == "linear" else s.finetune
        if column == "10% FT":
            words += ["--labels", "10%"]
        images = s.linear_images if kind == "linear" else s.finetune_images
        epochs = 90.0 if kind == "linear" else row.epochs if row.method == SCRATCH else 100.0
        epoch = self.num_images // 10 if column == "10% FT" else self.num_images
        words += self.length(images, 64, epochs, epoch)
        if self.args.dry_run and weights is not None:
            given = ["--method", kind, "--init-from", *words]
        else:
            given = for_train(kind, words) or []
        self.run(given, run_dir, "model.safetensors")
        if self.args.dry_run:
            return 0.0
        last = json.loads((run_dir / "validation.jsonl").read_text().splitlines()[-1])
        return 100 * max(last[name] for name in last if name.endswith("top1"))

    def psnr(self, weights: Path) -> float:
        kept = weights / "psnr.json"
        if not kept.exists() and not self.args.dry_run:
            command = [sys.executable, "-m", "fastmim.cli", "psnr", str(weights), "--data", str(self.val)]
            command += ["--most", "2000", "--crop", "1"]
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            if said.returncode:
                raise Stopped(said.stderr.strip().removeprefix("fastmim: error: "))
            words = said.stdout.split()
            kept.write_text(json.dumps(dict(zip(words[1::3], map(float, words[2::3]), strict=True))))
        return 0.0 if self.args.dry_run else json.loads(kept.read_text())["composite"]

    def place(self, key: str, seed: int) -> Path:
        return self.runs / (key if seed == 0 else f"{key}-seed{seed}")

    def run(self, words: Sequence[str], run_dir: Path, last: str) -> None:
        """One training run by the real command, resumed if it was stopped, left alone if it is finished."""
        if (run_dir / last).exists():
            return
        command = [*self.launch, str(TRAIN)]
        if any((run_dir / "checkpoints").glob("step-*")):
            command += ["--run-dir", str(run_dir), "--resume"]
        else:
            command += [*words, "--run-dir", str(run_dir), *self.args.flags]
        print(shlex.join(command), flush=True)
        if self.args.dry_run:
            return
        code = subprocess.run(command, check=False).returncode
        if code or not (run_dir / last).exists():
            raise Stopped(f"the run in {run_dir} ended with {code}")

    # --- what is written ----------------------------------------------------------------------------------

    def write(self, number: int, table: Table, cells: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Markdown and CSV of the rows so far."""
        out = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        lines = [f"# Table {number}: {table.title}", "", self.about(table), ""]
        head = ["row", *(f"{c}, here" for c in table.columns), *(f"{c}, paper" for c in table.columns)]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        rows: list[list[Any]] = []
        for row in table.rows:
            if row.label not in cells:
                continue
            here = [cell(cells[row.label].get(column, ())) for column in table.columns]
            paper = [f"{row.paper[c]:g}" if c in row.paper else "" for c in table.columns]
            lines.append("| " + " | ".join([row.label, *here, *paper]) + " |")
            for column in table.columns:
                values = cells[row.label].get(column, ())
                rows += [
                    [number, row.label, column, i, v, row.paper.get(column, "")] for i, v in enumerate(values)
                ]
        write_whole(out / f"table_{number}.md", "\n".join(lines) + "\n")
        with (out / f"table_{number}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["table", "row", "column", "seed", "here", "paper"])
            writer.writerows(rows)
        print(f"{out / f'table_{number}.md'}: {len(cells)} of {len(table.rows)} rows", flush=True)

    def about(self, table: Table) -> str:
        """What was measured, and on what."""
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
        s, found = self.scale, versions()
        length = "the paper's epochs"
        if s.images is not None:
            length = f"{s.images:,} images of pre-training (twice as many in rows of more than 100 epochs), "
            length += f"{s.finetune_images:,} of fine-tuning, {s.linear_images:,} of probing"
        columns = "; ".join(f"{name}: {words}" for name, words in COLUMNS.items() if name in table.columns)
        return (
            f"Scale {self.args.scale}: {s.words}; {length}; {self.num_images:,} images in the set. "
            f"Linear: the better of class token and mean. {columns}. With several seeds: mean ± standard "
            f"deviation. On {device}, torch {found.get('torch')}, Python {found.get('python')}."
        )


def cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
