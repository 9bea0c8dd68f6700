"""What shows a run to people while it trains, behind a thread: it may fail, hang or lose the disk.

Rows in metrics.jsonl are written first and are the source. What a tracker is to be told goes into a queue of
`ROOM` calls, which a thread of its own empties. Whatever that raises is said once and ends that tracker; a
queue that is full loses what comes; a tracker that does not come back is left behind at the end.
"""

import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ROOM = 10_000
CLOSE_S = 10.0  # for a tracker to write what it still has


class Tracker:
    """A writer made by `make` in a thread, with the methods of TensorBoard's SummaryWriter."""

    def __init__(self, make: Callable[[], Any], name: str):
        self.make, self.name = make, name
        self.calls: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(ROOM)
        self.failed = False
        self.thread = threading.Thread(target=self.work, name=name, daemon=True)
        self.thread.start()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.put("add_scalar", name, value, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self.put("add_text", name, text, step)

    def put(self, method: str, *arguments: Any) -> None:
        """Queue a call. Never waits, never raises."""
        if self.failed:
            return
        try:
            self.calls.put_nowait((method, arguments))
        except queue.Full:
            self.fail(f"it has taken none of {ROOM} calls")

    def close(self) -> None:
        """Let it write what is queued, for CLOSE_S at most."""
        if not self.failed:
            try:
                self.calls.put(None, timeout=CLOSE_S)
            except queue.Full:
                self.fail("it does not come back")
        self.thread.join(0.0 if self.failed else CLOSE_S)
        if self.thread.is_alive() and not self.failed:
            self.fail(f"it did not end within {CLOSE_S:g} s")

    def fail(self, why: str) -> None:
        if not self.failed:
            self.failed = True
            tqdm.write(
                f"{'warning':>8}  {self.name} stops: {why}. Training goes on, metrics.jsonl has every row",
                file=sys.stdout,
            )

    def work(self) -> None:
        try:
            writer = self.make()
            while (call := self.calls.get()) is not None:
                method, arguments = call
                getattr(writer, method)(*arguments)
            writer.close()
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")


def tensorboard(run_dir: Path, start_step: int) -> Tracker:
    """TensorBoard's events in the run directory; those of steps that are made anew are hidden."""
    purge = start_step + 1 if start_step else None
    return Tracker(lambda: SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge), "TensorBoard")
