"""The side of pytest in benchmarks.gpu.tests, as a plugin: takes tests from a queue, tells what came of them.

All processes collect the same tests in the same order. A counter in a locked file says which is the next that
nobody has taken; a few are taken at once, so that neighbors share their fixtures. What happens is a line of
JSON in a common file: who took what, what begins, how it ended.
"""

import faulthandler
import fcntl
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

FOLDER, LIMIT, OWN, PASSED = (f"FASTMIM_TESTS_{name}" for name in ("FOLDER", "LIMIT", "OWN", "PASSED"))
AT_ONCE = 4
BROKEN = (
    77  # exit status where the CUDA context does not outlive a failure: all later tests would fail as well
)
LOST_CONTEXT = re.compile(
    r"CUDA error: .*(illegal|misaligned|device-side|unspecified|invalid (address|program))"
)


class State:
    """The folder that all processes share: the counter and the events."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "next").touch()
        (folder / "events").touch()

    def take(self, count: int, of: int) -> list[int]:
        with (self.folder / "next").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            start = int(file.read() or 0)
            file.seek(0)
            file.write(str(min(of, start + count)))
        return list(range(start, min(of, start + count)))

    def first(self) -> bool:
        """Whether nobody has asked this before."""
        try:
            (self.folder / "asked").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def tell(self, **event: Any) -> None:
        out = os.open(self.folder / "events", os.O_WRONLY | os.O_APPEND)
        os.write(out, json.dumps(event).encode() + b"\n")  # one write: whole beside those of others
        os.close(out)

    def events(self, read: int) -> tuple[list[dict[str, Any]], int]:
        """What was told since so many bytes, and how many there are now."""
        with (self.folder / "events").open("rb") as file:
            file.seek(read)
            whole, newline, _ = file.read().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()], read + len(whole) + len(newline)


class Claims:
    """What pytest calls."""

    def __init__(self) -> None:
        self.state = State(Path(os.environ[FOLDER]))
        self.limit = float(os.environ[LIMIT])
        self.number, *self.own = json.loads(os.environ[OWN])
        self.said = os.fdopen(os.dup(2), "w")  # before pytest captures it
        self.ended: dict[str, Any] = {}
        self.broken: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Without the files that passed in an earlier round."""
        passed = set(json.loads(os.environ[PASSED]))
        items[:] = [item for item in items if item.nodeid.partition("::")[0] not in passed]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.broken.append(f"{report.nodeid}: {reason(report)}")

    def pytest_runtestloop(self, session: Any) -> bool:
        items = session.items
        if self.state.first():
            names = [item.nodeid for item in items]
            self.state.tell(process=self.number, names=names, broken=self.broken)
        mine = list(self.own)
        while mine or (mine := self.take(len(items))):
            test = mine.pop(0)
            if not mine:
                mine = self.take(len(items))
            self.run(test, items[test], items[mine[0]] if mine else None)
        return True

    def take(self, of: int) -> list[int]:
        took = self.state.take(AT_ONCE, of)
        if took:
            self.state.tell(process=self.number, took=took)
        return took

    def run(self, test: int, item: Any, following: Any) -> None:
        self.ended = {"outcome": "passed", "why": "", "seconds": 0.0}
        self.state.tell(process=self.number, begins=test)
        faulthandler.dump_traceback_later(self.limit, exit=True, file=self.said)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        faulthandler.cancel_dump_traceback_later()
        self.state.tell(process=self.number, ended=test, **self.ended)
        if LOST_CONTEXT.search(self.ended["why"]):
            self.said.flush()
            os._exit(BROKEN)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ended["seconds"] += report.duration
        if report.failed:
            self.ended |= {"outcome": "failed", "why": reason(report)}
        elif report.skipped and self.ended["outcome"] == "passed":
            self.ended["outcome"] = "skipped"


def reason(report: Any) -> str:
    """Where it failed and the line of the assertion, or the exception."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return str(report.longrepr).strip().splitlines()[-1][:300]
    lines = [line.strip() for line in crash.message.splitlines() if line.strip()]
    return f"{Path(crash.path).name}:{crash.lineno}: {' | '.join(lines[:3])[:300]}"


def pytest_configure(config: Any) -> None:
    if os.environ.get(FOLDER):
        config.pluginmanager.register(Claims(), "claims")


if __name__ == "__main__":
    sys.exit("a plugin of pytest: python -m benchmarks.gpu.tests")
