"""InfoNCE over tokens without its logits: one loss per query, of which only tiles of the logits ever exist.

    q^, k^   = q / |q|, k / |k|   over D             = q, k with normalize=False
    s_j      = q^[b, n] . k^[j, n] / temperature     for the keys j < G at the same position n
    lse      = log sum over j of exp(s_j)
    loss     = lse - s_label                         label = b + label_offset
    dq^      = dloss / temperature * (sum over j of softmax(s)_j k^_j - k^_label)

Source  van den Oord et al., arXiv:1807.03748; per position across the batch it is Eq. 9-10 of Kong & Zhang,
        arXiv:2208.04164, on tokens. The two-product form is attention's forward with the keys as values.
Shapes  per position: q `[B, N, D]`, k `[G, N, D]`, the keys of the global batch: rank r passes label_offset
        r * B. Every key a candidate: q `[M, D]`, k `[Q, D]`, which is N = 1. Where the positive is not the
        query's own row (CutMix): labels int64 `[B, N]`, `[M]`, of which several may name one key.
Dtypes  q and k of one dtype, bf16, fp16 or fp32; logits, sums, loss and lse fp32; on CUDA the softmax enters
        its product with the keys in their dtype; gradients in q's and k's.
Bytes   4 * B * N * G * D FLOP with the gradient of q, half without: compute bound. Kept on CUDA: `[B, N, D]`
        of q's dtype, 4 * N * (2 * B + G) bytes of lse, rates and norms; q and k if k gets a gradient.
        The CPU keeps q, k and lse, and makes the logits of a few positions or rows a second time.
Limits  last dim contiguous, D <= 1024, any other strides. The log-sum-exp is not differentiable. CUDA runs
        info_nce_triton.py, the CPU runs csrc/ or the definition in chunks.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim_kernels import native
from fastmim_kernels.debug import debugging
from fastmim_kernels.info_nce_triton import EPS, launch_backward_keys, launch_forward
from fastmim_kernels.once import differentiable_once

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_D = 1024
CHUNK = 1 << 18  # logits that the CPU holds at once: 1 MB, which its caches keep
MIN_ROWS = 64  # but no fewer rows than make a matrix product worth its keys


# --- reference: the definition, and the oracle of the tests -------------------------------------


def info_nce_reference(
    q: Tensor, k: Tensor, temperature: float, label_offset: int = 0, normalize: bool = True,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and log-sum-exp in plain PyTorch, in the dtype of its inputs. `[B, N, D], [G, N, D] -> [B, N]`."""
    if q.ndim == 2:
        column = None if labels is None else labels[:, None]
        loss, lse = info_nce_reference(q[:, None], k[:, None], temperature, label_offset, normalize, column)
        return loss[:, 0], lse[:, 0]
    if normalize:
        q, k = F.normalize(q, dim=-1, eps=EPS), F.normalize(k, dim=-1, eps=EPS)
    logits_NBG = torch.einsum("bnd,gnd->nbg", q, k) / temperature
    lse_NB = logits_NBG.logsumexp(-1)
    if labels is None:
        return (lse_NB - logits_NBG.diagonal(label_offset, 1, 2)).T, lse_NB.T
    return (lse_NB - logits_NBG.gather(2, labels.T[..., None])[..., 0]).T, lse_NB.T


# --- CPU: the definition, a few positions or rows at a time ---------------------------------------


def _unit(x_RPD: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """`[rows, positions, D] -> [positions, rows, D]` fp32 of norm 1, and the norms."""
    x_PRD = x_RPD.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if not normalize:
        return x_PRD, x_PRD.new_ones(()).expand(*x_PRD.shape[:2], 1)
    norm_PR1 = torch.linalg.vector_norm(x_PRD, dim=-1, keepdim=True)
    return x_PRD.div_(norm_PR1.clamp(min=EPS)), norm_PR1


def _through_norm(dunit: Tensor, unit: Tensor, norm: Tensor, normalize: bool) -> Tensor:
    """The gradient of x from that of x / max(|x|, eps), in place."""
    if not normalize:
        return dunit
    along = torch.linalg.vecdot(dunit, unit)[..., None].masked_fill_(norm <= EPS, 0)
    return dunit.addcmul_(unit, along, value=-1).div_(norm.clamp(min=EPS))


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Positions that are worked on together, and the blocks of their rows."""
    (B, N, D), G = q.shape, k.shape[0]
    step = max(1, CHUNK // max(1, G * max(min(B, MIN_ROWS), D)))
    rows = max(MIN_ROWS, CHUNK // max(1, G * min(N, step)))
    for n in range(0, N if B else 0, step):
        yield slice(n, min(n + step, N)), [slice(b, min(b + rows, B)) for b in range(0, B, rows)]


def _logits(unit_q: Tensor, unit_k: Tensor, temperature: float) -> Tensor:
    # not as the product's own factor: MKL scales the rows before it, and loses up to 3 bits of the logits
    return torch.bmm(unit_q, unit_k.mT).div_(temperature)


def _labels(labels: Tensor | None, b: slice, n: slice, offset: int) -> Tensor:
    """Which key is the positive of these rows. Int64 `[positions or 1, rows, 1]`."""
    if labels is None:
        return torch.arange(b.start + offset, b.stop + offset)[None, :, None]
    return labels[b, n].T[..., None]


def cpu_forward(
    q: Tensor, k: Tensor, temperature: float, offset: int, normalize: bool, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp, `[B, N]` fp32 each."""
    loss, lse = (q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(2))
    for n, blocks in _blocks(q, k):
        unit_k, _ = _unit(k[:, n], normalize)
        for b in blocks:
            s = _logits(_unit(q[b, n], normalize)[0], unit_k, temperature)
            positive = torch.take_along_dim(s, _labels(labels, b, n, offset), 2)[..., 0]
            top = s.amax(-1, keepdim=True)
            total = s.sub_(top).exp_().sum(-1).log_().add_(top[..., 0])
            lse[b, n] = total.T
            loss[b, n] = (total - positive).T
    return loss, lse


def cpu_backward(
    dloss: Tensor, q: Tensor, k: Tensor, lse: Tensor, temperature: float, offset: int, normalize: bool,
    need_q: bool, need_k: bool, labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of q and k, their logits made again; no rows for one that is not needed."""
    dq, dk = torch.empty_like(q if need_q else q[:0]), torch.empty_like(k if need_k else k[:0])
    if need_k and not len(q):
        return dq, dk.zero_()
    for n, blocks in _blocks(q, k):
        unit_k, norm_k = _unit(k[:, n], normalize)
        dunit_k = torch.zeros_like(unit_k if need_k else unit_k[:0])
        for b in blocks:
            unit_q, norm_q = _unit(q[b, n], normalize)
            p = _logits(unit_q, unit_k, temperature).sub_(lse[b, n].T[..., None]).exp_()
            own = _labels(labels, b, n, offset).expand(len(p), -1, 1)
            p.scatter_add_(2, own, p.new_full((), -1).expand(own.shape))
            p.mul_(dloss[b, n].T[..., None] / temperature)
            if need_k:
                dunit_k.baddbmm_(p.mT, unit_q)
            if need_q:
                dq[b, n] = _through_norm(torch.bmm(p, unit_k), unit_q, norm_q, normalize).transpose(0, 1)
        if need_k:
            dk[:, n] = _through_norm(dunit_k, unit_k, norm_k, normalize).transpose(0, 1)
    return dq, dk


def _native(q: Tensor, need_k: bool = False) -> bool:
    """Whether csrc/ serves: always, but the gradient of the keys wants a position for each thread."""
    return not (need_k and q.shape[1] < torch.get_num_threads()) and native.ready()


# --- the op: schema, devices, fake, autograd ------------------------------------------------------


@torch.library.custom_op("fastmim::info_nce", mutates_args=(), device_types="cuda")
def _op(
    q: Tensor,
    k: Tensor,
    temperature: float,
    label_offset: int,
    normalize: bool,
    need_pull: bool,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if debugging():
        check_labels(labels, k)
    return launch_forward(q, k, temperature, label_offset, normalize, need_pull, labels)


@_op.register_kernel("cpu")
def _(q, k, temperature, label_offset, normalize, need_pull, labels=None):
    check_labels(labels, k)
    forward = torch.ops.fastmim.native_info_nce if _native(q) else cpu_forward
    loss, lse = forward(q, k, temperature, label_offset, normalize, labels)
    none = q.new_empty(0, dtype=torch.float32)
    return loss, lse, none, q.new_empty(0, *q.shape[1:]), none.clone()


@_op.register_fake
def _(q, k, temperature, label_offset, normalize, need_pull, labels=None):
    (B, N, D), G, cuda = q.shape, k.shape[0], q.device.type != "cpu"
    loss, lse = (q.new_empty(B, N, dtype=torch.float32) for _ in range(2))
    rate = q.new_empty((B, N) if cuda else 0, dtype=torch.float32)
    pull = q.new_empty(B if cuda and need_pull else 0, N, D)
    norm = q.new_empty((G if normalize else 0, N) if cuda else 0, dtype=torch.float32)
    return loss, lse, rate, pull, norm


@torch.library.custom_op("fastmim::info_nce_backward", mutates_args=(), device_types="cuda")
def _op_backward(
    dloss: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    lse: Tensor,
    rate: Tensor,
    pull: Tensor,
    norm: Tensor,
    temperature: float,
    label_offset: int,
    normalize: bool,
    need_q: bool,
    need_k: bool,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dq = torch.empty_like(pull if need_q else pull[:0], memory_format=torch.contiguous_format)
    if need_q:
        torch.mul(pull, (rate * dloss)[..., None], out=dq)  # in fp32, and no fp32 tensor is made
    if not need_k:
        return dq, pull.new_empty(0, *pull.shape[1:])
    assert q is not None and k is not None  # `_save` keeps them for this
    settings = temperature, label_offset, normalize, labels
    return dq, launch_backward_keys(dloss, q, k, lse, rate, norm, *settings)


@_op_backward.register_kernel("cpu")
def _(dloss, q, k, lse, rate, pull, norm, temperature, label_offset, normalize, need_q, need_k, labels=None):
    backward = torch.ops.fastmim.native_info_nce_backward if _native(q, need_k) else cpu_backward
    return backward(dloss, q, k, lse, temperature, label_offset, normalize, need_q, need_k, labels)


@_op_backward.register_fake
def _(dloss, q, k, lse, rate, pull, norm, temperature, label_offset, normalize, need_q, need_k, labels=None):
    (B, N), D = dloss.shape, pull.shape[2]
    return pull.new_empty(B if need_q else 0, N, D), pull.new_empty(k.shape[0] if need_k else 0, N, D)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    q, k, *ctx.settings, _, labels = inputs
    _, lse, rate, pull, norm = output
    # on CUDA the keys of all ranks may go after the forward: without a gradient of theirs nothing reads them
    again = ctx.needs_input_grad[1] or q.device.type == "cpu"
    ctx.save_for_backward(*((q, k) if again else (None, None)), lse, rate, pull, norm, labels)
    ctx.mark_non_differentiable(lse, rate, pull, norm)


def _backward(ctx, dloss: Tensor | None, *_):
    if dloss is None:
        return (None,) * 7
    needs = ctx.needs_input_grad[:2]
    *saved, labels = ctx.saved_tensors
    grads = _op_backward(dloss, *saved, *ctx.settings, *needs, labels)
    dq, dk = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dq, dk, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)
differentiable_once(_op_backward)


# --- public function -------------------------------------------------------------------------------


def _check_form(labels: Tensor, q: Tensor, label_offset: int) -> None:
    if labels.shape != q.shape[:-1] or labels.dtype != torch.int64 or labels.device != q.device:
        raise ValueError(
            f"want int64 labels {tuple(q.shape[:-1])} on {q.device}, got {labels.dtype} "
            f"{tuple(labels.shape)} on {labels.device}"
        )
    if label_offset:
        raise ValueError(f"want labels or a label_offset, got both, the offset {label_offset}")


def check_labels(labels_BN: Tensor | None, k_GND: Tensor) -> None:
    """ValueError for a label that names no key. Waits for the device."""
    if labels_BN is None or labels_BN.numel() == 0:
        return
    low, high = (x.item() for x in labels_BN.aminmax())
    if low < 0 or high >= len(k_GND):
        raise ValueError(f"want labels in [0, {len(k_GND)}), got {low} .. {high}")


def info_nce(
    q: Tensor,
    k: Tensor,
    *,
    temperature: float,
    label_offset: int = 0,
    normalize: bool = True,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every query. `[B, N, D], [G, N, D] -> [B, N]`, `[M, D], [Q, D] -> [M]`, fp32.

    The candidates of a query are the keys at its own position, the positive of row b is key b + label_offset,
    or with `labels`, int64 `[B, N]` or `[M]`, key labels[b, n]; any number of queries may share one.
    The loss is differentiable in q and k, the log-sum-exp in nothing. Average the loss for training.
    ValueError when shapes, dtypes, strides, temperature, offset or labels do not fit; labels out of range are
    found on the CPU, and on CUDA in debug mode.
    """
    if q.ndim not in (2, 3) or q.ndim != k.ndim or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"want [B, N, D] and [G, N, D], or [M, D] and [Q, D], got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.dtype not in FLOATS or q.dtype != k.dtype:
        raise ValueError(f"want one dtype of fp32, bf16 or fp16, got {q.dtype} and {k.dtype}")
    if q.device != k.device:
        raise ValueError(f"want one device, got {q.device} and {k.device}")
    if not 1 <= q.shape[-1] <= MAX_D:
        raise ValueError(f"want 1 <= D <= {MAX_D}, got D = {q.shape[-1]}")
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        raise ValueError("the last dim must be contiguous")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"want a positive temperature, got {temperature}")
    if labels is None and not 0 <= label_offset <= k.shape[0] - q.shape[0]:
        raise ValueError(
            f"want a key for each of {q.shape[0]} queries from row {label_offset} on, got {k.shape[0]} keys"
        )
    if labels is not None:
        _check_form(labels, q, label_offset)
    tokens = q.ndim == 2
    if tokens:
        q, k, labels = q[:, None], k[:, None], None if labels is None else labels[:, None]
    need_pull = torch.is_grad_enabled() and q.requires_grad
    loss, lse, *_ = _op(q, k, float(temperature), label_offset, normalize, need_pull, labels)
    return (loss[:, 0], lse[:, 0]) if tokens else (loss, lse)
