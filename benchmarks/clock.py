"""Time of calls on this device, and the rates that it reaches.

Providers take turns in rounds, so that a clock that drifts drifts for all. On CUDA the L2 is filled with
other data before each call, and the device kept busy while the host queues it, as long as that takes: the
time is the device's, without that of the host.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from benchmarks.provenance import DEVICE

QUANTILES = (0.2, 0.5, 0.8)
ROUND_MS = 60.0  # of each provider's own time in a round
FLUSH_BYTES = 256 * 2**20  # more than any L2
HEAD_START = 2.0  # of the host's time to queue a call: as long as the device is kept busy before it
LEAST_HEAD_START_MS = 0.5
CALIBRATION_CYCLES = 20_000_000  # about ten milliseconds


def quantiles(values: Sequence[float]) -> list[float]:
    """The 20th, 50th and 80th percentile."""
    return (
        torch.tensor(values, dtype=torch.float64)
        .quantile(torch.tensor(QUANTILES, dtype=torch.float64))
        .tolist()
    )


@cache
def flush_buffer() -> Tensor:
    return torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def flush() -> None:
    """Fill the L2 with what no call wants, by reading: what is written leaves it in the call's own time."""
    flush_buffer().amax()


@cache
def cycles_per_ms() -> float:
    """Of the device's clock, as `torch.cuda._sleep` counts it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first may be of a clock that has yet to rise
        start.record()
        torch.cuda._sleep(CALIBRATION_CYCLES)
        end.record()
        torch.cuda.synchronize()
    return CALIBRATION_CYCLES / start.elapsed_time(end)


def host_ms(run: Callable[[], object]) -> float:
    """Milliseconds until the call returns to the host with an empty queue; the second of two calls."""
    taken = 0.0
    for _ in range(2):  # the first may compile
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        taken = (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    return taken


def samples(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of `count` calls."""
    if DEVICE == "cpu":
        times = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    head_start = int(max(LEAST_HEAD_START_MS, HEAD_START * host_ms(run)) * cycles_per_ms())
    events = []
    for _ in range(count):
        flush()
        torch.cuda._sleep(head_start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        events.append((before, after))
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def take_turns(
    runs: Sequence[Callable[[], object]], rounds: int, round_ms: float | None = None
) -> list[list[float]]:
    """Milliseconds of the calls of each, taken in rounds whose order is turned each time.

    In a round each is called for `round_ms` of its own time (None: ROUND_MS), 3 to 100 times.
    """
    own_ms = ROUND_MS if round_ms is None else round_ms
    counts = [max(3, min(100, round(own_ms / min(samples(run, 3))))) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for i in range(len(runs))[:: 1 if turn % 2 == 0 else -1]:
            times[i] += samples(runs[i], counts[i])
    return times


@cache
def copy_gb_per_s() -> float:
    """Bytes read and written per second by a copy, of random values too large for any cache."""
    source = torch.randint(0, 256, (2**30 if DEVICE == "cuda" else 2**26,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / quantiles(samples(lambda: target.copy_(source), 20))[1] / 1e6


@cache
def matmul_tflop_per_s(dtype: torch.dtype) -> float:
    """What the library reaches on one large square product of random values."""
    n = 8192 if DEVICE == "cuda" else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    samples(lambda: a @ b, 5)
    return 2 * n**3 / quantiles(samples(lambda: a @ b, 30))[1] / 1e9
