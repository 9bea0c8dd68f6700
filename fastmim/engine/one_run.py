"""Whether the ranks that met are of one run: before the first step, for whoever meets trains together."""

import os
import socket
from typing import Any

import torch

from fastmim.engine.ranks import RankError, Ranks


def require_one_run(ranks: Ranks, facts: dict[str, Any]) -> None:
    """RankError, on all ranks, if they differ in facts of the run or versions, or two launches met on a port.

    Ranks of one node are children of one launcher.
    """
    if ranks.world == 1:
        return
    mine = {"torch": torch.__version__, **flat(facts)}
    told = ranks.gather_objects((mine, socket.gethostname(), os.getppid()))
    lines = []
    for rank, (theirs, _, _) in enumerate(told):
        for name in sorted(theirs.keys() | told[0][0].keys()):
            first, other = (known.get(name, "nothing") for known in (told[0][0], theirs))
            if first != other:
                lines.append(f"{name}: rank 0 has {first}, rank {rank} has {other}")
    launchers: dict[str, set[int]] = {}
    for _, host, parent in told:
        launchers.setdefault(host, set()).add(parent)
    for host, parents in launchers.items():
        if len(parents) > 1:
            pids = ", ".join(map(str, sorted(parents)))
            lines.append(f"{host} has ranks of several launches (processes {pids}) that met on one port")
    if lines:
        shown = [*lines[:8], *([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])]
        raise RankError("ranks: want those of one run, got ranks that differ:\n  " + "\n  ".join(shown))


def flat(facts: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Facts by their dotted names, as text."""
    found: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value)
    return found
