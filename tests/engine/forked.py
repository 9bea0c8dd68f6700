"""Forked processes for the tests of ranks and checkpoints: no import of torch to wait for, a real SIGKILL.

Process groups are made in children of a fresh process (`run_script`), never of pytest's, which may be in one.
"""

import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastmim.engine.ranks import Ranks

TIMEOUT_S = 60  # of a collective that waits for a killed rank
HANGING_S = 600  # after which a child is taken for one that hangs: a busy machine is ten times as slow


class Child:
    """`fn()` in a forked process. `result()` is what it returned; ("raised", type name, text) if it raised;
    None if it was killed."""

    def __init__(self, fn: Callable[[], Any]):
        sys.stdout.flush()
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            run_and_exit(fn, writer)
        os.close(writer)
        self.pipe = os.fdopen(reader, "rb")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def result(self) -> Any:
        with self.pipe:
            answer = self.pipe.read()
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        assert status == 0, f"the child ended with status {status}"
        return pickle.loads(answer)


def run_and_exit(fn: Callable[[], Any], writer: int) -> None:
    """Never returns into pytest."""
    try:
        signal.alarm(HANGING_S)  # a child that hangs ends with another signal than SIGKILL
        torch.set_num_threads(1)  # OpenMP's threads did not come along
        try:
            answer = fn()
        except Exception as error:
            answer = ("raised", type(error).__name__, str(error))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def start_ranks(world: int, fn: Callable[[Ranks], Any]) -> list[Child]:
    """`fn(ranks)` in `world` processes of one gloo group."""
    store = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"

    def rank_main(rank: int) -> Any:
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        dist.init_process_group(
            "gloo", f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S)
        )
        ranks = Ranks.from_environment()
        ranks.barrier()  # all have met: one that ends at once does not close the door on the others
        return fn(ranks)

    return [Child(lambda rank=rank: rank_main(rank)) for rank in range(world)]


def on_ranks(world: int, fn: Callable[[Ranks], Any]) -> list[Any]:
    """What each rank's `fn(ranks)` gave, as `Child.result` says."""
    return [child.result() for child in start_ranks(world, fn)]


@cache
def imported() -> ForkServerContext:
    """Starts processes as forks of one that has imported the engine and DeepSpeed, and done no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastmim.engine.pretrain"])
    return context


def run_script(script: Path, *arguments: str) -> None:
    """As `python script arguments` does, in a fork; raises with what it printed if it fails."""
    with tempfile.NamedTemporaryFile("r", prefix="said-") as said:
        child = imported().Process(target=be_script, args=(script, arguments, said.name))
        child.start()
        child.join(2 * HANGING_S)
        child.kill()
        child.join()
        assert child.exitcode == 0, f"{script.name} ended with status {child.exitcode}: {said.read()[-6000:]}"


def be_script(script: Path, arguments: Sequence[str], said: str) -> None:
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def scenarios(script: Path, *names: str) -> dict[str, Any]:
    """What `main` of the script gathered in a process of its own: of these functions, or of all."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results"
        run_script(script, str(out), *names)
        return pickle.loads(out.read_bytes())


def main(functions: list[Callable[[Path], Any]]) -> None:
    """Call each, or those that argv names, with an empty folder; leave their results in the file it names."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # the stores of the ranks go with it
        for fn in (f for f in functions if f.__name__ in (sys.argv[2:] or [f.__name__])):
            (Path(folder) / fn.__name__).mkdir()
            results[fn.__name__] = fn(Path(folder) / fn.__name__)
    Path(sys.argv[1]).write_bytes(pickle.dumps(results))
