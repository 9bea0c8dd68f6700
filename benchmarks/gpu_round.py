"""All that one GPU is asked for, in one call: tests, kernels, whole steps, peers, JPEG to loss. 8 minutes.

python benchmarks/gpu_round.py              on a machine with a GPU
python benchmarks/gpu_round.py --quick      2 minutes: each question once, in its largest case
python benchmarks/gpu_round.py --rehearse   on a CPU with tiny shapes: does every stage run?
python benchmarks/gpu_round.py --keep rows.jsonl    appends the rows that a round brought home to results/

Each stage is a process with a time limit of its own, and none outlives the round. One that fails, is cut
short or cannot be run stops no other and is named with its reason below the table. Rows are on disk as they
come; where OUT names a folder, rows.jsonl, table.txt and log.txt are there after every stage. Needs PyTorch
and nothing else: no network, no package beside it, no installation.
"""

import os
import sys
from pathlib import Path

# Run as a script, this folder is sys.path[0], where a module of ours could hide another package.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib.util
import json
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OPS = (
    "norm_pix_loss_image", "gather_patches", "restore_tokens", "split_patches", "info_nce", "add_layer_norm",
    "bias_gelu", "gather_tokens", "color_jitter", "resized_crop", "ema_update", "attention",
)  # fmt: skip
METHODS = ("mae", "rmae")
PEERS = ("transformers_vitmae", "timm_mae", "timm_cmae")  # the package before the underscore
BUDGET_S = {"round": 470, "quick": 115, "rehearse": 55}
SKIPPED = 3  # exit status of a stage that names what it lacks
TINY = "--model vit_tiny --image-size 32 --patch 8 --decoder-size 32 1 2 --batch 8 --warmup 1 --steps 5"


@dataclass(frozen=True)
class Stage:
    """One process of the round. `needs` are modules without which it is not begun."""

    name: str
    command: tuple[str, ...]  # behind the interpreter
    limit_s: float
    needs: tuple[str, ...] = ()


@dataclass
class Round:
    """What has happened so far, and where it is written down."""

    results: Path
    deadline: float
    log: Path
    sizes: dict[Path, int] = field(default_factory=dict)  # of the row files before this round
    done: list[tuple[str, float, str]] = field(default_factory=list)  # stage, seconds, what came of it
    troubles: list[str] = field(default_factory=list)


# --- the stages -------------------------------------------------------------------------------------


def module(name: str, arguments: str) -> tuple[str, ...]:
    return ("-m", name, *arguments.split())


def tests(name: str, paths: str, limit_s: float) -> Stage:
    flags = "-q -rf -p no:cacheprovider --continue-on-collection-errors"
    return Stage(f"tests {name}", module("pytest", f"{flags} {paths}"), limit_s, needs=("pytest",))


def full(photographs: Path) -> list[Stage]:
    """In order of what is missed most if the time runs out."""
    step = "--seconds 3 --steps 30"
    stages = [
        tests("ops", "tests/ops --ignore=tests/ops/test_compile_ahead.py", 110),
        *throughput(("vit_base", "vit_large"), f"--batch 256 --sweep batch {step}", 60),
        *(Stage(f"kernel {op}", module("benchmarks.harness", op), 45) for op in OPS),
        Stage(
            "throughput mae vit_base compiled",
            module("benchmarks.throughput", f"--method mae --model vit_base --batch 512 --compile {step}"),
            75,
        ),
        *(peer(name, "--model vit_base --batch 256 --steps 40", 75) for name in PEERS),
        *jpeg(
            photographs,
            512,
            "--rounds 2 --seconds 3 --providers dataloader dali_plain dali",
            f"--model vit_base {step}",
        ),
        tests("models and methods", "tests/models tests/methods", 60),
        tests("compile ahead", "tests/ops/test_compile_ahead.py", 60),
    ]
    return stages


def quick(photographs: Path) -> list[Stage]:
    step = "--batch 512 --seconds 1.5 --steps 20"
    return [
        tests("ops", "tests/ops --ignore=tests/ops/test_compile_ahead.py -x", 40),
        *throughput(("vit_base",), step, 25),
        *(Stage(f"kernel {op}", module("benchmarks.harness", f"{op} --quick"), 20) for op in OPS),
        *(peer(name, "--model vit_base --batch 256 --steps 12 --no-compile", 25) for name in PEERS),
    ]


def rehearsal(photographs: Path) -> list[Stage]:
    return [
        Stage("a stage that fails", ("-c", "raise SystemExit('as it should')"), 10),
        Stage("a stage that hangs", ("-c", "import time; time.sleep(60)"), 0.5),
        tests("models", "tests/models/test_vit.py -k positions", 30),
        *throughput(("vit_tiny",), f"{TINY} --engine plain", 30)[:1],
        Stage("kernel", module("benchmarks.harness", f"{OPS[-1]} --quick --providers fastmim"), 30),
        *(peer(name, f"{TINY} --no-compile --engine plain", 30) for name in PEERS),
        *jpeg(photographs, 8, "--rounds 1", f"{TINY} --engine plain")[
            ::2
        ],  # the loader has a test of its own
    ]


def throughput(models: Sequence[str], flags: str, limit_s: float) -> list[Stage]:
    return [
        Stage(
            f"throughput {method} {model}",
            module("benchmarks.throughput", f"--method {method} --model {model} {flags}"),
            limit_s,
        )
        for model in models
        for method in METHODS
    ]


def peer(name: str, flags: str, limit_s: float) -> Stage:
    package = name.partition("_")[0]
    return Stage(f"peer {name}", module(f"benchmarks.peers.{name}", flags), limit_s, needs=(package,))


def jpeg(folder: Path, batch: int, loader: str, step: str) -> list[Stage]:
    """The decoders alone, then a whole step that waits for them."""
    needs = ("PIL", "nvidia.dali")
    make = module("benchmarks.pipeline.loader", f"{folder} --make {12 * batch}")
    alone = module("benchmarks.pipeline.loader", f"{folder} --batch {batch} {loader}")
    both = module("benchmarks.throughput", f"{step} --batch {batch} --data {folder}")
    return [
        Stage("photographs", make, 40, needs),
        Stage("loader", alone, 60, needs),
        Stage("jpeg to loss", both, 60, needs),
    ]


# --- running one ------------------------------------------------------------------------------------


def missing(stage: Stage) -> str | None:
    """The first module that the stage needs and this machine lacks."""
    for name in stage.needs:
        try:
            if importlib.util.find_spec(name) is None:
                return name
        except ModuleNotFoundError:  # the package around it
            return name
    return None


def run_stage(stage: Stage, r: Round) -> None:
    """Run it to its end or to its limit, and write down what came of it."""
    lacking, left = missing(stage), r.deadline - time.monotonic()
    if lacking or left < 5:
        outcome = f"skipped: {lacking} is not installed" if lacking else "skipped: no time is left"
        seconds = 0.0
    else:
        outcome, seconds = execute(stage, r, min(stage.limit_s, left))
    r.done.append((stage.name, seconds, outcome))
    if not outcome.startswith("ok"):
        r.troubles.append(f"{stage.name}: {outcome}")
    print(f"[{seconds:6.1f} s] {stage.name}: {outcome}", flush=True)


def execute(stage: Stage, r: Round, limit_s: float) -> tuple[str, float]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, *stage.command]
    if stage.command[1].startswith("benchmarks."):
        command += ["--results", str(r.results)]
    start = time.monotonic()
    with r.log.open("ab") as log:
        log.write(f"\n=== {stage.name}: python {' '.join(stage.command)}\n".encode())
        begin = log.tell()
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
        except BaseException:  # the round itself is being ended: leave nothing on the device
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    said = r.log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    return verdict(stage, status, said, limit_s), seconds


def verdict(stage: Stage, status: int | None, said: Sequence[str], limit_s: float) -> str:
    last = said[-1][:160] if said else "not a word"
    if status is None:
        return f"stopped after {limit_s:.0f} s; last: {last}"
    if stage.name.startswith("tests") and re.search(r"\d+ (passed|failed|error)", last):
        failed = [line.split(" - ")[0] for line in said if line.startswith(("FAILED ", "ERROR "))]
        return f"ok: {last}" if status == 0 else f"failed: {last}; {', '.join(failed[:12])}"
    if status == SKIPPED:
        return last
    return "ok" if status == 0 else f"failed with {status}: {last}"


# --- what it came to --------------------------------------------------------------------------------


def new_rows(r: Round) -> list[dict[str, Any]]:
    """The rows of this round, each with the name of the file it is in."""
    rows = []
    for path in sorted(r.results.glob("*.jsonl")):
        with path.open("rb") as file:
            file.seek(r.sizes.get(path, 0))
            rows += [{"file": path.name, **json.loads(line)} for line in file.read().splitlines()]
    return rows


def table(r: Round) -> str:
    """What was measured, what was done, and what was not, in a hundred columns."""
    lines = ["", "measured"]
    for row in new_rows(r):
        lines.append(f"  {described(row)}")
    lines += ["", "stages"]
    lines += [f"  {seconds:6.1f} s  {name}: {outcome[:100]}" for name, seconds, outcome in r.done]
    if r.troubles:
        lines += ["", "failed or skipped"] + [f"  {trouble}" for trouble in r.troubles]
    return "\n".join(lines) + "\n"


def described(row: dict[str, Any]) -> str:
    name = " ".join(
        str(row[key]) for key in ("op", "mode", "method", "model", "dtype", "precision") if row.get(key)
    )
    shape = " ".join(f"{k}={v}" for k, v in row.get("shape", {}).items())
    batch = f"batch {row['batch']}" if "batch" in row else ""
    head = f"{name or row['file'].removesuffix('.jsonl')} {shape or batch} {row['provider']}"
    head += "" if row.get("images", "synthetic") == "synthetic" else f" {row['images']}"
    if "failed" in row:
        return f"{head}: {row['failed']}"
    if "images_per_s" not in row:
        return f"{head}: {row['ms']:.4g} ms, {row['gb_per_s']:.4g} of {row['copy_gb_per_s']:.4g} GB/s"
    if "mfu_of_matmul" not in row:
        return f"{head}: {row['images_per_s']:.1f} img/s"
    share = f"{100 * row['mfu_of_matmul']:.1f} % of {row['matmul_tflop_per_s']:.4g} TFLOP/s"
    return f"{head}: {row['images_per_s']:.1f} img/s, {share}"


def bring_home(r: Round) -> None:
    """Three files in the folder that OUT names, if it names one."""
    if not os.environ.get("OUT"):
        return
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new_rows(r)))
    (out / "table.txt").write_text(table(r))
    (out / "log.txt").write_bytes(r.log.read_bytes())


def keep(path: Path, results: Path) -> int:
    """Append the rows of a round's rows.jsonl to the files they belong to; returns how many."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    results.mkdir(parents=True, exist_ok=True)
    for row in rows:
        with (results / Path(row.pop("file")).name).open("a") as out:
            out.write(json.dumps(row) + "\n")
    return len(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two minutes")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument(
        "--keep", type=Path, metavar="ROWS", help="append these rows to the results, and stop"
    )
    a = parser.parse_args(arguments)
    if a.keep:
        print(f"kept {keep(a.keep, a.results)} rows in {a.results}")
        return 0
    if not a.rehearse and not torch.cuda.is_available():
        parser.error("want a CUDA device, got none; --rehearse runs on a CPU")
    kind = "rehearse" if a.rehearse else "quick" if a.quick else "round"
    with tempfile.TemporaryDirectory() as scratch:
        results = a.results.absolute()
        r = Round(results, time.monotonic() + BUDGET_S[kind], Path(scratch) / "log.txt")
        r.log.touch()
        r.sizes = {path: path.stat().st_size for path in results.glob("*.jsonl")}
        stages = {"round": full, "quick": quick, "rehearse": rehearsal}[kind](Path(scratch) / "photographs")
        for stage in stages:
            run_stage(stage, r)
            bring_home(r)
        print(table(r), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
