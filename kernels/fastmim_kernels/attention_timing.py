"""Which backend of attention.py is the fastest: each kind of call is measured once, on the device it is for.

What is timed is what will run: forward, and backward where a gradient is wanted, in the same dtype, shape and
layout, on random values. The batch is the power of two that the call's own reaches, but no more than HEADS
heads of all samples, which fill a GPU several times over: the memory it takes is bounded, and larger batches
rank alike. A backend that fails, or does not agree with sdpa, is left out and named.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

Serve = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]
Timer = Callable[[Sequence[Callable[[], object]]], list[float]]
Layout = Literal["plain", "packed", "heads"]  # [B, T, H, d]; a third of [B, T, 3, H, d]; [B, H, T, d]

HEADS = 4096
TURNS, CALLS = 7, 2  # timed: so many rounds, in each so many calls of each backend
HEAD_START_CYCLES = 4_000_000  # about two milliseconds, in which the host queues these calls
TOLERANCE = 2e-2  # of the largest value of each output: five steps of bf16

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


@dataclass(frozen=True)
class Choice:
    use: str
    ms: dict[str, float]  # of each backend that was timed; none where one alone can serve
    left_out: dict[str, str]  # of the others, why

    def sentence(self, call: Call) -> str:
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.ms.items())
        passes = "forward and backward" if call.grad else "forward"
        reasons = "; ".join(f"no {name}: {why}" for name, why in self.left_out.items())
        return (
            f"attention of {' + '.join(map(str, call.segments))} tokens, {call.heads} heads of {call.width}, "
            f"batch {call.batch}, {call.dtype}, {passes}: {self.use} "
            f"({'; '.join(filter(None, (times, reasons)))})"
        )


_CHOICES: dict[Call, Choice] = {}


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
        _CHOICES[Call(**{**fields, "segments": tuple(fields["segments"])})] = choice


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
    """q, k, v and the gradient of the output, random, by a generator that no one else draws from."""
    rng = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=rng, device=device, dtype=dtype)
    B, T, H, d = call.batch, sum(call.segments), call.heads, call.width
    if call.layout == "packed":
        qkv = list(randn(B, T, 3, H, d).unbind(2))
    elif call.layout == "heads":
        qkv = [randn(B, H, T, d).transpose(1, 2) for _ in range(3)]
    else:
        qkv = [randn(B, T, H, d) for _ in range(3)]
    return [*(x.requires_grad_(call.grad) for x in qkv), randn(B, T, H, d)]


def _disagreement(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    largest = [e.float().abs().max() for e in expected]
    for a, e, own in zip(actual, expected, largest, strict=True):
        # of one token dq and dk are zero, and what is left of them is rounding
        scale = torch.maximum(own, 1e-3 * torch.stack(largest).max())
        error = ((a.float() - e.float()).abs().max() / scale).item()
        if not error <= TOLERANCE:
            return f"off by {error:.2g} of sdpa's largest value"
    return None


def measure(
    call: Call, dtype: torch.dtype, device: torch.device,
    backends: Mapping[str, Serve], obstacles: Mapping[str, str | None], timer: Timer,
) -> Choice | None:  # fmt: skip
    """Times every backend that serves such a call and agrees with sdpa; None where nothing is computed."""
    left_out = {name: why for name, why in obstacles.items() if why is not None}
    others = [name for name in backends if name not in left_out and name != "sdpa"]
    if not others:
        return Choice("sdpa", {}, left_out)
    q, k, v, dout = _make_inputs(call, dtype, device)
    if type(dout) is not Tensor:
        return None  # a mode that only looks at shapes: what it timed would be nothing

    def run(name: str) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(call.grad):
            out = backends[name](q, k, v, call.segments)
            return (out, *torch.autograd.grad(out, (q, k, v), dout)) if call.grad else (out,)

    with torch.cuda.device_of(dout):
        expected = run("sdpa")
        for name in others:
            try:
                trouble = _disagreement(run(name), expected)
            except Exception as error:  # of a package whose errors are of any kind
                trouble = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"
            if trouble is not None:
                left_out[name] = trouble
        able = [name for name in backends if name not in left_out]
        ms = dict(zip(able, timer([partial(run, name) for name in able]), strict=True)) if able[1:] else {}
    return Choice(min(ms, key=ms.__getitem__) if ms else "sdpa", ms, left_out)


def fastest(
    call: Call, dtype: torch.dtype, device: torch.device,
    backends: Mapping[str, Serve], obstacles: Mapping[str, str | None], timer: Timer,
) -> str:  # fmt: skip
    """The backend for such calls, measured at the first of them."""
    choice = _CHOICES.get(call)
    if choice is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "sdpa"
        choice = measure(call, dtype, device, backends, obstacles, timer)
        if choice is None:
            return "sdpa"
        _CHOICES[call] = choice
        log.info("%s", choice.sentence(call))
    return choice.use
