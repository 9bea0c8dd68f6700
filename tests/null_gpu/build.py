"""Build the null CUDA device for the torch of this interpreter: one library, `libcuda.so.1`.

It holds what device/*.c defines, and a function for every other name that torch's libraries import from
NVIDIA's: those that start work on the device are counted, those that keep handles do nothing, those that
would return a value are refused by name. So another torch, which imports other names, is served as well.

Needs gcc, binutils' nm, and a CUDA build of torch, whose packages bring the headers.
"""

import fcntl
import hashlib
import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "null_gpu"
LIBRARY = "libcuda.so.1"
SOURCES = sorted((HERE / "device").glob("*.[ch]"))

# How a name that nobody wrote by hand is served: the first pattern that it matches
SERVED_AS = (
    ("CREATED", r"(cublas|cublasLt|cusolver|cusparse|cudnn)(?!Backend)\w*Create\w*"),
    ("KEPT", r"(cuda|cupti|cu[A-Z]|__cuda)\w*(Destroy|Set|Enable|Disable|Register|Subscribe|Push|Unload)\w*"),
    ("KEPT", r"(cuda|cupti)\w*(Flush|Finalize|Unregister|Profiler|Pop|Advise|Prefetch|Trim)\w*"),
    ("KEPT", r"(cublas|cusolver|cusparse|cudnn|cufft|curand)\w*(Destroy|Set|Finalize|Init)(?!\w*Batched)\w*"),
    ("KEPT", r"nccl(Group|Comm(Destroy|Abort|Finalize|Register|Deregister|Window)|RedOp|Mem)\w*"),
    ("WORK", r"nccl(All|Bcast|Broadcast|Reduce|Send|Recv|Gather|Scatter)\w*"),
    ("REFUSED", r"\w*(Get|Find|Query|Size|Create|Version|Count|Rank|Ipc|Graph|Capture)\w*"),
    ("REFUSED", r"(cuda|cupti|__cuda|nccl|cu[A-Z]|cufft|curand)\w*"),
    ("WORK", r"\w+"),
)
HEAD = """// Made by build.py: what torch imports beside the functions that are written by hand.
#include "null.h"
#define CREATED(name) int name(void **handle) { *handle = (void *)0x9000; return 0; }
#define KEPT(name) long name(void) { return 0; }
#define WORK(name) long name(void) { null_count("launch", #name); return 0; }
#define REFUSED(name) long name(void) { return null_refuse(#name); }
"""

# Loaded by torch at the end of its import, by the entry point that it offers to other devices. cuDNN asks the
# device whether a plan fits: convolutions and attention go by torch's own kernels instead.
PLUGIN = """import torch


def load():
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
"""
ENTRY_POINTS = "[torch.backends]\nnull_gpu = null_gpu_plugin:load\n"


class Unavailable(Exception):
    """Why the device cannot be built here."""


def run(*command: str | Path) -> str:
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable(f"no {error.filename} on the path") from error
    if done.returncode:
        raise Unavailable(f"{command[0]} failed:\n{done.stderr.strip()[:4000]}")
    return done.stdout


def symbols(library: Path, which: str) -> set[str]:
    """The dynamic symbols of a library that are "defined" or "undefined" in it, without their versions."""
    lines = run("nm", "-D", f"--{which}-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def packages() -> Path:
    """Where torch and NVIDIA's packages lie."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable(f"{sys.executable} has no torch")
    root = Path(spec.origin).parents[1]
    if not (root / "torch" / "lib" / "libtorch_cuda.so").exists():
        raise Unavailable(f"torch {version('torch')} is not a CUDA build")
    return root


def headers(root: Path) -> list[Path]:
    """The folders of CUDA's headers: of the runtime's package, and crt/ from Triton's."""
    found = [path.parent for path in sorted(root.glob("nvidia/*/include/cuda_runtime_api.h"))]
    if not found:
        raise Unavailable("no cuda_runtime_api.h among NVIDIA's packages")
    return [*found, root / "triton/backends/nvidia/include", *sorted(root.glob("nvidia/*/include"))]


def imported(root: Path) -> set[str]:
    """Every name that torch takes from NVIDIA's libraries, or from a driver."""
    wanted = set().union(*(symbols(path, "undefined") for path in (root / "torch/lib").glob("lib*.so")))
    served = r"lib(cudart|cublas|cublasLt|cudnn|cufft|curand|cusolver|cusparse|cupti|nccl)\.so\.\d+"
    libraries = [p for p in root.glob("nvidia/*/lib/lib*.so.*") if re.fullmatch(served, p.name)]
    offered = set().union(*(symbols(path, "defined") for path in libraries))
    driver = {name for name in wanted if re.fullmatch(r"cu[A-Z]\w+", name) and not name.startswith("cuFile")}
    return (wanted & offered) | driver


def nccl_version(root: Path) -> int:
    """Of the package beside torch, as NCCL writes it: 2.28.9 is 22809."""
    found = next(iter(root.glob("nvidia_nccl_cu*.dist-info")), None)
    if found is None:
        raise Unavailable("no package of NCCL beside torch")
    major, minor, patch = map(int, found.name.removesuffix(".dist-info").split("-")[1].split("."))
    return 10_000 * major + 100 * minor + patch


def stubs(names: set[str]) -> str:
    """C for the names that are not written by hand."""
    kinds = ((next(kind for kind, like in SERVED_AS if re.fullmatch(like, name)), name) for name in names)
    return HEAD + "".join(f"{kind}({name})\n" for kind, name in sorted(kinds))


def digest(root: Path) -> str:
    """Names the state of all that the library is made of."""
    facts = hashlib.sha256(f"{root} {version('torch')}".encode())
    for path in (*SOURCES, Path(__file__)):
        facts.update(path.read_bytes())
    return facts.hexdigest()[:16]


def library() -> Path:
    """The built library; builds it if need be, once for each state of sources and torch."""
    root = packages()
    folder = BUILD / digest(root)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / LIBRARY).exists():
            build(root, folder)
    return folder / LIBRARY


def build(root: Path, folder: Path) -> None:
    """Compile what is written by hand, then what is missing, and link; moved to its place whole."""
    cc = ["gcc", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unused-value"]
    cc += [f"-I{HERE / 'device'}", *(f"-I{path}" for path in headers(root))]
    cc += [f"-DNULL_NCCL_VERSION={nccl_version(root)}"]
    objects = []
    for source in (path for path in SOURCES if path.suffix == ".c"):
        objects.append(folder / f"{source.stem}.o")
        run(*cc, "-c", source, "-o", objects[-1])
    written = {
        line.split()[-1] for path in objects for line in run("nm", "--defined-only", path).splitlines()
    }
    made = folder / "stubs.c"
    made.write_text(stubs(imported(root) - written))
    run(*cc, "-c", made, "-o", folder / "stubs.o")
    linked = folder / "linked.so"
    run(
        "gcc",
        "-shared",
        f"-Wl,-soname,{LIBRARY}",
        *objects,
        folder / "stubs.o",
        "-o",
        linked,
        "-ldl",
        "-lpthread",
    )
    (folder / "libcuda.so").unlink(missing_ok=True)
    (folder / "libcuda.so").symlink_to(LIBRARY)  # for -lcuda
    plugin = folder / "plugin"
    (plugin / "null_gpu-1.dist-info").mkdir(parents=True, exist_ok=True)
    (plugin / "null_gpu_plugin.py").write_text(PLUGIN)
    (plugin / "null_gpu-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: null-gpu\nVersion: 1\n"
    )
    (plugin / "null_gpu-1.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    os.replace(linked, folder / LIBRARY)


if __name__ == "__main__":
    try:
        print(library())
    except Unavailable as error:
        sys.exit(f"null CUDA device: {error}")
