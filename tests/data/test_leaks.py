"""What a loader took it gives back: at its end, when its consumer fails, and when it is interrupted."""

import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.pipeline import soak
from benchmarks.pipeline.soak import Held, growth, left_after_closing
from fastmim.data import Loader, find_images

from .conftest import take


def test_memory_is_flat_over_epochs(folder, decoder, capsys):
    """The short form of `python -m benchmarks.pipeline.soak`."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    flags = f"--epochs 14 --warm-up 6 --batch 8 --size 32 --threads 2 --decoder {decoder}"
    status = soak.main([str(folder), *flags.split()])
    shown = capsys.readouterr().out
    assert status == 0 and "left after closing: nothing" in shown, shown


def test_a_leak_of_memory_is_seen(monkeypatch, capsys, folder):
    kept, real = [], Loader.__next__

    def leak(self):
        kept.append(mmap.mmap(-1, 8 * 2**20))  # new pages, not what earlier tests freed
        kept[-1].write(b"1" * len(kept[-1]))
        return real(self)

    monkeypatch.setattr(Loader, "__next__", leak)
    assert (
        soak.main([str(folder), "--epochs", "6", "--batch", "4", "--size", "16", "--decoder", "pillow"]) == 1
    )
    assert "LEAKS" in capsys.readouterr().out


def test_a_thread_and_a_process_left_are_seen():
    before, go = Held.now(), threading.Event()
    thread, child = threading.Thread(target=go.wait), subprocess.Popen(["sleep", "60"])
    thread.start()
    try:
        left = left_after_closing(before, 0.0)
    finally:
        go.set()
        child.kill()
        child.wait()
    assert [words.split(":")[0] for words in left] == ["1 threads", "1 children"]
    assert left_after_closing(before) == []


def test_growth_is_counted_from_the_warm_up():
    rows = [{"host": mib} for mib in (50.0, 100.0, 101.0, 103.0)]
    assert growth(rows, 2) == pytest.approx({"host": 0.03})


@pytest.mark.parametrize("how", ["closed", "with", "forgotten", "exhausted by bad files"])
def test_a_consumer_that_fails_leaves_nothing(how, folder, open_loader, decoder, tmp_path):
    images = find_images(folder)
    take(open_loader(images, decoder), 1)  # what a process starts once for all
    gc.collect()
    before = Held.now()

    def consume():
        loader = open_loader(images, decoder)
        if how == "closed":
            next(loader)
            loader.close()
            raise ZeroDivisionError
        if how == "with":
            with loader:
                for _ in loader:
                    raise ZeroDivisionError
        if how == "exhausted by bad files":
            for path in folder.rglob("*.jpg"):
                path.write_bytes(b"")
        for i, _ in enumerate(loader):
            if i == 2:
                raise ZeroDivisionError

    with pytest.raises((ZeroDivisionError, ValueError)):
        consume()
    open_loader.opened.clear()  # the fixture holds them too
    assert left_after_closing(before) == []


ENDLESS = """
import sys
from pathlib import Path
from fastmim.data import DataConfig, find_images, open_loader
from fastmim.views import Crop
config = DataConfig(decoder=sys.argv[2], threads=2)
loader = open_loader(find_images(Path(sys.argv[1])), [Crop(size=(16, 16))], 8, config=config)
for i, batch in enumerate(loader):
    if i == 5:
        print("running", flush=True)
"""


def test_an_interrupted_script_ends_at_once(folder, decoder):
    shared = set(Path("/dev/shm").iterdir())
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(folder), decoder], env=os.environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert child.stdout.readline() == "running\n"
    start = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=300)
    assert time.monotonic() - start < 100  # a worker that waits for an image waits for ever
    assert child.returncode == -signal.SIGINT, said[-2000:]
    assert said.count("Traceback") == 1 and said.strip().endswith("KeyboardInterrupt"), said[-2000:]
    with pytest.raises(ProcessLookupError):  # nobody of its session is left
        os.killpg(child.pid, 0)
    assert set(Path("/dev/shm").iterdir()) <= shared
