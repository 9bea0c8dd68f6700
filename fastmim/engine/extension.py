"""The optimizer that DeepSpeed compiles at its first use: built before a run starts, or one line on why not.

Source  deepspeed.ops.op_builder: its own test of what can be built says yes without looking, and what it then
        raises, after the run's first files are written, is a page of the compiler's.
"""

import os
import shutil

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import MissingCUDAException, installed_cuda_version

ADVICE = "--optim.name adamw is torch's own fused one and needs no compiler"


def build_fused_adam() -> None:
    """Build DeepSpeed's FusedAdam for this device, or load what was built. ImportError says why it cannot."""
    obstacle = why_no_build()
    if obstacle is None:
        try:
            get_accelerator().create_op_builder("FusedAdamBuilder").load(verbose=False)
            return
        except Exception as error:  # of whatever kind: DeepSpeed, torch and compilers have their own
            obstacle = reason(error)
    raise ImportError(
        f"optim.name deepspeed: DeepSpeed cannot build its FusedAdam here: {obstacle}; {ADVICE}"
    )


def why_no_build() -> str | None:
    """What is missing of the tools that a build wants, or None if they are there."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"want a C++ compiler, got none called {compiler} (CXX names another)"
    if get_accelerator().device_name() == "cuda":
        wanted = torch.version.cuda or "none"  # none: a build of torch without CUDA
        try:
            found = installed_cuda_version()
        except MissingCUDAException:
            return f"want the nvcc of CUDA {wanted}, got none (CUDA_HOME says where it is)"
        if str(found[0]) != wanted.split(".")[0]:
            return f"want the nvcc of CUDA {wanted}, as torch has, got {'.'.join(map(str, found))}"
    if shutil.which("ninja") is None:
        return "want ninja, got none on PATH (pip install ninja, or activate its environment)"
    return None


def reason(error: Exception) -> str:
    """The line of a compiler's page that says what is wrong, or the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])
