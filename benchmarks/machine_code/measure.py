"""Facts of every case, in two processes. A module of its own: a new process cannot look into `__main__`."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine_code.bounds import ROW
from benchmarks.machine_code.cases import cases
from benchmarks.machine_code.compiling import compiled, machine_code
from benchmarks.machine_code.facts import facts

PROCESSES = 2
FEW = 3  # cases that are done before a second process has started


def measure(name: str, sm: int, out: Path | None) -> dict[str, Any]:
    """Description and facts of one case, as the table holds them."""
    with torch.device("meta"):
        (case,) = (case for case in cases() if case.name == name)
        launcher, *arguments = case.launch
        launches = compiled(lambda: launcher(*arguments), sm)
    kernels = []
    for i, launch in enumerate(launches):
        text = machine_code(launch.kernel)
        if out:
            stem = re.sub(r"\W+", "_", f"{name} {i} {launch.name} sm_{sm}")
            (out / f"{stem}.sass").write_text(text)
            for kind in ("ptx", "ttgir"):
                (out / f"{stem}.{kind}").write_text(launch.kernel.asm[kind])
        kernels.append(facts(launch, text, sm, case.work(launch.name, launch.arguments)))
    row = {key: getattr(case, key) for key in ROW}
    return {"name": name, **row, "rows": list(case.rows), "kernels": kernels}


def measure_all(names: Sequence[str], sm: int, out: Path | None) -> Iterator[dict[str, Any]]:
    run = partial(measure, sm=sm, out=out)
    if len(names) <= FEW:
        yield from map(run, names)
        return
    with get_context("spawn").Pool(PROCESSES) as pool:
        yield from pool.imap(run, names)
