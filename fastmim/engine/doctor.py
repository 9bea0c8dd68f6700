"""What this machine will run on, and why: `fastmim doctor`."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from fastmim_kernels import native
from fastmim_kernels.attention import choose_attention, obstacles
from fastmim_kernels.attention.memory_efficient import serving

PACKAGES = (
    "fastmim", "torch", "triton", "numpy", "xformers", "mslk-cuda", "deepspeed", "nvidia-dali-cuda130",
    "pillow", "safetensors", "tyro", "tensorboard", "ninja", "apex",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Installed versions by package name, None where absent, and Python's."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def devices() -> list[dict[str, Any]]:
    """The GPUs, or the CPU where there is none. Memory in GiB."""
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(names, platform.machine())
        cores = len(os.sched_getaffinity(0))
        return [
            {
                "name": name,
                "cores": cores,
                "memory_gib": round(memory, 1),
            }
        ]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
            }
        )
    return found


def attention_backends() -> dict[str, str]:
    """Each backend of attention: "serves", or what keeps it from serving here, with the remedy.

    Of bf16 on a GPU, fp32 on a CPU, heads of 64, short sequences: what a run asks for by default.
    """
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    lines = {name: why or "serves" for name, why in obstacles((1,), 64, dtype, device).items()}
    if lines["xformers"] == "serves":
        package, wrong = serving()
        lines["xformers"] = "; ".join((f"serves, by {package}", *wrong))
    if not cuda:
        lines["tile"] = "serves where it is asked for, by its definition"
    return lines


def choices() -> dict[str, dict[str, str | bool]]:
    """Each part a run chooses among: what it would use here with its defaults, and why."""
    from fastmim.data import why_no_dali
    from fastmim.optim.apex import find_fused_adam

    cuda = torch.cuda.is_available()
    attention, reason = choose_attention(
        "auto", "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32
    )
    obstacle, no_csrc = why_no_dali(), native.why_not()
    try:
        find_fused_adam()
        apex = "NVIDIA's apex is here: --optim.name apex"
    except ImportError as error:
        apex = str(error)
    return {
        "precision": {
            "use": "bf16" if cuda else "fp32",
            "why": "weights; the master copy is fp32" if cuda else "no CUDA device",
        },
        "attention": {"use": attention, "why": reason},
        "kernels": {
            "use": "triton" if cuda else "csrc and references",
            "why": "Triton on CUDA" if cuda else "no CUDA device",
        },
        "decoder": {
            "use": "none" if obstacle else "dali",
            "why": obstacle or ("on the GPU" if cuda else "DALI's CPU operators"),
        },
        "optimizer": {"use": "adamw", "why": f"torch's fused AdamW by default. {apex}"},
        "csrc": {
            "use": "reference" if no_csrc else "native",
            "why": no_csrc or "C++ ops serve the CPU where they pay; elsewhere the definitions in PyTorch",
        },
        "compiler": {
            "use": shutil.which("c++") or shutil.which("g++") or "none",
            "why": "DeepSpeed and csrc build with it",
        },
    }


def report() -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "versions": versions(),
        "devices": devices(),
        "choices": choices(),
        "attention_backends": attention_backends(),
    }


def print_report(content: dict[str, Any]) -> None:
    for device in content["devices"]:
        print("device    ", ", ".join(f"{name} {value}" for name, value in device.items()))
    for name, choice in content["choices"].items():
        print(f"{name:<10} {choice['use']}: {choice['why']}")
        if name == "attention":
            for backend, answer in content["attention_backends"].items():
                print(f"{'':<10} {backend}: {answer}")
    found = content["versions"]
    print("versions  ", ", ".join(f"{name} {v}" for name, v in found.items() if v))
    absent = [name for name, v in found.items() if v is None]
    if absent:
        print("absent    ", ", ".join(absent))
