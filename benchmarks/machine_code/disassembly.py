"""Machine code as cuobjdump prints it: instructions, the longest loop, widths, and hazards of wgmma.

One line of it, its guard in front and its encoding behind:

    /*27e0*/              @!P0 STG.E.128 desc[UR6][R2.64], R8 ;              /* 0x000000080200a986 */
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)[ \t]*([^;\n]*?)[ \t]*;", re.MULTILINE
)
GLOBAL_LOADS, GLOBAL_STORES = ("LDG", "LDGSTS"), ("STG",)
SPILLS = ("LDL", "STL")
# the first operand of these is read, or says where to go
NO_RESULT = {"BAR", "BRA", "BRX", "CALL", "JMX", "NANOSLEEP", "RET", "WARPSYNC", "WARPGROUP"}
# these write a predicate and then a register; other instructions with a predicate in front write it alone
PREDICATE_FIRST = {"ATOM", "ATOMG", "ATOMS", "MATCH", "SHFL", "VOTE"}
DOUBLES = {"DADD", "DFMA", "DMUL", "CS2R"}
A_REGISTERS = 4  # of a 64 x 16 tile of half precision, 64 x 8 of tf32 or 64 x 32 of fp8, in 128 lanes


class Instruction(NamedTuple):
    address: int
    guard: str  # "!P0"; "" where it is always executed
    name: str  # "STG.E.128"
    operands: str

    @property
    def op(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.operands) if self.op == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Hazard:
    """A register that an asynchronous wgmma still uses is written before a wait (triton #9433)."""

    register: int
    wgmma: Instruction
    writer: Instruction


def parse(text: str) -> list[Instruction]:
    found = [Instruction(int(a, 16), guard, name, rest) for a, guard, name, rest in LINE.findall(text)]
    if not found:
        raise ValueError(f"want machine code as cuobjdump prints it, got {text[:80]!r}")
    return found


def longest_loop(code: list[Instruction]) -> tuple[int, int] | None:
    """Places of its first and last instruction. A branch to itself, behind the end of a kernel, is none."""
    place = {x.address: i for i, x in enumerate(code)}
    loops = [(place[x.target], i) for i, x in enumerate(code) if x.target in place and x.target < x.address]
    return max(loops, key=lambda loop: loop[1] - loop[0], default=None)


def path(code: list[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """What a warp executes once, and what it executes in each turn of the longest loop.

    From the entry to the first EXIT without a guard behind that loop: slow paths of divisions and masked
    tails stand behind it. What lies on the way counts, whichever way the branches go; an inner loop counts as
    one turn.
    """
    loop = longest_loop(code)
    start, last = loop or (0, -1)
    end = next(i for i, x in enumerate(code) if i > last and x.op == "EXIT" and not x.guard)
    return code[:start] + code[last + 1 : end + 1], code[start : last + 1]


def count(code: Iterable[Instruction], *ops: str) -> int:
    return sum(x.op in ops for x in code)


def width(x: Instruction) -> int:
    """Bits that one lane loads or stores."""
    for part in reversed(x.name.split(".")):
        if part in ("128", "64"):
            return int(part)
        if re.fullmatch(r"[US](8|16)", part):
            return int(part[1:])
    return 32


def widths(code: Iterable[Instruction], ops: tuple[str, ...]) -> dict[int, int]:
    """How many of these instructions there are of each width in bits, the widest first."""
    found = Counter(width(x) for x in code if x.op in ops)
    return {bits: found[bits] for bits in sorted(found, reverse=True)}


def results(x: Instruction) -> set[int]:
    """Numbers of the registers that it writes."""
    operands = [operand.strip() for operand in x.operands.split(",")]
    if x.op in PREDICATE_FIRST and re.fullmatch(r"U?P[T\d]", operands[0]):
        operands = operands[1:]
    first = re.fullmatch(r"R(\d+)(\.\w+)?", operands[0]) if operands else None
    if x.op in NO_RESULT or not first:
        return set()
    return set(range(int(first[1]), int(first[1]) + _number_of_results(x)))


def _number_of_results(x: Instruction) -> int:
    parts = x.name.split(".")
    if x.op == "HGMMA":
        width = re.search(r"\.64x(\d+)x", x.name)
        assert width, x.name
        return int(width[1]) // 2
    if x.op == "HMMA":
        return 4 if "F32" in parts else 2
    if x.op == "LDSM":
        return int(parts[-1]) if parts[-1] in ("2", "4") else 1
    if "128" in parts:
        return 4
    if "32" in parts:
        return 1
    return 2 if x.op in DOUBLES or {"64", "WIDE", "F64"} & set(parts) else 1


def hazards(code: list[Instruction]) -> list[Hazard]:
    """Writes into what a wgmma reads from registers, on any way from it to the wait that it needs."""
    found = []
    for start, x in enumerate(code):
        operands = [operand.strip() for operand in x.operands.split(",")]
        a = re.fullmatch(r"R(\d+)", operands[1]) if x.op == "HGMMA" else None
        if a:
            read = set(range(int(a[1]), int(a[1]) + A_REGISTERS))
            found += [
                Hazard(min(results(w) & read), x, w)
                for w in _until_waited_for(code, start)
                if results(w) & read
            ]
    return found


def _until_waited_for(code: list[Instruction], start: int) -> Iterator[Instruction]:
    """Everything that may be executed before wgmma `start` is surely done.

    A wgmma with `gsb0` ends its group; `WARPGROUP.DEPBAR.LE gsb0, n` waits until at most n groups are left.
    """
    place = {x.address: i for i, x in enumerate(code)}
    ended = "gsb0" in code[start].operands
    todo = [
        (n, int(ended)) for n in _next(code, start, place)
    ]  # 0: its group is open; n: n - 1 came after it
    met = set(todo)
    while todo:
        at, groups = todo.pop()
        x = code[at]
        left = (
            re.search(r"gsb0, 0x([0-9a-f]+)", x.operands) if x.name.startswith("WARPGROUP.DEPBAR") else None
        )
        if left and groups > int(left[1], 16):
            continue
        yield x
        groups = min(groups + (x.op == "HGMMA" and "gsb0" in x.operands), 16)
        for state in ((n, groups) for n in _next(code, at, place)):
            if state not in met:
                met.add(state)
                todo.append(state)


def _next(code: list[Instruction], at: int, place: dict[int, int]) -> list[int]:
    """Places that may be executed after `at`; a call returns to where it was made."""
    x, after = code[at], [at + 1] if at + 1 < len(code) else []
    if x.op == "BRA":
        conditional = x.guard or x.operands.split(",")[0].strip().lstrip("!").startswith(("P", "UP"))
        return [place[x.target], *(after if conditional else [])] if x.target in place else after
    return [] if x.op in ("EXIT", "RET") and not x.guard else after
