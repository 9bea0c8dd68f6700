"""What hangs is noticed on every rank, with its stacks; what is slow, was stopped or only shows is not."""

import errno
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmim.engine import metrics, trackers, watchdog
from fastmim.engine.durable import open_to_add
from fastmim.engine.metrics import keep_rows_up_to
from fastmim.engine.pretrain import prepare, train
from fastmim.engine.ranks import Ranks
from fastmim.engine.trackers import Tracker
from fastmim.engine.watchdog import HUNG, Watchdog
from tests.engine.conftest import tiny_run
from tests.engine.forked import Child
from tests.engine.launched import Launched, command_of


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("POLL_S", 0.05), ("OTHERS_S", 0.1), ("FIRST_S", 0.5)):
        monkeypatch.setattr(watchdog, name, value)


def hung(folder: Path, work, timeout: float = 0.3) -> int:
    """Exit status of a process in which `work(watchdog)` runs, watched."""

    def watched():
        with Watchdog(folder, Ranks.single(), timeout) as dog:
            work(dog)

    child = Child(watched)
    with child.pipe:
        child.pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


def steps(dog: Watchdog, count: int = 3) -> None:
    for _ in range(count):
        time.sleep(0.05)
        dog.beat()


def test_a_step_that_does_not_end(quick, tmp_path):
    def work(dog):
        steps(dog)
        stuck_in_a_loader()

    assert hung(tmp_path, work) == HUNG
    text = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert text.startswith("rank 0: no step ended for ") and "in stuck_in_a_loader" in text


def stuck_in_a_loader() -> None:
    threading.Event().wait(20)


def test_a_save_has_a_limit_of_its_own_and_its_time_is_none_of_the_step(quick, tmp_path):
    def long_saves(dog):
        for _ in range(3):
            steps(dog)
            with dog.during("save"):
                time.sleep(0.6)  # below what the first may take, and then below what it has been taking

    assert hung(tmp_path, long_saves) == 0

    def hangs(dog):
        long_saves(dog)
        with dog.during("save"):
            time.sleep(20)

    assert hung(tmp_path, hangs) == HUNG
    assert "no save ended" in (tmp_path / "stacks" / "rank-0.txt").read_text()


def test_a_slow_disk_and_a_process_that_was_stopped_are_no_hang(quick, tmp_path):
    def slow_disk(dog):
        steps(dog)
        with dog.during("save"), open(tmp_path / "shard", "wb") as file:
            for _ in range(40):  # 2 s, well over its limit of 0.8
                file.write(bytes(1 << 17))
                file.flush()
                time.sleep(0.05)

    assert hung(tmp_path, slow_disk) == 0

    def stopped(dog):
        steps(dog)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.1)

    pid = os.fork()
    if pid == 0:
        os._exit(hung(tmp_path, stopped))
    time.sleep(0.5)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # the grandchild stops itself
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[1] == str(pid) and fields[0] == "T":
                time.sleep(1.5)  # above every limit
                os.kill(int(path.parent.name), signal.SIGCONT)
        if (done := os.waitpid(pid, os.WNOHANG))[0]:
            assert os.waitstatus_to_exitcode(done[1]) == 0
            return
        time.sleep(0.05)
    raise AssertionError("it did not end")


def test_one_that_waits_goes_on_while_another_says_that_its_disk_is_busy(quick, tmp_path):
    dog = Watchdog(tmp_path, Ranks.single(), 1.0)
    (tmp_path / "stacks").mkdir()
    assert not dog.is_busy()
    (tmp_path / "stacks" / "busy-1").write_text("12345")
    assert dog.is_busy() and not dog.is_busy()
    (tmp_path / "stacks" / "busy-1").write_text("23456")
    assert dog.is_busy()


@pytest.mark.long
def test_a_rank_that_is_stopped_is_noticed_by_the_other(images, tmp_path):
    run_dir = tmp_path / "run"
    command = command_of(run_dir, images, "--timeout", "5", ranks=2)
    run = Launched.start(run_dir, command)
    try:
        run.wait_for_steps()
        os.kill(run.roles()["rank1"], signal.SIGSTOP)
        status, seconds = run.end(100)
        assert (status, run.left()) == (HUNG, []) and seconds < 60, run.text()[-3000:]
        assert "rank 0 hangs: no step ended for" in run.text() and "Traceback" not in run.text()
        assert "train_loop" in (run_dir / "stacks" / "rank-0.txt").read_text()
    finally:
        run.kill()


def test_a_run_that_was_hung_resumes(images, tmp_path):
    run = tiny_run(images, tmp_path, steps=2)
    train(prepare(run))
    (tmp_path / "stacks").mkdir(exist_ok=True)
    (tmp_path / "stacks" / "hang").touch()
    train(prepare(replace(run, steps=4, resume=True, allow_changes=("total_steps",))))
    assert not (tmp_path / "stacks" / "hang").exists()


# --- trackers -----------------------------------------------------------------------------------------


class Bad:
    """A writer that fails in one of its ways."""

    def __init__(self, how: str):
        if how == "make":
            raise OSError(errno.ENOSPC, "No space left on device")
        self.how = how

    def add_scalar(self, *_):
        if self.how == "add":
            raise RuntimeError("no connection")
        if self.how == "hang":
            time.sleep(1000)

    add_text = add_scalar

    def close(self):
        if self.how == "close":
            raise ValueError("closed twice")
        if self.how == "hang in close":
            time.sleep(1000)


@pytest.mark.parametrize("how", ["make", "add", "hang", "close", "hang in close"])
def test_a_tracker_that_fails_or_hangs_costs_no_row(images, tmp_path, monkeypatch, capsys, how):
    monkeypatch.setattr(trackers, "CLOSE_S", 0.3)
    monkeypatch.setattr(metrics, "tensorboard", lambda *_: Tracker(lambda: Bad(how), "Bad"))
    train(prepare(tiny_run(images, tmp_path, steps=6, log_every=1)))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "encoder.safetensors").exists()
    assert capsys.readouterr().out.count("Bad stops: ") == 1


def test_a_queue_that_is_full_never_waits(monkeypatch, capsys):
    monkeypatch.setattr(trackers, "ROOM", 5)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.1)
    tracker = Tracker(lambda: Bad("hang"), "Bad")
    start = time.monotonic()
    for step in range(1000):
        tracker.add_scalar("loss", 1.0, step)
    tracker.close()
    assert time.monotonic() - start < 2
    assert capsys.readouterr().out.count("Bad stops: it has taken none of 5 calls") == 1


def test_rows_that_are_none_are_dropped_and_a_link_is_not_followed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n[]\n{"loss": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2')
    keep_rows_up_to(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        open_to_add(tmp_path / "link")


def test_a_run_directory_that_goes_away_ends_the_run_in_a_line(images, tmp_path, capsys, monkeypatch):
    """By the real command, in this process: a save finds no folder."""
    from fastmim.train import main
    from tests.engine.conftest import TINY

    run_dir = tmp_path / "run"
    monkeypatch.setattr(torch, "save", gone(run_dir, torch.save))
    where = ["--data.path", str(images), "--run-dir", str(run_dir)]
    arguments = [*TINY, *where, "--steps", "4", "--save-every", "2"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1 and "Traceback" not in "".join(said)
    assert said[-1].startswith("fastmim: error: ") and str(run_dir) in said[-1]


def gone(run_dir: Path, save):
    import shutil

    def save_into_nothing(*args, **options):
        shutil.rmtree(run_dir)
        return save(*args, **options)

    return save_into_nothing
