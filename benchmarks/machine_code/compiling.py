"""Compile what a launcher would launch, for any NVIDIA GPU, without one.

The launchers get meta tensors and Triton a driver that never launches, so that signatures, tile sizes,
constants and warps are those of the real launch. `TRITON_INTERPRET` must not be set when triton is imported.
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class NoGPU:
    """What Triton asks its driver when it compiles and does not launch."""

    def __init__(self, sm: int):
        self.sm = sm

    def get_current_device(self) -> int:
        return self.sm  # kernels are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be launched."""

    name: str  # module.function
    kernel: CompiledKernel
    programs: int
    arguments: dict[str, Any]  # by the names that the kernel gives them


def compiled(run: Callable[[], object], sm: int) -> list[Launch]:
    """Every kernel that `run` would launch, in its order, none of them executed."""
    found: list[Launch] = []

    def warm_up(fn, *args, grid, warmup, **kwargs):
        name = f"{fn.fn.__module__.removeprefix('fastmim_kernels.')}.{fn.fn.__name__}"
        kernel = launch(fn, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(fn.arg_names, args, strict=False)) | kwargs
        found.append(Launch(name, kernel, math.prod(grid), arguments))

    triton.runtime.driver.set_active(NoGPU(sm))
    launch, JITFunction.run = JITFunction.run, warm_up
    try:
        run()
    finally:
        JITFunction.run = launch
    return found


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers, stack and local memory (spills), as the compiled binary itself declares them."""
    text = cuobjdump(kernel, "--dump-resource-usage")
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    assert set(usage) == {"REG", "STACK", "LOCAL"}, text
    assert usage["REG"] > 0, text
    return usage


def machine_code(kernel: CompiledKernel) -> str:
    """The disassembled binary, which `disassembly.parse` reads."""
    return cuobjdump(kernel, "--dump-sass")


def cuobjdump(kernel: CompiledKernel, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), option, cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
