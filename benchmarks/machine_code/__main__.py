"""Compile every kernel at the shapes of training, without a GPU: is its machine code that of bounds.toml?

python -m benchmarks.machine_code                  all cases on sm_90; fails when a number is not the table's
python -m benchmarks.machine_code 'gelu|nce'       those whose names match
python -m benchmarks.machine_code --out FOLDER     leaves .sass, .ptx and .ttgir of every kernel there
python -m benchmarks.machine_code --record         writes the table anew: read the difference, then commit it
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine_code import bounds
from benchmarks.machine_code.forecast import CHIPS, TABLE, estimate, table


def lines(case: dict[str, Any], sm: int) -> Iterator[str]:
    """One for the case, and one for each kernel; forecasts, targets and products are of Hopper alone."""
    ahead = [] if sm == 90 else [f"sm_{sm}"]
    for chip in CHIPS if sm == 90 else ():
        a = estimate(case, chip)
        ahead.append(f"{chip} {a['ms']:.3f} ms, {100 * a['share']:.0f} % of bandwidth, by {a['limit']}")
    yield "   ".join((case["name"], *ahead))
    for k in case["kernels"]:
        load, store = (
            " ".join(f"{number}x{bits}" for bits, number in k[what].items()) or "-"
            for what in ("load", "store")
        )
        missed = ", ".join(f"{name} of {want}" for name, want in bounds.missed(case, k).items() if sm == 90)
        products = (
            f"  MMA/issue {k['mma']:.2f}, issued {k['mma_issued']:.2f}" if k["flops"] and sm == 90 else ""
        )
        yield (
            f"  {k['kernel']:<40} {k['registers']:>3} registers  {k['spills']} spills  "
            f"{k['blocks']:>2} blocks/SM  load {load}  store {store}  {k['barriers']} barriers  "
            f"{k['instructions']} instructions/element{products}{'  MISSES ' + missed if missed else ''}"
        )


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pattern", nargs="?", default="", help="regular expression: these cases alone")
    parser.add_argument("--sm", type=int, nargs="+", default=[90], choices=(80, 90, 100))
    parser.add_argument("--out", type=Path, help="folder for the machine code of every kernel")
    parser.add_argument("--record", action="store_true", help="write the table anew")
    a = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("want TRITON_INTERPRET unset: the interpreter compiles nothing")
    if a.record and a.sm != [90]:
        parser.error(f"want --sm 90 alone with --record, got {a.sm}")
    return a


def main(arguments: Sequence[str] | None = None) -> int:
    a = arguments_of(arguments)
    import triton

    from benchmarks.machine_code.cases import cases
    from benchmarks.machine_code.measure import measure_all

    every = [case.name for case in cases()]
    names = [name for name in every if re.search(a.pattern, name)]
    if not names:
        sys.exit(f"want a pattern that fits a case, got {a.pattern!r}; cases: {'; '.join(every)}")
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)
    known, start = table(), time.monotonic()
    found: list[Any] = []
    gone = [case["name"] for case in known["cases"] if case["name"] not in every]
    for sm in a.sm:
        measured = []
        for case in measure_all(names, sm, a.out):
            measured.append(case)
            print(*lines(case, sm), sep="\n", flush=True)
        if a.record:
            new = bounds.recorded(measured, known, triton.__version__, sm, order=every)
            TABLE.write_text(bounds.written(new))
        else:
            found += bounds.faults(measured, known, triton.__version__, sm)
    if not a.record:
        found += [f"{name}: in the table, and launched no more" for name in gone]
    if triton.__version__ != known["triton"]:
        print(f"the table is of Triton {known['triton']}, this is {triton.__version__}: hard facts alone")
    print(f"{len(names)} cases in {time.monotonic() - start:.0f} s", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
