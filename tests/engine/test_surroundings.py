"""What a run finds around it: a notebook, no terminal, no home, another folder. It trains all the same."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fastmim.data.sources.index import cache_folder
from fastmim.engine.pretrain import prepare, train
from tests.engine.conftest import TINY, tiny_run, write_images

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = "module://matplotlib_inline.backend_inline"  # what a kernel sets for itself and its children


class Bare:
    """A stream that can write, and nothing else: no isatty, no fileno."""

    def __init__(self):
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_command_of_a_notebook_without_home_user_terminal_and_stdin(images, tmp_path):
    gone = ("HOME", "USER", "LOGNAME", "TERM", "XDG_CACHE_HOME", "FASTMIM_CACHE", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    environment |= {"MPLBACKEND": NOTEBOOK, "COLUMNS": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/kernels"}
    flags = [*TINY, "--data.path", str(images), "--run-dir", "run", "--steps", "1"]
    code = f"import os; os.close(0)\nfrom fastmim.train import main\nmain({flags})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    with Image.open(tmp_path / "run" / "loss.png") as picture:
        assert picture.size == (960, 720)


def test_the_backend_of_a_notebook_stays_for_who_shows_figures():
    """A backend that matplotlib knows is what `import matplotlib.pyplot` finds after ours."""
    code = (
        "import os, sys, fastmim.engine.pictures, matplotlib\n"
        "print(os.environ['MPLBACKEND'], matplotlib.rcParams['backend'], 'matplotlib.pyplot' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"MPLBACKEND": "svg"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.split() == ["svg", "svg", "False"], run.stderr[-3000:]


def test_streams_that_only_write_in_a_running_loop_and_another_folder(images, tmp_path, monkeypatch):
    """As in a cell: argv is the kernel's, a loop runs, stdout is no file, the user changes the folder."""
    write_images(tmp_path / "images", 16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1.json"])
    out, err = Bare(), Bare()

    async def cell() -> None:
        run = tiny_run(Path("images"), Path("runs/a"), steps=1)
        p = prepare(run)
        assert p.run.data.path == tmp_path / "images"
        with monkeypatch.context() as patch:
            patch.chdir("/")
            patch.setattr(sys, "stdin", None)
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            train(p)

    asyncio.run(cell())
    assert "step 1/1  loss" in out.text and "done" in out.text
    assert (tmp_path / "runs" / "a" / "loss.png").exists()


def test_no_stream_at_all(images, tmp_path, monkeypatch):
    run = tiny_run(images, tmp_path / "run", steps=1)
    with monkeypatch.context() as patch:
        for name in ("stdin", "stdout", "stderr"):
            patch.setattr(sys, name, None)
        train(prepare(run))
        train(prepare(replace(run, resume=True)))
    assert (tmp_path / "run" / "loss.png").exists()


def kept_at_once(monkeypatch) -> None:
    """Keep the index of any set, however small and new."""
    monkeypatch.setattr("fastmim.data.sources.index.SETTLED_NS", -(10**18))
    monkeypatch.setattr("fastmim.data.sources.folder.WORTH_KEEPING", 1)


def test_a_user_without_a_home(tmp_path, monkeypatch):
    """As in a container that was started with a number for a user: the index is made at every start."""
    images = write_images(tmp_path / "images", 16)
    kept_at_once(monkeypatch)
    for name in ("HOME", "XDG_CACHE_HOME", "FASTMIM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31)
    with pytest.raises(OSError, match="there is no home folder, nor .FASTMIM_CACHE"):
        cache_folder()
    with pytest.warns(UserWarning, match="cannot keep the index of .*: there is no home folder"):
        p = prepare(tiny_run(images, tmp_path / "run"))
    assert len(p.images) == 16
    with pytest.raises(Exception, match="finding the images failed.*there is no home folder"):
        prepare(replace(p.run, data=replace(p.run.data, path=None)))


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", 16)
    kept_at_once(monkeypatch)
    for name in ("XDG_CACHE_HOME", "FASTMIM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nobody")
    with pytest.warns(UserWarning, match="cannot keep the index of .* in /proc/nobody"):
        assert len(prepare(tiny_run(images, tmp_path / "run")).images) == 16
