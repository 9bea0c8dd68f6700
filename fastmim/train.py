"""Pre-train by masked image modeling.

deepspeed fastmim/train.py --method rmae
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# The launcher runs this file as a script, so fastmim/ itself is sys.path[0], where a module of ours
# would hide one of the standard library. Put the repository root there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# Read when torch starts OpenMP. Threads that wait without spinning cost a twentieth of the speed on an idle
# CPU, and keep five times of it beside another busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import logging

from fastmim.engine.launcher import watch_launcher
from fastmim.engine.outlast import Outlasting
from fastmim.engine.stop import STOP, Stopped

INTERRUPTED = 130  # as a shell says it: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build, run.

    Exits with 2 for what cannot be begun, 1 for what ended early, 75 for a run that was asked to stop and
    saved, 130 for Ctrl-C.
    """
    watch_launcher(STOP.ask, lambda: STOP.listening)
    if __name__ == "__main__":
        sys.stdout, sys.stderr = (stream and Outlasting(stream) for stream in (sys.stdout, sys.stderr))
    try:
        start(arguments)
    except KeyboardInterrupt as caught:
        if os.environ.get("RANK", "0") == "0":
            print("fastmim: interrupted", *caught.args, file=sys.stderr)
        leave_at_once(INTERRUPTED)


def leave_at_once(status: int) -> NoReturn:
    """Not by the end of torch, which may wait for other ranks."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)


def start(arguments: Sequence[str] | None) -> None:
    from fastmim.arguments import parse  # seconds, in which one may be interrupted as well
    from fastmim.engine.config import as_dict
    from fastmim.engine.run_dir import check_run_dir

    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        command, arguments = parse(sys.argv[1:] if arguments is None else arguments, quiet=not first)
    except ValueError as error:
        stop(error, 2, say=first)
    if command.print_config:
        if first:
            print(json.dumps(as_dict(command.run), indent=2))
        return

    try:
        check_run_dir(command.run)
    except ValueError as error:  # what one node sees of a folder is not what another does
        stop(error, 2, say=os.environ.get("LOCAL_RANK", "0") == "0")

    from fastmim.engine import pretrain  # imports DeepSpeed: seconds that --help need not take
    from fastmim.engine.deepspeed import leave_process_group
    from fastmim.engine.memory import is_out_of_memory, words_on_memory
    from fastmim.engine.ranks import lost_a_rank

    try:
        prepared = pretrain.prepare(command.run)
    except pretrain.REFUSALS as error:  # the same on every rank
        leave_process_group()
        stop(error, 2, say=first)
    try:
        pretrain.train(prepared, arguments=arguments)
    except Stopped as stopped:
        leave_process_group()
        if first:
            print(f"fastmim: {stopped}; --run-dir {prepared.run_dir} --resume continues", file=sys.stderr)
        sys.exit(stopped.status)
    except pretrain.ENDINGS as error:
        if isinstance(error, pretrain.SHARED_ENDINGS):
            leave_process_group()
        stop(error, 1, say=True)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            print(f"fastmim: error: {words_on_memory(prepared.run, prepared.plan)}", file=sys.stderr)
            leave_at_once(1)
        if not lost_a_rank(error):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"fastmim: error: rank {rank} lost another rank: {str(error).splitlines()[0]}", file=sys.stderr)
        leave_at_once(1)  # nobody answers any more
    except KeyboardInterrupt:
        saved = any(prepared.checkpoints.folder.glob("step-*"))
        hint = f"--run-dir {prepared.run_dir} --resume continues" if saved else "no checkpoint was made yet"
        raise KeyboardInterrupt(f"in training; {hint}") from None
    leave_process_group()


def stop(error: Exception, code: int, *, say: bool) -> NoReturn:
    if say:
        print(f"fastmim: error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
