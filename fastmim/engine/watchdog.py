"""A rank that makes no progress is noticed, on all ranks: their stacks are written down, and they end.

    limit     = --timeout + what this kind of work has been taking at most (a step, a save, a look)
    progress  = work that ended; or bytes read or written, on any rank: a slow disk is not a hang

The first work of a kind may compile and measure: it has FIRST_S more. A rank whose limit is over writes the
Python stacks of all its threads to `stacks/rank-R.txt` in the run directory; the others, which look there,
do so as well, and all exit with HUNG. While a rank waits for long and its disk is busy, it says so in
`stacks/busy-R`, so that those who wait for it go on waiting.

A process that was stopped and went on, as by Ctrl-Z, is late and not hung: time in which the watchdog itself
did not run does not count.

Limits  A thread of Python: what holds the interpreter for ever is seen by the other ranks only, and by nobody
        in a run of one process.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from fastmim.engine.ranks import Ranks

HUNG = 124  # exit status, as of timeout(1)
FIRST_S = 600.0
POLL_S = 2.0
OTHERS_S = 3 * POLL_S  # for other ranks to write their stacks down
BUSY_BYTES = 1 << 16  # between two looks: more than a line or two that is logged
FADE = 0.99  # of the longest time, with each that is shorter
FOLDER = "stacks"


class Watchdog:
    """Watches the main thread from one of its own, as a context. `timeout` 0: not at all."""

    def __init__(self, run_dir: Path, ranks: Ranks, timeout: float):
        self.folder, self.rank, self.timeout = run_dir / FOLDER, ranks.rank, timeout
        self.longest: dict[str, float] = {}
        self.kind, self.since = "step", time.monotonic()
        self.bytes, self.busy_seen = 0, ""
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.since = time.monotonic()
        if self.timeout:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        if self.thread.is_alive():
            self.thread.join()

    def beat(self) -> None:
        """A step, or what it is in the middle of, has ended."""
        now = time.monotonic()
        took = now - self.since
        self.longest[self.kind] = max(took, FADE * self.longest.get(self.kind, 0.0))
        self.since = now

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Work of another kind within a step, whose time is none of the step's."""
        outer, begun = self.kind, self.since
        start = time.monotonic()
        self.kind, self.since = kind, start
        try:
            yield
        finally:
            self.beat()
            self.kind, self.since = outer, begun + (time.monotonic() - start)

    def limit(self) -> float:
        """Seconds without progress after which this rank is taken for one that hangs."""
        longest = self.longest.get(self.kind)
        return self.timeout + (FIRST_S if longest is None else longest)

    # --- in the thread -----------------------------------------------------------------------------

    def watch(self) -> None:
        looked = time.monotonic()
        while not self.closed.wait(POLL_S):
            now = time.monotonic()
            if (missed := now - looked - POLL_S) > POLL_S:  # nobody of this process ran meanwhile
                self.since += missed
            looked = now
            if self.waited() > self.timeout / 4 and self.is_busy():
                self.since = max(self.since, now - self.timeout / 4)
            if self.waited() > self.limit() or (self.folder / "hang").exists():
                self.end()

    def waited(self) -> float:
        return time.monotonic() - self.since

    def is_busy(self) -> bool:
        """Whether this rank reads or writes, which it tells the others, or another one says so of itself."""
        total, before = bytes_moved(), self.bytes
        self.bytes = total
        if before and total - before > BUSY_BYTES:
            with suppress(OSError):
                self.folder.mkdir(exist_ok=True)
                (self.folder / f"busy-{self.rank}").write_text(str(total))
            return True
        seen = "".join(f"{path}{text_of(path)}" for path in sorted(self.folder.glob("busy-*")))
        changed, self.busy_seen = seen != self.busy_seen, seen
        return changed

    def end(self) -> None:
        """Write the stacks down, wait for the others to do so, exit."""
        waited, limit = self.waited(), self.limit()
        path = self.folder / f"rank-{self.rank}.txt"
        try:
            self.folder.mkdir(exist_ok=True)
            with path.open("w") as file:
                file.write(f"rank {self.rank}: no {self.kind} ended for {waited:.0f} s, of {limit:.0f}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            (self.folder / "hang").touch()
            where = f"stacks of all threads: {self.folder}"
        except OSError as error:
            where = f"no stacks, for {path} cannot be written: {error}"
        if waited > limit:
            print(
                f"fastmim: error: rank {self.rank} hangs: no {self.kind} ended for {waited:.0f} s, "
                f"{limit:.0f} are allowed (--timeout {self.timeout:g}); {where}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        time.sleep(OTHERS_S)
        os._exit(HUNG)


def bytes_moved() -> int:
    """Bytes that this process has read and written so far, of any files; 0 where nobody counts them."""
    with suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(lines["rchar"]) + int(lines["wchar"])
    return 0


def text_of(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def forget_hang(run_dir: Path) -> None:
    """Take away what an earlier start left, but the stacks; before any rank begins to look."""
    folder = run_dir / FOLDER
    for path in [folder / "hang", *folder.glob("busy-*")]:
        path.unlink(missing_ok=True)
