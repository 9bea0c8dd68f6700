"""compute-sanitizer over attention and info_nce: accesses out of bounds, races in shared memory.

-m benchmarks.gpu.sanitize              every tool over every op, at once; a row for each in sanitizer.jsonl
-m benchmarks.gpu.sanitize --op NAME    what runs under it: small shapes, forward and backward

Each tensor is an allocation of its own there: a read past its end does not fall into a block of the caching
allocator. The op is first run without the tool, which compiles its kernels and compares its values.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastmim_kernels import attention, info_nce
from fastmim_kernels.attention import attention_reference
from fastmim_kernels.info_nce import info_nce_reference
from torch import Tensor

from benchmarks.gpu.worker import ROOT
from benchmarks.harness import relative_error
from benchmarks.provenance import DEVICE, NULL, RESULTS, append, environment

TOOLS = ("memcheck", "racecheck")
TOLERANCE = 5e-2  # of the largest value, in bf16
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def attended() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the tile kernels give, and the reference on the same values."""
    got, wanted = [], []
    for segments, d in (((50,), 64), ((197,), 32), ((5, 18), 64)):
        inputs = [torch.randn(2, sum(segments), 3, d).bfloat16() for _ in range(3)]
        fused, plain = (
            partial(attention, segments=segments, backend="tile"),
            partial(attention_reference, segments=segments),
        )
        got += with_gradients(fused, inputs, DEVICE, torch.bfloat16)
        wanted += with_gradients(plain, inputs, "cpu", torch.float32)
    return tuple(got), tuple(wanted)


def contrasted() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    got, wanted = [], []
    for shape in ((37, 3, 64), (70, 256)):
        inputs = [torch.randn(shape).bfloat16() for _ in range(2)]
        got += with_gradients(lambda q, k: info_nce(q, k, temperature=0.2)[0], inputs, DEVICE, torch.bfloat16)
        wanted += with_gradients(lambda q, k: info_nce_reference(q, k, 0.2)[0], inputs, "cpu", torch.float32)
    return tuple(got), tuple(wanted)


def with_gradients(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], device: str, dtype: torch.dtype
) -> list[Tensor]:
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    out = run(*leaves)
    return [x.detach().float().cpu() for x in (out, *torch.autograd.grad(out.float().square().sum(), leaves))]


OPS = {"attention": attended, "info_nce": contrasted}


def run_op(name: str) -> int:
    torch.manual_seed(0)
    got, wanted = OPS[name]()
    error = float("nan") if NULL else relative_error(got, wanted)
    print(f"{name}: off by {error:.2g} of the largest value")
    return 0 if NULL or error <= TOLERANCE else 1


def find_sanitizer() -> str | None:
    """On the path, or in the toolkit that nvcc belongs to."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parents[1])
    places = [place for folder in folders for place in (folder / "bin", folder / "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, places))
    )


def sanitize(sanitizer: str, results: Path) -> int:
    """Every tool over every op, all at once; how many found something or failed."""
    about, own = environment(), [sys.executable, "-m", "benchmarks.gpu.sanitize", "--op"]
    told = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pipes: dict[str, Any] = {
        "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True
    }  # fmt: skip
    plain = {op: subprocess.Popen([*own, op], **pipes) for op in OPS}
    wrong = {
        op: said for op, process in plain.items() if (said := process.communicate()[0]) and process.returncode
    }
    for op, said in wrong.items():
        append(results / "sanitizer.jsonl", row(op, "no tool", said.strip().splitlines()[-1]) | about)
        print(f"FAILED {op} without a tool: {said.strip()[-400:]}", flush=True)
    bad = len(wrong)
    with ThreadPoolExecutor() as pool:
        watched = {}
        for tool, op in ((tool, op) for tool in TOOLS for op in OPS if op not in wrong):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *own, op]
            run: Any = subprocess.run
            watched[pool.submit(run, command, env=told, **pipes)] = (tool, op)
        for ended in as_completed(watched):
            tool, op = watched[ended]
            bad += judge(tool, op, ended.result(), results, about)
    return bad


def judge(tool: str, op: str, run: subprocess.CompletedProcess, results: Path, about: dict[str, Any]) -> bool:
    """Write down and say what a tool found; whether it found or failed anything."""
    found = SUMMARY.findall(run.stdout)
    last = run.stdout.strip()[-200:]
    verdict = f"{found[-1]} errors" if found else f"ended with {run.returncode}: {last}"
    bad = bool(run.returncode or not found)
    append(results / "sanitizer.jsonl", row(op, tool, verdict) | about)
    print(f"{'FAILED ' if bad else ''}{tool} {op}: {verdict}", flush=True)
    if bad:
        print(run.stdout[-6000:], flush=True)
    return bad


def row(op: str, tool: str, verdict: str) -> dict[str, str]:
    return {"op": op, "provider": tool, "verdict": verdict}


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--op", choices=OPS, help="run this one and compare its values")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    a = p.parse_args(arguments)
    if a.op:
        return run_op(a.op)
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("skipped: compute-sanitizer is neither on the path nor beside nvcc")
        return 3
    return 1 if sanitize(sanitizer, a.results) else 0


if __name__ == "__main__":
    sys.exit(main())
