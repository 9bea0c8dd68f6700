"""A process that waits with its imports done, runs one part of the round, and ends.

-m benchmarks.gpu.worker MODULE...      to import, and with torch among them to open the device

The round keeps one of these ready while another works: importing torch and DeepSpeed and opening the device
take as long as many a measurement. On stdin comes one line of JSON, an `Order`. The pipe then stays open as
long as the round lives; when it closes, however that came, the process ends itself and its children.
"""

import json
import os
import runpy
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).resolve().parents[2]


class Order(TypedDict):
    command: list[str]  # behind the interpreter: -m MODULE ARGUMENTS, or -c CODE
    log: str  # where what it says goes


def read_line(pipe: int) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(pipe, 1)):
        line += byte
    return line


def end_with(pipe: int) -> None:
    """Kill this process and its children once nobody holds the other end."""
    while os.read(pipe, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def prepare(modules: Sequence[str]) -> None:
    """What every part imports and opens. One that fails is met again, and told, by the part that needs it."""
    for name in modules:
        try:
            import_module(name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.empty(1, device="cuda")


def run(command: list[str]) -> None:
    """As the interpreter would: the same argv, the same `__main__`."""
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "-c", "exec"), {"__name__": "__main__"})
        return
    module = command[1]
    file = ROOT / (module.replace(".", "/") + ".py")  # what `python -m` puts there, and rows quote
    sys.argv = [str(file), *command[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    pipe = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    prepare(sys.argv[1:])
    line = read_line(pipe)
    if not line:  # the round is over
        return
    order: Order = json.loads(line)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    sys.stdout.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=end_with, args=(pipe,), daemon=True).start()
    run(order["command"])


if __name__ == "__main__":
    main()
