"""Which backend of attention.py is the fastest: each kind of call is measured once, on the device it is for.

What is timed is what will run: forward, and backward where a gradient is wanted, in the same dtype, shape and
layout, on random values. The batch is the power of two that the call's own reaches, but no more than HEADS
heads of all samples, which fill a GPU several times over: the memory it takes is bounded, and larger batches
rank alike. A backend that fails, or does not agree with sdpa, is left out and named. Where sdpa itself fails
(no memory, no kernel for the device, no plan of cuDNN's) it is left out too, and the others must agree with
the definition in fp32 on the first samples. Where none is left, that is an error with the reason of each.
Where sdpa alone can serve nothing is tried here, and its own error reaches the caller.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

Biases = tuple[Tensor | None, ...]  # of each segment, [H, n, m]
Serve = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]
ServeGeneral = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], tuple[int, ...], Biases | None], Tensor]
Timer = Callable[[Sequence[Callable[[], object]]], list[float]]
Layout = Literal["plain", "packed", "heads"]  # [B, T, H, d]; a third of [B, T, 3, H, d]; [B, H, T, d]

HEADS = 4096
TURNS, CALLS = 7, 2  # timed: so many rounds, in each so many calls of each backend
HEAD_START_CYCLES = 4_000_000  # about two milliseconds, in which the host queues these calls
TOLERANCE = 2e-2  # of the largest value of each output: five steps of bf16
CHECKED_LOGITS = 1 << 24  # of the definition, which holds them whole: 64 MB, and a few times that

log = logging.getLogger("fastmim_kernels")


@dataclass(frozen=True)
class Call:
    """What calls share that share a choice."""

    segments: tuple[int, ...]
    heads: int
    width: int
    batch: int  # as measured: the power of two that the batch reaches, at most HEADS heads
    layout: Layout
    dtype: str
    grad: bool
    device: str
    key_segments: tuple[int, ...] | None = None  # with a bias, or where they differ from those of the queries
    biased: tuple[bool, ...] | None = None  # which segments have a bias


@dataclass(frozen=True)
class Choice:
    use: str
    ms: dict[str, float]  # of each backend that was timed; none where one alone can serve
    left_out: dict[str, str]  # of the others, why

    def sentence(self, call: Call) -> str:
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.ms.items())
        passes = "forward and backward" if call.grad else "forward"
        reasons = "; ".join(f"no {name}: {why}" for name, why in self.left_out.items())
        kind = ""
        if call.key_segments not in (None, call.segments):
            kind = f" to {' + '.join(map(str, call.key_segments or ()))}"
        kind += " with a bias" if call.biased else ""
        return (
            f"attention of {' + '.join(map(str, call.segments))} tokens{kind}, "
            f"{call.heads} heads of {call.width}, batch {call.batch}, {call.dtype}, {passes}: {self.use} "
            f"({'; '.join(filter(None, (times, reasons)))})"
        )


_CHOICES: dict[Call, Choice] = {}
_UNTIMED: ContextVar[bool] = ContextVar("untimed", default=False)


@contextmanager
def untimed() -> Iterator[None]:
    """Within, what is not chosen yet is served by sdpa and not remembered."""
    token = _UNTIMED.set(True)
    try:
        yield
    finally:
        _UNTIMED.reset(token)


def attention_choices() -> list[dict[str, Any]]:
    """What `auto` has chosen in this process: each kind of call, `use`, milliseconds by backend, reasons."""
    return [asdict(call) | asdict(choice) for call, choice in _CHOICES.items()]


def pin_attention_choices(choices: Iterable[dict[str, Any]]) -> None:
    """Takes over what `attention_choices` said elsewhere, through JSON or not, in place of measuring.

    A resumed run that does so computes with the kernels it began with.
    """
    for row in choices:
        fields = dict(row)
        choice = Choice(**{name: fields.pop(name) for name in ("use", "ms", "left_out")})
        for name in ("segments", "key_segments", "biased"):
            fields[name] = None if fields.get(name) is None else tuple(fields[name])
        _CHOICES[Call(**fields)] = choice


def cuda_ms(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of the device for a call of each, the median of rounds in which they take turns."""
    events: list[list[Any]] = [[] for _ in runs]
    for turn in range(1 + TURNS):  # the first warms up
        for i in range(len(runs))[:: 1 if turn % 2 else -1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START_CYCLES)
            start.record()
            for _ in range(CALLS):
                runs[i]()
            end.record()
            events[i].append((start, end))
    torch.cuda.synchronize()
    return [median(start.elapsed_time(end) / CALLS for start, end in pairs[1:]) for pairs in events]


def _make_inputs(call: Call, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v, biases and the output's gradient, random, by a generator that no one else draws from."""
    rng = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=rng, device=device, dtype=dtype)
    B, T, H, d = call.batch, sum(call.segments), call.heads, call.width
    if call.key_segments is not None:
        qkv = [randn(B, n, H, d) for n in (T, *[sum(call.key_segments)] * 2)]
        sizes = zip(call.segments, call.key_segments, call.biased or (), strict=False)
        qkv += [randn(H, n, m) for n, m, is_biased in sizes if is_biased]
    elif call.layout == "packed":
        qkv = list(randn(B, T, 3, H, d).unbind(2))
    elif call.layout == "heads":
        qkv = [randn(B, H, T, d).transpose(1, 2) for _ in range(3)]
    else:
        qkv = [randn(B, T, H, d) for _ in range(3)]
    return [*(x.requires_grad_(call.grad) for x in qkv), randn(B, T, H, d)]


def _disagreement(actual: Sequence[Tensor], expected: Sequence[Tensor], whose: str) -> str | None:
    largest = [e.float().abs().max() for e in expected]
    for a, e, own in zip(actual, expected, largest, strict=True):
        # of one token dq and dk are zero, and what is left of them is rounding
        scale = torch.maximum(own, 1e-3 * torch.stack(largest).max()).item()
        error = (a[: len(e)].float() - e.float()).abs().max().item()
        if not error <= TOLERANCE * scale:
            return f"off by {error / scale if scale else error:.2g} of {whose} largest value"
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def _run(serve: Any, call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients where the call wants them."""
    *leaves, dout = inputs
    q, k, v, *of_segments = leaves
    with torch.set_grad_enabled(call.grad):
        if call.key_segments is None:
            out = serve(q, k, v, call.segments)
        else:
            rest = iter(of_segments)
            biases: Biases | None = None
            if call.biased is not None:
                biases = tuple(next(rest) if is_biased else None for is_biased in call.biased)
            out = serve(q, k, v, call.segments, call.key_segments, biases)
        return (out, *torch.autograd.grad(out, leaves, dout)) if call.grad else (out,)


def _defined(reference: Any, call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What `reference` gives in fp32 for the first samples, as many as keep its logits small."""
    few = max(1, CHECKED_LOGITS // (call.heads * sum(call.segments) ** 2))
    if len(inputs) > 4:  # the gradient of a bias is of all samples
        few = len(inputs[0])
    *leaves, dout = inputs
    qkv = (x[:few].detach().float().requires_grad_(call.grad) for x in leaves[:3])
    biases = (x.detach().float().requires_grad_(call.grad) for x in leaves[3:])
    return _run(reference, call, *qkv, *biases, dout[:few].float())


def _left_out(
    runs: Mapping[str, Callable[[], tuple[Tensor, ...]]], defined: Callable[[], tuple[Tensor, ...]]
) -> dict[str, str]:
    """Of these backends, sdpa among them, those that fail or are wrong, and why."""
    left_out, whose = {}, "sdpa's"
    try:
        expected = runs["sdpa"]()
    except Exception as error:  # of libraries whose errors are of any kind, here and below
        left_out["sdpa"] = _reason(error)
    if left_out:
        whose = "the definition's"
        try:
            expected = defined()
        except Exception as error:
            return dict.fromkeys(runs, f"nothing to check it with ({_reason(error)})") | left_out
    for name in [name for name in runs if name != "sdpa"]:
        try:
            trouble = _disagreement(runs[name](), expected, whose)
        except Exception as error:
            trouble = _reason(error)
        if trouble is not None:
            left_out[name] = trouble
    return left_out


def measure(
    call: Call, dtype: torch.dtype, device: torch.device,
    backends: Mapping[str, Any], obstacles: Mapping[str, str | None], timer: Timer, reference: Any,
) -> Choice | None:  # fmt: skip
    """Times every backend that serves such a call and is right; None where nothing is computed.

    Raises RuntimeError where several could serve and none does.
    """
    left_out = {name: why for name, why in obstacles.items() if why is not None}
    able = [name for name in backends if name not in left_out]
    if able == ["sdpa"]:
        return Choice("sdpa", {}, left_out)
    inputs = _make_inputs(call, dtype, device)
    if type(inputs[-1]) is not Tensor:
        return None  # a mode that only looks at shapes: what it timed would be nothing
    with torch.cuda.device_of(inputs[-1]):
        runs = {name: partial(_run, backends[name], call, *inputs) for name in able}
        left_out |= _left_out(runs, partial(_defined, reference, call, *inputs))
        able = [name for name in able if name not in left_out]
        if not able:
            raise RuntimeError(f"no backend serves: {Choice('none', {}, left_out).sentence(call)}")
        ms = dict(zip(able, timer([runs[name] for name in able]), strict=True)) if able[1:] else {}
    return Choice(min(ms, key=ms.__getitem__) if ms else able[0], ms, left_out)


def fastest(
    call: Call, dtype: torch.dtype, device: torch.device,
    backends: Mapping[str, Any], obstacles: Mapping[str, str | None], timer: Timer, reference: Any,
) -> str:  # fmt: skip
    """The backend for such calls, measured at the first of them."""
    choice = _CHOICES.get(call)
    if choice is None:
        if _UNTIMED.get():
            return "sdpa"
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "sdpa"
        choice = measure(call, dtype, device, backends, obstacles, timer, reference)
        if choice is None:
            return "sdpa"
        _CHOICES[call] = choice
        log.info("%s", choice.sentence(call))
    return choice.use
