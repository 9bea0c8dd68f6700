"""The C++ ops of csrc/: found or built when an op on the CPU first wants one.

Built by ninja and a C++ compiler, once for each state of the sources, torch version, compiler and processor,
into a folder of this user alone in $TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions: half a minute,
announced on stderr. Processes that want it at the same time wait for one another; one that is killed leaves
nothing to trip over. $CXX chooses the compiler, with its words as a shell reads them.

Without a compiler or ninja the references in Python serve; one warning and `fastmim doctor` say so. The
numbers are the same up to rounding. FASTMIM_NATIVE=0 chooses the references.
"""

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "fastmim_native.so"
TORCH = Path(torch.__file__).parent
FLAGS = (
    "-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wall", "-Wno-psabi",
    "-ffp-contract=off",  # where multiply and add are one instruction they round once: not on every processor
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
)  # fmt: skip


class Unavailable(Exception):
    """Why there are no C++ ops here."""


def _find(what: str, *names: str) -> str:
    """The first program of `names`: on the path, or beside the interpreter, as in a venv not activated."""
    beside = Path(sys.executable).parent
    for name in names:
        if found := shutil.which(name) or shutil.which(name, path=str(beside)):
            return found
    raise Unavailable(f"no {what} ({', '.join(names)}) on the path")


def _compiler(wanted: str) -> list[str]:
    """The words that call it: `wanted` as a shell reads it, as `ccache g++`, or a path with blanks."""
    words = [wanted] if wanted and shutil.which(wanted) else shlex.split(wanted)
    return [_find("C++ compiler", *(words[:1] or ["c++", "g++", "clang++"])), *words[1:]]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        output = (done.stdout + done.stderr).strip().splitlines()
        first = next((line for line in output if "error" in line.lower()), "no output")
        raise Unavailable(f"{' '.join(command[:2])} failed with status {done.returncode}: {first}")
    return done.stdout


def _folder(compiler: list[str]) -> Path:
    """Where the library of these sources, this torch, compiler and processor lies: in every environment the
    same, for the headers of a torch are those of its version wherever it is installed."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    digest = hashlib.sha256()
    for fact in (torch.__version__, _run([*compiler, "--version"]), features, *FLAGS):
        digest.update(fact.encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / f"fastmim_torch{torch.__version__.split('+')[0]}_{digest.hexdigest()[:12]}"


def _ninja_file(compiler: list[str]) -> str:
    """One object per source and one library, all in the working directory."""
    sources = sorted(SOURCES.resolve().glob("*.cpp"))
    objects = " ".join(f"{path.stem}.o" for path in sources)
    compiled = "".join(f"build {path.stem}.o: compile {_escape(path)}\n" for path in sources)
    compile_with = _words(*compiler, *FLAGS, f"-isystem{TORCH}/include")
    link_with = _words(*compiler, "-shared", "-fopenmp")
    libraries = _words(f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10")
    return (
        f"rule compile\n  command = {compile_with} -c $in -o $out\n"
        f"rule link\n  command = {link_with} $in {libraries} -o $out\n"
        f"{compiled}build {LIBRARY}: link {objects}\n"
    )


def _words(*words: str) -> str:
    """For a command, which a shell reads behind ninja."""
    return shlex.join(words).replace("$", "$$")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _build(compiler: list[str], folder: Path) -> None:
    """Compiles in a folder of its own and moves the library to its place whole."""
    ninja = _find("ninja", "ninja")
    for left in folder.glob("build-*"):  # by a process that was killed: whoever holds the lock is alone
        shutil.rmtree(left)
    print("fastmim_kernels: building its C++ ops, once for this torch and processor", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        Path(scratch, "build.ninja").write_text(_ninja_file(compiler))
        _run([ninja, "-C", scratch])
        with open(Path(scratch, LIBRARY), "rb") as file:
            os.fsync(file.fileno())  # a name without its content would be loaded for ever after a power cut
        os.replace(Path(scratch, LIBRARY), folder / LIBRARY)


def _check_own(path: Path) -> None:
    """Unavailable for a folder of another user. One of ours into which others may write is emptied.

    Code is loaded from it: whoever can write there can run what they like.
    """
    if not os.path.lexists(path):
        return
    status = os.lstat(path)
    if status.st_uid not in (os.getuid(), 0) or stat.S_ISLNK(status.st_mode):
        raise Unavailable(
            f"{path} is another user's, or a link, and code would be loaded from it; set TORCH_EXTENSIONS_DIR"
        )
    if status.st_mode & 0o022:
        shutil.rmtree(path)


def library() -> Path:
    """The built library; builds it if need be. Unavailable, with the reason, if that cannot be."""
    if os.environ.get("FASTMIM_NATIVE") == "0":
        raise Unavailable("FASTMIM_NATIVE=0")
    if not SOURCES.is_dir():
        raise Unavailable(f"no sources at {SOURCES.name}/")
    compiler = _compiler(os.environ.get("CXX", ""))
    folder = _folder(compiler)
    try:
        _check_own(folder)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it with the process
            if not (folder / LIBRARY).exists():
                _build(compiler, folder)
    except OSError as error:
        raise Unavailable(f"cannot write {folder}: {error.strerror}") from error
    return folder / LIBRARY


@cache
def why_not() -> str | None:
    """What keeps the C++ ops from serving in this process, or None if nothing does. Loads them."""
    try:
        torch.ops.load_library(library())
    except (Unavailable, OSError) as error:
        reason = str(error)
        if reason != "FASTMIM_NATIVE=0":
            warnings.warn(f"fastmim_kernels has no C++ ops, its references serve: {reason}", stacklevel=2)
        return reason
    return None


def ready() -> bool:
    """Whether the ops `torch.ops.fastmim.native_*` are there; builds and loads them at the first call."""
    return why_not() is None
