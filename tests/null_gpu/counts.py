"""What the null CUDA device counted in this process, by kind and name, with names that a person can read."""

import ctypes
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

Counts = Counter[tuple[str, str]]  # (kind, name) -> times


DROPPED = re.compile(r"\b(at|c10|native|detail|cuda|std|binary_internal|at_cuda_detail|thrust|THRUST_\w+)::")
HASHED = re.compile(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::")
WIDTH = 96


@cache
def device() -> ctypes.CDLL:
    """The library of this process. RuntimeError where it does not run on the null device."""
    if "NULL_CUDA" not in os.environ:
        raise RuntimeError("no null CUDA device: start the program by python -m tests.null_gpu.run")
    return ctypes.CDLL(os.environ["NULL_CUDA"])


def reset() -> None:
    device().null_cuda_reset()


def read() -> Counts:
    """All since the last reset."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "counts.tsv")
        assert device().null_cuda_dump(str(path).encode()) == 0
        return parse(path.read_text().splitlines())


def parse(lines: Iterable[str]) -> Counts:
    counts: Counts = Counter()
    for line in lines:
        count, kind, name = line.split("\t")
        counts[kind, readable(name) if kind == "launch" else name] += int(count)
    return counts


def total(counts: Counts, kind: str, name: str | None = None) -> int:
    return sum(n for (k, what), n in counts.items() if k == kind and name in (None, what))


# --- names ------------------------------------------------------------------------------------------


@cache
def readable(name: str) -> str:
    """The name of a kernel without the types that all of torch's carry: what it is, and of what functor."""
    words = demangled(name)
    if words == name:
        return name[:WIDTH]
    words = DROPPED.sub("", HASHED.sub("", without_arguments(words)))
    words = re.sub(r"\{lambda\([^{}]*\)#(\d+)\}", r"lambda \1", words).removeprefix("void ")
    words = re.sub(r"\b(\w+)<[^<>]*>::operator\(\)\([^()]*\)( const)?::", r"\1::", words)
    return words if len(words) <= WIDTH else words[: WIDTH - 3] + "..."


def without_arguments(words: str) -> str:
    """`void f<T>(int, ...)` as `void f<T>`: cut at the bracket that the last one closes."""
    if not words.endswith(")"):
        return words
    depth = 0
    for i in range(len(words) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(words[i], 0)
        if depth == 0:
            return words[:i]
    return words


@cache
def demangler() -> ctypes.CDLL:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    return library


def demangled(name: str) -> str:
    """A C++ name as it was written; any other as it is."""
    library = demangler()
    status = ctypes.c_int()
    words = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value or not words:
        return name
    try:
        return ctypes.string_at(words).decode()
    finally:
        ctypes.CDLL(None).free(ctypes.c_void_p(words))
