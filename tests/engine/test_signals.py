"""Signals to any process of a run: it saves, says so, ends with a documented status; nobody is left."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from fastmim.engine import lock
from fastmim.engine.checkpoint import Checkpoints
from fastmim.engine.launcher import watch_launcher
from fastmim.engine.lock import InUse, RunLock
from fastmim.engine.pretrain import prepare, train
from fastmim.engine.ranks import Ranks
from fastmim.engine.stop import STOPPED, Stop, Stopped
from tests.engine.conftest import tiny_run
from tests.engine.launched import Launched, Outcome, command_of, signalled

SAVES = 25.0  # seconds until a run that was asked to stop has saved and ended
GONE = 60.0  # seconds until nothing is left of one that lost its launcher
TERM, USR1, HUP, INT, KILL = (
    getattr(signal, f"SIG{name}") for name in ["TERM", "USR1", "HUP", "INT", "KILL"]
)

# on one process, and on each of those that `deepspeed` starts for two ranks: the status that its command has
ALONE = [(TERM, STOPPED), (USR1, STOPPED), (HUP, STOPPED), (INT, 130)]
LAUNCHED = [
    (TERM, "runner", -TERM),  # DeepSpeed's runner has no handler: it is gone before the ranks have saved
    (TERM, "launch", 1),  # so says launch.py of itself
    (TERM, "rank1", STOPPED),
    (USR1, "runner", -USR1),
    (USR1, "launch", -TERM),  # the runner would have said 0
    (USR1, "rank0", STOPPED),
    (HUP, "group", -HUP),
    (INT, "launch", 1),
    (KILL, "launch", -TERM),
    (KILL, "runner", -KILL),
]


def assert_saved(found: Outcome, status: int, run_dir: Path, within: float = SAVES) -> None:
    assert (found.status, found.orphans) == (status, 0), found.text[-3000:]
    assert found.saved >= found.steps_before and found.seconds < within, found
    assert (
        "Traceback" not in found.text.partition("fastmim/train.py")[2] or "fastmim/engine" not in found.text
    )
    whole = Checkpoints(run_dir / "checkpoints", Ranks.single())._newest_whole()
    assert whole.step == found.saved


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), ALONE, ids=lambda x: getattr(x, "name", str(x)))
def test_one_process_saves_and_exits(images, tmp_path, number, status):
    found = signalled(images, tmp_path / "run", number, "rank0", ranks=1)
    assert_saved(found, status, tmp_path / "run")
    last = found.text.strip().splitlines()[-1]
    words = (
        f"stopped after step {found.saved}: {number.name}; --run-dir {tmp_path / 'run'} --resume continues"
    )
    assert last == f"fastmim: {words}"


CASES = [
    pytest.param(*case, marks=[] if case[:2] in ((TERM, "rank1"), (KILL, "launch")) else pytest.mark.long)
    for case in LAUNCHED
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "target", "status"), CASES)
def test_two_ranks_save_and_end_whoever_is_asked(images, tmp_path, number, target, status):
    found = signalled(images, tmp_path / "run", number, target)
    assert_saved(found, status, tmp_path / "run", within=GONE if number == KILL else SAVES)


@pytest.mark.slow
def test_a_killed_rank_takes_the_other_along(images, tmp_path):
    found = signalled(images, tmp_path / "run", KILL, "rank1")
    assert found.status not in (0, STOPPED) and found.orphans == 0 and found.seconds < GONE, found
    assert "rank 0 lost another rank" in found.text and "Traceback" not in found.text.partition("step ")[2]


@pytest.mark.slow
def test_ctrl_c_twice_leaves_at_once(images, tmp_path):
    """The second while the first waits for a step that takes long."""
    run = Launched.start(tmp_path / "run", command_of(tmp_path / "run", images, "--batch", "64"))
    try:
        run.wait_for_steps()
        pid = run.roles()["rank0"]
        os.kill(pid, INT)
        os.kill(pid, INT)  # as soon: a launcher that passes it on
        assert run.end(SAVES)[0] == 130
        assert run.saved() > 0
    finally:
        run.kill()
    stop = Stop()
    with stop.listen():
        stop.hear(INT, None)
        stop.interrupted_at -= 2.0
        with pytest.raises(KeyboardInterrupt):
            stop.hear(INT, None)


def test_under_nohup_a_hangup_is_nothing(images, tmp_path):
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        stop = Stop()
        with stop.listen():
            os.kill(os.getpid(), HUP)
            time.sleep(0.01)
            assert stop.why is None and signal.getsignal(HUP) is signal.SIG_IGN
            assert signal.getsignal(TERM) == stop.hear
    finally:
        signal.signal(HUP, before)


def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(images, tmp_path):
    """A signal in mid-epoch, in the middle of a forward; rows and weights are the same."""
    from safetensors.torch import load_file

    train(prepare(tiny_run(images, tmp_path / "whole", steps=12, save_every=100)))
    p = prepare(tiny_run(images, tmp_path / "run", steps=12, save_every=100))
    forward, calls = p.method.forward, iter(range(1, 100))

    def asked_in_the_seventh(batch):
        if next(calls) == 7:
            os.kill(os.getpid(), TERM)
        return forward(batch)

    p.method.forward = asked_in_the_seventh
    with pytest.raises(Stopped, match="^stopped after step 7: SIGTERM$") as stopped:
        train(p)
    assert stopped.value.status == STOPPED and not list((tmp_path / "run").glob("*.safetensors"))
    train(prepare(tiny_run(images, tmp_path / "run", steps=12, save_every=100, resume=True)))
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all((whole[name] == again[name]).all() for name in whole)


def test_a_signal_after_the_last_step_lets_the_run_finish(images, tmp_path):
    p = prepare(tiny_run(images, tmp_path, steps=3))
    forward, calls = p.method.forward, iter(range(1, 100))

    def asked_in_the_last(batch):
        if next(calls) == 3:
            os.kill(os.getpid(), TERM)
        return forward(batch)

    p.method.forward = asked_in_the_last
    train(p)
    assert (tmp_path / "encoder.safetensors").exists()


@pytest.mark.slow
def test_a_second_run_in_the_directory_is_refused_and_a_resume_waits(images, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    run = Launched.start(run_dir, command_of(run_dir, images, "--save-every", "2"))
    try:
        run.wait_for_steps()
        pid = run.roles()["rank0"]
        with pytest.raises(InUse, match=f"in use by process {pid} on .* since 20.*; stop that"):
            RunLock(run_dir).acquire()
        monkeypatch.setattr(lock, "WAIT_S", 0.0)
        with pytest.raises(RuntimeError, match="locking the run directory failed: InUse"):
            prepare(tiny_run(images, run_dir, resume=True))
        os.kill(pid, KILL)
        run.child.wait()
        RunLock(run_dir).acquire()  # it ended with its holder
    finally:
        run.kill()


@pytest.mark.slow
def test_output_that_nobody_reads_any_more_ends_nothing(images, tmp_path):
    reader, writer = os.pipe()
    command = command_of(tmp_path / "run", images)
    with open(tmp_path / "said", "w") as said:
        child = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=writer, stderr=said)
    os.close(writer)
    run = Launched(tmp_path / "run", child, tmp_path / "said")
    try:
        run.wait_for_steps()
        os.close(reader)
        run.wait_for_steps(20)
        os.kill(child.pid, TERM)
        assert run.end(SAVES)[0] == STOPPED, run.text()
    finally:
        run.kill()


def test_only_a_process_that_a_launcher_started_watches_one(monkeypatch):
    started = []
    monkeypatch.setattr(threading.Thread, "start", lambda self: started.append(self.name))
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    watch_launcher(print, bool)
    monkeypatch.setenv("LOCAL_RANK", "0")  # which the engine sets for one process
    watch_launcher(print, bool)
    assert started == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    watch_launcher(print, bool)
    assert started == ["launcher"]
