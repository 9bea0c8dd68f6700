"""Disks that stutter: what fails is read again for a minute, and never taken for a bad file.

What a file system says while it is away (EIO, a time-out, a connection that was reset, no descriptors left)
says nothing of the image. It is said once for each outage. After WAIT_S the disk is given up.
"""

import errno
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

WAIT_S, FIRST_S, LONGEST_S = 60.0, 0.1, 5.0  # in all; before the first try again; before any
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "EAGAIN", "ETIMEDOUT", "EREMOTEIO", "ECONNRESET", "ECONNABORTED", "ENETDOWN", "ENETUNREACH",
        "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "ESHUTDOWN", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS",
    )
)  # fmt: skip


class DiskError(OSError):
    """A disk that does not answer for WAIT_S."""


class Outage:
    """What is said of the errors of all threads: once when they begin, once when they end."""

    def __init__(self) -> None:
        self.lock, self.since = threading.Lock(), 0.0

    def begin(self, where: Path, error: OSError) -> None:
        with self.lock:
            if not self.since:
                self.since = time.monotonic()
                say(f"{where}: {error.strerror}: reading is tried again for {WAIT_S:.0f} s")

    def end(self) -> None:
        with self.lock:
            if self.since:
                say(f"reading works again, after {time.monotonic() - self.since:.1f} s")
                self.since = 0.0


OUTAGE = Outage()


def patiently(read: Callable[[], T], where: Path) -> T:
    """`read()`, again while it fails for reasons that pass. DiskError, with the path, after WAIT_S."""
    end, pause = time.monotonic() + WAIT_S, FIRST_S
    failed = False
    while True:
        try:
            value = read()
        except OSError as error:
            if error.errno not in PASSING or isinstance(error, DiskError):
                raise
            failed = True
            OUTAGE.begin(where, error)
            if time.monotonic() + pause > end:
                raise DiskError(
                    error.errno, f"{error.strerror}, for {WAIT_S:.0f} s: the disk is gone", str(where)
                ) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_S)
        else:
            if failed:
                OUTAGE.end()
            return value


def say(words: str) -> None:
    print(f"{'note':>8}  {words}", file=sys.stderr, flush=True)
