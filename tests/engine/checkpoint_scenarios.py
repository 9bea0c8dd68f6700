"""What test_checkpoint saves, and the scenes of two ranks that it looks at, each in a fresh process."""

import ctypes
import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmim.engine.checkpoint import Checkpoint, CheckpointError, Checkpoints
from fastmim.engine.ranks import Ranks
from tests.engine.forked import Child, main, on_ranks, start_ranks

FACTS = {"seed": 0, "model": {"width": 16}}


def shards(step: int, *, rank: int = 0, kilobytes: int = 64) -> Callable[[Path], None]:
    """A `write` of two files whose every value tells the step: by torch's own writer, and in a subfolder."""

    def write(folder: Path) -> None:
        weights = torch.full((kilobytes * 256,), step, dtype=torch.int32)
        torch.save({"weights": weights}, folder / f"shard-{rank}.pt")
        (folder / "state").mkdir(exist_ok=True)
        with open(folder / "state" / f"random-{rank}.pt", "wb") as file:
            torch.save(torch.tensor([step]), file)

    return write


def holds(found: Checkpoint, *, world: int = 1) -> bool:
    """Whether the files of the checkpoint are those of its step, on every rank."""
    return found.world == world and all(
        torch.load(found.path / f"shard-{rank}.pt", weights_only=True)["weights"].eq(found.step).all()
        and torch.load(found.path / "state" / f"random-{rank}.pt", weights_only=True).item() == found.step
        for rank in range(world)
    )


def watch(folder: Path, kill_at: int | None = None) -> list[tuple[str, ...]]:
    """Every fsync, rename, removal and opening for writing below `folder` from now on, in this process.

    At the `kill_at`-th, counted from 1, the process is killed instead. There is no way back: for children.
    """
    events: list[tuple[str, ...]] = []
    lock, real_fsync = threading.Lock(), os.fsync

    def happens(*event: str) -> None:
        if not event[1].startswith(str(folder)):
            return
        with lock:
            events.append(event)
            if len(events) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def fsync(descriptor: int) -> None:
        happens("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def hook(name: str, args: tuple) -> None:
        if name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            happens("open", os.fsdecode(args[0]) if isinstance(args[0], str | bytes | Path) else "")
        elif name == "os.rename":
            happens("rename", str(args[0]), str(args[1]))
        elif name in ("os.mkdir", "os.rmdir", "os.remove"):
            in_folder = (
                "" if args[-1] < 0 else os.readlink(f"/proc/self/fd/{args[-1]}") + "/"
            )  # as rmtree does
            happens(name, in_folder + os.fsdecode(args[0]))

    os.fsync = fsync
    sys.addaudithook(hook)
    return events


def mount_tmpfs(folder: Path, size: str) -> bool:
    """A real file system of `size` at `folder`, seen by this process and its children alone, gone with them.

    False where the kernel allows no such thing. For single-threaded children.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, recursive = 0x20000, 0x10000000, 1 << 18, 1 << 14
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(new_mounts) != 0:
        if libc.unshare(new_mounts | new_user) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    libc.mount(b"none", b"/", None, recursive | private, None)
    return libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0


def save(folder: Path, step: int, ranks: Ranks, *, kilobytes: int = 64, keep: int = 2) -> Path:
    write = shards(step, rank=ranks.rank, kilobytes=kilobytes)
    return Checkpoints(folder, ranks, keep=keep).save(step, write, facts=FACTS)


def find(folder: Path, ranks: Ranks) -> tuple[int, bool]:
    found = Checkpoints(folder, ranks).find()
    return found.step, holds(found, world=ranks.world)


def outcome(fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except CheckpointError as error:
        return "refused", str(error)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# --- two ranks ------------------------------------------------------------------------------------


def both_save(folder: Path) -> list:
    def work(ranks: Ranks):
        path = save(folder, 7, ranks, kilobytes=2048)
        return path.name, find(folder, ranks), Checkpoints(folder, ranks).at(7).facts

    return on_ranks(2, work)


def one_fails(folder: Path) -> list:
    """Rank 1 fails after it has written something, in three ways; then all is well again."""
    reasons = [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a bug"), None]

    def work(ranks: Ranks):
        save(folder, 1, ranks)
        answers = []
        for step, reason in enumerate(reasons, start=2):

            def write(path: Path, step=step, reason=reason) -> None:
                shards(step, rank=ranks.rank)(path)
                if ranks.rank == 1 and reason is not None:
                    raise reason

            made = outcome(lambda w=write, s=step: Checkpoints(folder, ranks).save(s, w, facts=FACTS).name)
            ranks.barrier()
            answers.append((made, find(folder, ranks), hidden(folder)))
            ranks.barrier()
        return answers

    return on_ranks(2, work)


def slow_rank_then_kill(folder: Path) -> list:
    """Rank 0 has written its files and waits for rank 1; both are killed."""
    on_ranks(2, lambda ranks: str(save(folder, 1, ranks)))

    def work(ranks: Ranks):
        def write(path: Path) -> None:
            if ranks.rank == 1:
                time.sleep(50)
            shards(2, rank=ranks.rank)(path)

        Checkpoints(folder, ranks).save(2, write, facts=FACTS)

    children = start_ranks(2, work)
    while not (folder / ".tmp-step-00000002" / "state" / "random-0.pt").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    for child in children:
        child.kill()
    deaths = [child.result() for child in children]
    return [deaths, hidden(folder), on_ranks(2, lambda ranks: find(folder, ranks))]


def one_killed_at_every_point(folder: Path) -> list:
    """Rank 0 dies at each of its events; rank 1 must end too. What the next start then finds, and makes."""

    def work(ranks: Ranks, where: Path, kill_at: int | None):
        events = watch(where, kill_at) if ranks.rank == 0 else []
        save(where, 3, ranks)
        return len(events)

    start = folder / "start"
    on_ranks(2, lambda ranks: [str(save(start, step, ranks)) for step in (1, 2)])
    shutil.copytree(start, folder / "count")
    count, _ = on_ranks(2, lambda ranks: work(ranks, folder / "count", None))
    answers = [count]
    for kill_at in range(1, count + 1):
        where = folder / f"{kill_at}"
        shutil.copytree(start, where)
        begun = time.monotonic()
        ends = on_ranks(2, lambda ranks, w=where, k=kill_at: work(ranks, w, k))
        seconds = time.monotonic() - begun

        def restart(ranks: Ranks, where: Path = where):
            found = find(where, ranks)
            ranks.barrier()
            save(where, 4, ranks)
            return found, find(where, ranks), len(os.listdir(where))

        answers.append((ends, seconds, on_ranks(2, restart)))
    return answers


def damaged(folder: Path) -> list:
    """The newest is damaged, then both are."""

    def work(ranks: Ranks):
        for step in (1, 2):
            save(folder, step, ranks)
        answers = []
        for step in (2, 1):
            if ranks.is_main:
                (folder / f"step-{step:08d}" / "shard-1.pt").write_bytes(b"not a shard")
            ranks.barrier()
            answers.append(outcome(lambda: find(folder, ranks)))
            ranks.barrier()
        return answers

    return on_ranks(2, work)


def folder_not_shared(folder: Path) -> list:
    """Each rank looks into a folder of its own, as with a path on a node's own disk."""

    def work(ranks: Ranks):
        own = Checkpoints(folder / f"node{ranks.rank}", ranks)
        fresh = outcome(lambda: own.save(1, shards(1, rank=ranks.rank), facts=FACTS))
        if ranks.rank == 1:  # of an earlier run of one rank there
            save(own.folder, 1, Ranks.single())
        ranks.barrier()
        none_on_rank_0 = outcome(own.find)
        if ranks.rank == 0:
            save(own.folder, 2, Ranks.single())
        ranks.barrier()
        return fresh, none_on_rank_0, outcome(own.find)

    return on_ranks(2, work)


def facts_that_are_not_json(folder: Path) -> list:
    calls = []

    def work(ranks: Ranks):
        facts = {"path": Path("x")} if ranks.is_main else {}
        answer = outcome(lambda: Checkpoints(folder, ranks).save(1, calls.append, facts=facts))
        return answer, len(calls)

    return on_ranks(2, work)


def full_disk(folder: Path) -> Any:
    """Two ranks of 2 MB each have 6 MB; the second checkpoint does not fit beside the first."""

    def on_tmpfs():
        if not mount_tmpfs(folder, "6m"):
            return None

        def work(ranks: Ranks):
            made = outcome(lambda: save(folder, 1, ranks, kilobytes=2048).name)
            full = outcome(lambda: save(folder, 2, ranks, kilobytes=2048).name)
            ranks.barrier()
            return made, full, find(folder, ranks), hidden(folder)

        return on_ranks(2, work)

    return Child(on_tmpfs).result()


if __name__ == "__main__":
    main(
        [
            both_save,
            one_fails,
            slow_rank_then_kill,
            one_killed_at_every_point,
            damaged,
            folder_not_shared,
            facts_that_are_not_json,
            full_disk,
        ]
    )
