"""info_nce as C-MAE uses it, per position across the batch, and with every token of the batch a candidate.

Question   what does it cost to never store the logits, and what memory does it save?
Expected   compute bound: two products of B x N x G x D. Per position at batch 4096 on one H200 400 TFLOP/s
           and at most 0.5 GB beyond what was there, where eager keeps 13 GB of logits and as much again for
           their gradient; all tokens of 1024 images 80 ms and 0.5 GB, where the logits alone are 150 GiB.
           On a CPU the products are as fast as eager's, and what is won is what eager spends on writing
           and reading logits: extra memory at most 1/20 per position, and at most 200 MB for all tokens.
Baselines  the reference with its casts to fp32, eager and compiled whole. "autocast" is what a model in bf16
           runs: rows normalized in fp32, their product in bf16, the softmax in fp32; in fp32 it is eager.
           "chunks" is autocast for some rows at a time, each with its backward: what one would write where
           the logits do not fit. A provider whose logits do not fit three times is absent, and says so.
FLOP       4 B N G D: the logits, and the gradient of the queries. Keys are a teacher's and get none.
Bytes      queries and keys read, the gradient of the queries, losses and log-sum-exps written.
Memory     `extra_mib` of a row: the most that was allocated at once beyond what was there before the call. On
           CUDA by torch's allocator; on a CPU summed over every allocation and release that torch's profiler
           records: scratch that a library takes without torch is not in it.
"""

import os
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from fastmim_kernels import info_nce
from fastmim_kernels.info_nce import info_nce_reference
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.provenance import DEVICE

PER_POSITION = [1024, 4096] if DEVICE == "cuda" else [256]  # images
ALL_TOKENS = [1024] if DEVICE == "cuda" else [64]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
N, D, TEMPERATURE = 196, 256, 0.2
CHUNK = 2**28 if DEVICE == "cuda" else 2**24  # logits that "chunks" holds at once
Losses = tuple[Tensor, Tensor]


def eager(q: Tensor, k: Tensor, offset: int = 0) -> Losses:
    return info_nce_reference(q.float(), k.float(), TEMPERATURE, offset)


def autocast(q: Tensor, k: Tensor, offset: int = 0) -> Losses:
    unit_q, unit_k = (F.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k))
    logits_NBG = torch.einsum("bnd,gnd->nbg", unit_q, unit_k).float() / TEMPERATURE
    lse_NB = logits_NBG.logsumexp(-1)
    return (lse_NB - logits_NBG.diagonal(offset, 1, 2)).T, lse_NB.T


def fused(q: Tensor, k: Tensor) -> Losses:
    return info_nce(q, k, temperature=TEMPERATURE)


PROVIDERS = {
    "eager": eager,
    "autocast": autocast,
    "compile": torch.compile(eager, dynamic=False),
    "fastmim": fused,
}


def forward_backward(provider: str, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    loss, lse = PROVIDERS[provider](q, k)
    return loss.detach(), lse.detach(), *torch.autograd.grad(loss, q, grad)


def chunks(loss_of, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Rows of queries one after the other; no chunk waits for another one's backward."""
    rows = max(1, CHUNK // (k.shape[0] * k.shape[1]))
    found = []
    for start in range(0, len(q), rows):
        part = q[start : start + rows].detach().requires_grad_()
        loss, lse = loss_of(part, k, start)
        found.append(
            (loss.detach(), lse.detach(), *torch.autograd.grad(loss, part, grad[start : start + rows]))
        )
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def unfit(logits: int) -> str | None:
    """Why the logits in fp32, what they are made into and their gradient cannot be had here."""
    if DEVICE == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 3 * 4 * logits <= memory:
        return None
    return f"its logits are {4 * logits / 2**30:.0f} GiB, wanted three times in {memory / 2**30:.0f}"


def group(B: int, positions: int, mode: str) -> list[Case]:
    """`positions` of B candidates each; the queries lie near their keys, as they come to do in training."""
    k = torch.randn(B, positions, D, device=DEVICE)
    q = (k + 2 * torch.randn_like(k)).to(DTYPE).requires_grad_()
    k = k.to(DTYPE)
    grad = torch.rand(B, positions, device=DEVICE) / (B * positions)
    logits = B * B * positions
    runs = {name: partial(forward_backward, name, q, k, grad) for name in PROVIDERS}
    runs["chunks"] = partial(chunks, autocast, q, k, grad)
    absent = dict.fromkeys(("eager", "autocast", "compile"), unfit(logits))
    if DTYPE.itemsize == 4:
        absent["autocast"] = "in fp32 it is eager"
    return [
        Case(
            op="info_nce",
            provider=provider,
            mode=f"forward_backward, {mode}",
            shape={"B": B, "N": positions, "D": D},
            dtype=str(DTYPE).removeprefix("torch."),
            bytes_moved=3 * q.numel() * DTYPE.itemsize + 8 * grad.numel(),
            flops=4 * logits * D,
            run=run,
            oracle=partial(chunks, eager, q, k, grad),
            absent=absent.get(provider),
        )
        for provider, run in runs.items()
    ]


def cases() -> Iterator[list[Case]]:
    for images in PER_POSITION:
        yield group(images, N, "per position")
    for images in ALL_TOKENS:
        yield group(images * N, 1, "all tokens")
