"""memory_efficient_attention as a backend of attention.py: of xformers, or of MSLK, to which it has moved.

Both are extensions in C++, each built for one torch and one CUDA: beside any other they install and do not
load (`libcudart.so.12` is missing, or a symbol). What PyPI has that fits, each pair an extra of its own:

    torch 2.10, CUDA 12.8    xformers 0.0.34, which brings FlashAttention 3 for Hopper
    torch 2.11, CUDA 13.0    mslk-cuda 1.1.0
    torch 2.12 to 2.14       none

Apart from FlashAttention 3 both call the FlashAttention 2 inside torch, which "varlen" has without them.

This is the only file that knows xformers and mslk.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from fastmim_kernels.tracing import constant_in_graphs

PAIRS = {  # torch -> extra, package, release
    "2.10": ("xformers", "xformers", "0.0.34"),
    "2.11": ("mslk", "mslk-cuda", "1.1.0"),
}


def _from_xformers() -> tuple[Callable[..., Tensor], Any]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return memory_efficient_attention, BlockDiagonalMask


def _from_mslk() -> tuple[Callable[..., Tensor], Any]:
    from mslk.attention.fmha import memory_efficient_attention
    from mslk.attention.fmha.attn_bias import BlockDiagonalMask

    return memory_efficient_attention, BlockDiagonalMask


SOURCES = {"xformers": _from_xformers, "mslk-cuda": _from_mslk}  # by package, in the order they are tried


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


INSTALLED = {package: _installed(package) for package in SOURCES}  # looked up once, and not while tracing


def remedy(torch_version: str = torch.__version__) -> str:
    """What to install so that this backend serves beside such a torch, or beside which torch it would."""
    release = ".".join(torch_version.split(".")[:2])
    if release in PAIRS:
        extra, package, number = PAIRS[release]
        return f"torch {release} wants {package} {number}: pip install 'fastmim[{extra}]'"
    pairs = " or ".join(f"torch {torch} with {package} {n}" for torch, (_, package, n) in PAIRS.items())
    return f"nothing fits torch {release}: {pairs} would serve"


# --- which package serves ---------------------------------------------------------------------------


def _attend(package: str, q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...]) -> Tensor:
    memory_efficient_attention, _ = SOURCES[package]()
    B, T, H, d = q.shape
    if len(segments) == 1:
        return memory_efficient_attention(q, k, v)
    mask = _block_diagonal(package, segments, B, q.device)
    packed = (x.reshape(1, B * T, H, d) for x in (q, k, v))
    return memory_efficient_attention(*packed, attn_bias=mask).view(B, T, H, d)


@lru_cache(maxsize=16)
def _block_diagonal(package: str, segments: tuple[int, ...], batch: int, device: torch.device):
    # built once per shape: its offsets go to the device, which would be a copy per layer and step
    _, BlockDiagonalMask = SOURCES[package]()
    return BlockDiagonalMask.from_seqlens(list(segments) * batch, device=device)


def why_broken(error: BaseException) -> str:
    """The line of an error that says most: the innermost cause, its first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@constant_in_graphs
@cache
def serving() -> tuple[str | None, tuple[str, ...]]:
    """The package that serves on this CUDA device, None if none does, and what is wrong with the others.

    Tried, not deduced, once: a wheel installs beside any torch, and its operators may yet fail to load.
    """
    wrong = []
    for package, installed in INSTALLED.items():
        if installed is None:
            continue
        try:
            q = torch.zeros(1, 8, 1, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            _attend(package, q, q, q, (3, 5)).sum().backward()
        except Exception as error:
            wrong.append(f"{package} {installed} does not work here ({why_broken(error)})")
        else:
            return package, tuple(wrong)
    return None, tuple(wrong)


def why_no_xformers() -> str | None:
    """What keeps xformers and mslk from serving on this CUDA device, and the remedy; None if one serves."""
    package, wrong = serving()
    if package is not None:
        return None
    return f"{'; '.join(wrong) or 'neither xformers nor mslk-cuda is installed'}; {remedy()}"


def attention_xformers(q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...]) -> Tensor:
    """Attention over `[B, T, H, d]` in `segments`, checked by attention.py. Differentiable in q, k, v."""
    package, _ = serving()
    assert package is not None, "attention.py serves by what can serve"
    return _attend(package, q, k, v, segments)


def attention_xformers_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: tuple[int, ...],
    key_segments: tuple[int, ...],
    biases: tuple[Tensor | None, ...] | None,
) -> Tensor:
    """The same with a bias for segments, or with keys of another number. Differentiable in the biases too.

    One call for each segment. Of a bias the operator wants a row that begins at a multiple of 16 bytes, and
    one matrix per head of each sample, which is expanded, not copied; its gradient is dense until summed.
    """
    package, _ = serving()
    assert package is not None, "attention.py serves by what can serve"
    memory_efficient_attention, _ = SOURCES[package]()
    lengths = segments, key_segments, key_segments
    runs = zip(*(x.split(n, dim=1) for x, n in zip((q, k, v), lengths, strict=True)), strict=True)
    masks = [None] * len(segments) if biases is None else biases
    outs = []
    for run, bias in zip(runs, masks, strict=True):
        aligned = None if bias is None else _aligned(bias.to(q.dtype)).expand(len(q), -1, -1, -1)
        outs.append(memory_efficient_attention(*run, attn_bias=aligned))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _aligned(bias_Hnm: Tensor) -> Tensor:
    """The same values in rows of a multiple of 8. `[1, H, n, m]`."""
    m = bias_Hnm.shape[2]
    return torch.nn.functional.pad(bias_Hnm, (0, -m % 8))[None, :, :, :m]
