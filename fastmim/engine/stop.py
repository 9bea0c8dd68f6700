"""Being asked to stop: by a signal, or because the launcher is gone. The run saves after the step and ends.

    SIGTERM, SIGUSR1, SIGHUP    save after this step, on all ranks, and exit with STOPPED
    SIGINT                      the same, and exit with 130; a second one leaves at once
    the launcher ends           the same, whatever ended it

A signal that was ignored when the process began, as SIGHUP under nohup, stays ignored. One rank that is asked
is enough: ranks tell one another after each step, and read the answers of the step before, so that nobody
waits for a message on its way.

Limits  A step, a look at validation images or a save that is under way ends first: what these take comes on
        top. Signals work in a process's main thread only.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds, and the launcher is watched from the first
    from fastmim.engine.ranks import Ranks

STOPPED = 75  # exit status of a run that saved as it was asked to: EX_TEMPFAIL, --resume continues
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
TWICE_S = 1.0  # a launcher passes Ctrl-C on: a second one as soon is the same


class Stopped(RuntimeError):
    """The run saved and ended early, as it was asked to. `status` is what the process exits with."""

    def __init__(self, words: str, status: int):
        super().__init__(words)
        self.status = status


class Stop:
    """Whether this process was asked to stop, why, and since when; there is one in a process."""

    def __init__(self) -> None:
        self.why: str | None = None
        self.interrupted_at: float | None = None
        self.listening = False  # whether somebody asks after each step

    def ask(self, why: str) -> None:
        """Ask for it; the first reason counts."""
        if self.why is None:
            self.why = why

    @property
    def status(self) -> int:
        """What a process exits with that was stopped for this reason."""
        return 130 if self.why == "SIGINT" else STOPPED

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take signals as questions while this runs."""
        self.why, self.interrupted_at, before = None, None, {}
        if threading.current_thread() is threading.main_thread():
            before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
        self.listening = True
        try:
            for number in before:
                signal.signal(number, self.hear)
            yield
        finally:
            self.listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def hear(self, number: int, _: Any) -> None:
        """The handler. A second SIGINT is a KeyboardInterrupt."""
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted_at is not None and now - self.interrupted_at > TWICE_S:
                raise KeyboardInterrupt
            self.interrupted_at = self.interrupted_at or now
        self.ask(signal.Signals(number).name)


STOP = Stop()


class Agreement:
    """Whether any rank was asked to stop, known to all of them after the same step."""

    def __init__(self, stop: Stop, ranks: "Ranks"):
        self.stop, self.ranks = stop, ranks
        self.answer: Callable[[], bool] | None = None

    def reached(self) -> bool:
        """Of the step before, on more than one rank; a call for all of them at once, after each step."""
        if self.ranks.world == 1:
            return self.stop.why is not None
        before, self.answer = self.answer, self.ranks.ask_any(self.stop.why is not None)
        if before is None or not before():
            return False
        self.stop.ask("another rank was asked to")
        return True

    def close(self) -> None:
        """Take the last answer, so that nothing is under way."""
        if self.answer is not None:
            self.answer()
            self.answer = None
