"""No GPU? Then the Triton kernels run in Triton's interpreter, on the CPU, in the same tests."""

import os
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as fastmim/train.py; read when torch starts OpenMP

import pytest
import torch
import torch.utils.cpp_extension  # and setuptools, which wants to come before the library's own distutils
from torch.utils._device import _device_constructors

_device_constructors()  # torch.device("meta") remembers what makes tensors: not what stands for it in a test

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# What takes longest, in seconds of one core: a worker that took one of these last would work on alone.
LONGEST_FIRST = (
    "tests/ops/test_compile_ahead.py",
    "tests/benchmarks/test_gpu_round.py",
    "tests/engine/test_methods_train.py",
    "tests/benchmarks/test_throughput.py",
    "tests/ops/test_attention_tile.py",
    "tests/ops/test_fuzz.py",
    "tests/ops/test_add_layer_norm.py",
    "tests/engine/test_tables.py",
    "tests/engine/test_teacher.py",
    "tests/ops/test_machine_code.py",
    "tests/ops/test_info_nce.py",
    "tests/ops/apply/test_instance.py",
    "tests/engine/test_kills.py",
    "tests/engine/test_validate.py",
    "tests/engine/test_probe.py",
    "tests/data/test_data_commands.py",
    "tests/data/test_pack.py",
    "tests/data/test_leaks.py",
    "tests/data/test_everywhere.py",
    "tests/test_layout.py",
    "tests/engine/test_resume.py",
    "tests/engine/test_interrupt.py",
    "tests/benchmarks/test_rivals.py",
    "tests/benchmarks/test_harness.py",
    "tests/data/test_bad_samples.py",
    "tests/methods/test_cmae.py",
    "tests/ops/test_native.py",
    "tests/test_arguments.py",
    "tests/test_mutants.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """For the workers of `--dist loadfile`, which take file by file; one process keeps to the alphabet."""
    if hasattr(config, "workerinput"):
        place = {path: i for i, path in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: place.get(item.location[0], len(place)))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def torchvision_loads() -> None:
    """timm and transformers import torchvision, which lacks two ops of its own beside a CPU torch."""
    from benchmarks.provenance import import_torchvision

    if find_spec("torchvision") is not None:
        import_torchvision()


@pytest.fixture(autouse=True)
def poisoned_empty(request, monkeypatch):
    """In tests/ops, `torch.empty` hands out NaN: a kernel that skips an element is caught."""
    if "/ops/" not in str(request.path):
        return
    real = torch.empty

    def empty(*size, **kwargs):
        out = real(*size, **kwargs)
        if out.is_floating_point() and out.device.type != "meta":
            out.detach().fill_(float("nan"))  # detached: torch.compile's own set-up makes leaves this way
        return out

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(autouse=True)
def interpreter_multiplies_bf16(request, monkeypatch):
    """Triton's interpreter (3.6, 3.7) hands tl.dot the bits of bf16 as integers: in tests/ops, values."""
    if torch.cuda.is_available() or "/ops/" not in str(request.path):
        return
    import numpy as np
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    real = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype != bfloat16 or x.data.dtype != np.uint16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), float32)

    def create_dot(self, a, b, *others):
        return real(self, widened(a), widened(b), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
