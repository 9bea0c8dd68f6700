"""Run a program on the null CUDA device, in the tree that is the working directory.

.venv-cuda/bin/python -m tests.null_gpu.run SCRIPT.py ARGUMENTS...      a script of Python, or -c, or -m
.venv-cuda/bin/python -m tests.null_gpu.run deepspeed fastmim/train.py  or a command of the environment

All processes that it starts see the device: torch.cuda is available, and nothing is computed. Variables:

    NULL_CUDA_DEVICES=2      so many devices; 1 if unset
    NULL_CUDA_COUNTS=FOLDER  every process writes what it counted to FOLDER/PID.tsv when it ends
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.null_gpu.build import Unavailable, library


def environment(base: Mapping[str, str], tree: Path) -> dict[str, str]:
    """What a process needs to see the device, and to import `tree`. Raises Unavailable."""
    built = library()
    found = [str(tree), str(tree / "kernels"), str(built.parent / "plugin"), base.get("PYTHONPATH", "")]
    return {
        **base,
        "LD_PRELOAD": " ".join(filter(None, (str(built), base.get("LD_PRELOAD", "")))),
        "NULL_CUDA": str(built),
        "TRITON_LIBCUDA_PATH": str(built.parent),
        "PYTHONPATH": os.pathsep.join(filter(None, found)),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), base.get("PATH", ""))),
    }


def command(arguments: list[str]) -> list[str]:
    """Scripts and Python's own flags go to this interpreter, everything else is a command."""
    if arguments[0].endswith(".py") or arguments[0].startswith("-"):
        return [sys.executable, *arguments]
    return arguments


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    try:
        variables = environment(os.environ, Path.cwd())
    except Unavailable as error:
        sys.exit(f"null CUDA device: {error}")
    run = command(arguments)
    os.execvpe(run[0], run, variables)


if __name__ == "__main__":
    main()
