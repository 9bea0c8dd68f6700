"""The process that launched this rank, watched: when it ends, so do we.

    deepspeed (the runner)  ->  deepspeed.launcher.launch  ->  ranks

DeepSpeed's runner has no handler for signals on one node, its launch.py none but for SIGINT and SIGTERM:
what kills one of them leaves all below it training on, and nobody waits for them. So a rank watches its
parent, and the runner above it. When one ends the run saves and stops, as by a signal; where no loop runs
yet, or GRACE_S later, the process ends.

The runner of DeepSpeed 0.19.8 takes a launch.py that a signal killed for a success and exits with 0. It gets
SIGTERM from the first rank that sees it, and so another status.

Imports nothing that takes time: it begins with the process.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

GRACE_S = 55.0  # to save, after which nothing of a run is left
POLL_S = 0.5
NAME = "launcher"  # of the thread: there is one


def watch_launcher(ask: Callable[[str], None], listening: Callable[[], bool]) -> None:
    """Watch from a thread of its own, if a launcher started this process; else do nothing.

    `ask` is told why to stop; where `listening` is false the process ends at once.
    """
    watched = any(thread.name == NAME for thread in threading.enumerate())
    if watched or not {"LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return
    parent = os.getppid()
    runner = runner_above(parent)
    watch = threading.Thread(
        target=wait_and_end, args=(parent, runner, ask, listening), name=NAME, daemon=True
    )
    watch.start()


def wait_and_end(
    parent: int, runner: int | None, ask: Callable[[str], None], listening: Callable[[], bool]
) -> None:
    wait_for_any([pid for pid in (parent, runner) if pid is not None])
    if os.getppid() != parent and runner is not None:
        with suppress(OSError):
            os.kill(runner, signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    while listening() and time.monotonic() < end:
        ask("the launcher ended")  # again: a loop may just have begun
        time.sleep(POLL_S)
    if not listening():
        time.sleep(POLL_S)  # it may be on its way out
    os._exit(1)


def wait_for_any(pids: list[int]) -> None:
    """Return when one of these processes has ended."""
    try:
        poller, opened = select.poll(), [os.pidfd_open(pid) for pid in pids]
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # a kernel before 5.3
        parent = os.getppid()
        while os.getppid() == parent and all(is_there(pid) for pid in pids):
            time.sleep(POLL_S)
        return
    for descriptor in opened:
        poller.register(descriptor, select.POLLIN)
    poller.poll()
    for descriptor in opened:
        os.close(descriptor)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def runner_above(parent: int) -> int | None:
    """The runner of DeepSpeed, if it started the launch.py that started us; None under other launchers."""
    if "deepspeed.launcher.launch" not in command_of(parent):
        return None
    with suppress(OSError, IndexError, ValueError):
        # "pid (name) state ppid": a name may hold anything
        above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        return above if "deepspeed" in command_of(above) else None
    return None


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    return ""
