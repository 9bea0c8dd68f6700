"""What the machine code of one launch does: the numbers that bounds.toml holds.

registers, shared   of a lane; bytes of a program
blocks              programs that an SM holds at once
load, store         global loads and stores by their width in bits, on the path of `disassembly.path`
barriers            in one turn of the longest loop, or in all where there is none
instructions        an element: what all warps execute, times the lanes of a warp, over the elements of the op
mma                 cycles of the tensor cores for the FLOP of the definition, by wgmma in half precision,
                    over the cycles in which an SM issues all these instructions: below 1 they must idle
mma_issued          the same for the products as they are issued: padded, doubled, in tf32, by mma.sync
spills, hazards     bytes on the stack and local loads and stores; see `disassembly.hazards`
"""

import re
from typing import Any

from benchmarks.machine_code import disassembly
from benchmarks.machine_code.compiling import Launch, resources
from benchmarks.machine_code.disassembly import GLOBAL_LOADS, GLOBAL_STORES, SPILLS, Instruction

LANES, SCHEDULERS = 32, 4  # of a warp; of an SM, each of which issues one instruction a cycle
WARPS_PER_SM, BLOCKS_PER_SM, REGISTERS_PER_SM = 64, 32, 65536
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes; each block takes 1 kB more
FLOP_PER_CYCLE = {16: 4096, 32: 2048}  # of an SM of an H100, by the bits of what is multiplied
MMA_SYNC = 0.63  # of that, what mma.sync reaches on an H100 (arXiv 2402.13499, measured at 63 %)


def facts(launch: Launch, text: str, sm: int, work: dict[str, float]) -> dict[str, Any]:
    """Numbers of one launch, whose machine code is `text` and whose work `Case.work` knows."""
    code = disassembly.parse(text)
    usage, meta = resources(launch.kernel), launch.kernel.metadata
    warps, shared = meta.num_warps, meta.shared
    once, loop = disassembly.path(code)
    executed = len(once) + work["turns"] * len(loop)
    issued = sum(map(mma_cycles, once)) + work["turns"] * sum(map(mma_cycles, loop))
    instructions = launch.programs * warps * LANES * executed / work["elements"]
    return {
        "kernel": launch.name,
        "elements": round(work["elements"]),
        "flops": work["flops"],
        "traffic": work["traffic"],
        "registers": usage["REG"],
        "shared": shared,
        "blocks": blocks_per_sm(usage["REG"], shared, warps, sm),
        "load": _named(disassembly.widths(once + loop, GLOBAL_LOADS)),
        "store": _named(disassembly.widths(once + loop, GLOBAL_STORES)),
        "barriers": disassembly.count(loop or once, "BAR"),
        "cp_async": disassembly.count(code, "LDGSTS"),
        "tma": sum(x.op.startswith(("UTMA", "UBLKCP")) for x in code),
        "instructions": round(instructions, 1),
        "mma": round(work["flops"] / FLOP_PER_CYCLE[16] / (instructions / LANES / SCHEDULERS), 2),
        "mma_issued": round(issued / (executed / SCHEDULERS), 2),
        "spills": usage["STACK"] + usage["LOCAL"] + disassembly.count(code, *SPILLS),
        "hazards": len(disassembly.hazards(code)),
    }


def _named(widths: dict[int, int]) -> dict[str, int]:
    """As keys are in the table."""
    return {str(bits): number for bits, number in widths.items()}


def mma_cycles(x: Instruction) -> float:
    """Cycles for which one warp's share of this product keeps the tensor cores of its SM, at their best.

    wgmma is four warps' instruction, 64 rows; narrow ones take longer than this in truth.
    """
    shape = re.search(r"\.64x(\d+)x(\d+)", x.name) if x.op == "HGMMA" else None
    if shape:
        share, n, k, reached = 64 / 4, int(shape[1]), int(shape[2]), 1.0
    elif x.op == "HMMA":
        depth = re.search(r"\.16(?:8)(\d+)", x.name)
        assert depth, x.name
        share, n, k, reached = 16, 8, int(depth[1]), MMA_SYNC
    else:
        return 0.0
    return 2 * share * n * k / (FLOP_PER_CYCLE[32 if "TF32" in x.name else 16] * reached)


def blocks_per_sm(registers: int, shared: int, warps: int, sm: int) -> int:
    """How many programs fit into an SM at once."""
    by_registers = REGISTERS_PER_SM // (-(-registers // 8) * 8 * LANES * warps)
    return min(by_registers, SHARED_PER_SM[sm] // (shared + 1024), WARPS_PER_SM // warps, BLOCKS_PER_SM)
