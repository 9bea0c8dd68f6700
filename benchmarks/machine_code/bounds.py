"""The table bounds.toml: how it is written, and what in it no longer holds.

Numbers are of one version of Triton, and exact there but for a little slack; with another version only what
must hold with each is compared: no spill, no hazard, no load or store narrower than it was.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.machine_code.forecast import GROUPS, most_instructions

EXACT = ("shared", "blocks", "load", "store", "barriers", "cp_async", "tma")
# of the number in the table
SLACK = {"instructions": 0.02, "mma": 0.05, "mma_issued": 0.05, "registers": 0.05}
ROW = ("op", "mode", "dtype", "shape", "rows", "bytes")
NARROWEST = 32  # bits; bytes one by one take many times the instructions and transactions
HEAD = """\
# Written by `python -m benchmarks.machine_code --record`, which keeps `targets` and `why` as they are here.
# One entry a kernel, of {sm} and Triton {triton}; benchmarks/README.md says how to read it.
# `known` holds the target of what misses it today: the check fails when that gets worse, and when it gets
# better. What is not known meets its target.
"""


def targets(case: Mapping[str, Any], kernel: Mapping[str, Any]) -> dict[str, float]:
    """Bits of the narrowest access at least, all else at most: by rule, or as the table's `targets` say."""
    rule = {"instructions": most_instructions(case, kernel), "narrowest": NARROWEST}
    return rule | kernel.get("targets", {})


def missed(case: Mapping[str, Any], kernel: Mapping[str, Any]) -> dict[str, float]:
    """The targets that it misses."""
    numbers = {**kernel, "narrowest": narrowest(kernel)}
    return {
        name: want
        for name, want in targets(case, kernel).items()
        if (numbers[name] < want if name == "narrowest" else numbers[name] > want)
    }


def narrowest(kernel: Mapping[str, Any]) -> int:
    """Bits of the narrowest load or store; 128 where there is none."""
    return min((int(bits) for what in ("load", "store") for bits in kernel[what]), default=128)


def faults(
    measured: Iterable[Mapping[str, Any]], table: Mapping[str, Any], triton: str, sm: int
) -> Iterator[str]:
    """A sentence for everything that does not hold."""
    known = {case["name"]: case for case in table["cases"]}
    exact = (triton, sm) == (table["triton"], table["sm"])
    for case in measured:
        entry, names = known.get(case["name"]), [kernel["kernel"] for kernel in case["kernels"]]
        if entry is None or names != [kernel["kernel"] for kernel in entry["kernels"]]:
            yield f"{case['name']}: the table knows no such launch of {', '.join(names)}"
            continue
        if any(entry[key] != case[key] for key in ROW):
            yield f"{case['name']}: the table describes another case"
        for kernel, was in zip(case["kernels"], entry["kernels"], strict=True):
            found = [*_hard_facts(kernel, was), *(_numbers(entry, kernel, was) if exact else ())]
            yield from (f"{case['name']}: {kernel['kernel']} on sm_{sm} {text}" for text in found)


def _hard_facts(kernel: Mapping[str, Any], was: Mapping[str, Any]) -> Iterator[str]:
    for what in ("spills", "hazards"):
        if kernel[what]:
            yield f"has {kernel[what]} {what}, want none"
    if narrowest(kernel) < narrowest(was):
        yield f"moves {narrowest(kernel)} bits at a time, in the table at least {narrowest(was)}"


def _numbers(case: Mapping[str, Any], kernel: Mapping[str, Any], was: Mapping[str, Any]) -> Iterator[str]:
    for what in (*EXACT, *SLACK):
        new, old = kernel[what], was[what]
        if new != old and (what in EXACT or abs(new - old) > SLACK[what] * old):
            yield f"has {what} {new}, in the table {old}"
    by_hand = {"targets": was.get("targets", {})}
    now, said = missed(case, {**kernel, **by_hand}), was.get("known", {})
    for name in sorted(now.keys() - said.keys()):
        yield f"misses its target of {name}, {now[name]}: mend it, or record it as known"
    for name in sorted(said.keys() - now.keys()):
        yield f"meets its target of {name}, {said[name]}, and is known to miss it: record that"


def recorded(
    measured: Iterable[Mapping[str, Any]], table: Mapping[str, Any], triton: str, sm: int, order: list[str]
) -> dict[str, Any]:
    """The table with new numbers, of the cases in `order`; one that was not measured stays as it was."""
    cases = {case["name"]: case for case in table["cases"]}
    for case in measured:
        old, kernels = cases.get(case["name"], {}).get("kernels", []), []
        for i, kernel in enumerate(case["kernels"]):
            by_hand = old[i] if i < len(old) and old[i]["kernel"] == kernel["kernel"] else {}
            new = kernel | {key: by_hand[key] for key in ("targets", "why") if key in by_hand}
            kernels.append(new | {"known": missed(case, new)})
        cases[case["name"]] = {**case, "kernels": kernels}
    return {"triton": triton, "sm": sm, "cases": [cases[name] for name in order if name in cases]}


def written(table: Mapping[str, Any]) -> str:
    """The table as TOML, in the groups that `forecast.table` reads."""
    lines = [HEAD.format(sm=f"sm_{table['sm']}", triton=table["triton"])]
    lines += [f"triton = {_value(table['triton'])}", f"sm = {table['sm']}"]
    for case in table["cases"]:
        row = {key: case[key] for key in ROW}
        lines += ["", "[[cases]]", f"name = {_value(case['name'])}", f"row = {_value(row)}"]
        for kernel in case["kernels"]:
            lines += ["[[cases.kernels]]", f"kernel = {_value(kernel['kernel'])}"]
            for group, keys in GROUPS.items():
                lines.append(f"{group} = {_value({key: kernel[key] for key in keys})}")
            lines += [
                f"{key} = {_value(kernel[key])}" for key in ("targets", "known", "why") if kernel.get(key)
            ]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)
