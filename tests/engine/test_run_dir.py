"""The run directory: a start that fails leaves it as it was, and what is wrong with it is said in a line."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fastmim import train as command
from fastmim.engine import pretrain, run_dir
from fastmim.engine.checkpoint import CheckpointError
from fastmim.engine.lock import LOCK
from fastmim.engine.pretrain import NotLoaded, prepare, train
from fastmim.engine.run_dir import check_room, check_run_dir, claimed, write_configuration
from tests.engine.conftest import TINY, tiny_run, write_images


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the lock, which says who had it last."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK]
    return {str(path): path.read_bytes() for path in paths}


def refusal(arguments: list[str], capsys) -> tuple[int, str]:
    """Exit status and the words of a start that is refused."""
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    said = capsys.readouterr().err.strip()
    assert said.startswith("fastmim: error: ") and "Traceback" not in said
    return stopped.value.code, said.removeprefix("fastmim: error: ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with `images` and `run`: four steps by the command, from within it, with relative paths."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "images", 16)
    before = Path.cwd()
    os.chdir(folder)
    try:
        command.main([*TINY, "--data.path", "images", "--run-dir", "run", "--steps", "4"])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def moved(finished, tmp_path) -> Path:
    """The same run somewhere else, as a copy."""
    return shutil.copytree(finished, tmp_path / "elsewhere")


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- resuming -----------------------------------------------------------------------------------------


def test_epochs_after_steps_are_trained(moved, capsys):
    run = moved / "run"
    command.main(["--run-dir", str(run), "--resume", "--epochs", "5", "--data.path", str(moved / "images")])
    assert steps_of(run) == list(range(1, 11))
    said = capsys.readouterr().out
    assert "total_steps: checkpoint has 4, this run has 10" in said
    rates = [json.loads(line)["lr"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rates[3] < rates[4]  # the schedule is that of ten steps from the fifth on
    command.main(["--run-dir", str(run), "--resume"])  # alone: of ten steps now
    assert "all 10 steps are done" in capsys.readouterr().out
    before = contents(run)
    code, line = refusal(["--run-dir", str(run), "--resume", "--steps", "3"], capsys)
    assert code == 2 and re.search("steps, epochs: .* has 10 steps, got a run of 3", line)
    assert contents(run) == before


def test_a_longer_run_killed_before_its_first_checkpoint_is_resumed_alone(moved, monkeypatch):
    run = moved / "run"
    longer = ["--run-dir", str(run), "--resume", "--steps", "6", "--data.path", str(moved / "images")]

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train_loop", killed)
        patch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        with pytest.raises(SystemExit):
            command.main(longer)
    assert steps_of(run)[-1] == 4
    command.main(["--run-dir", str(run), "--resume"])
    assert steps_of(run)[-1] == 6


def test_relative_paths_resume_from_another_folder(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command.main(["--run-dir", str(finished / "run"), "--resume"])
    assert "resumed  from step 4" in capsys.readouterr().out
    saved = json.loads((finished / "run" / "config.json").read_text())
    assert saved["run_dir"] == str(finished / "run")
    assert saved["run"]["data"]["path"] == str(finished / "images")
    assert list(tmp_path.iterdir()) == []


def test_a_run_moved_with_its_data_resumes(moved, finished, capsys):
    hidden = finished.with_name("hidden")
    finished.rename(hidden)
    try:
        command.main(["--run-dir", str(moved / "run"), "--resume"])
        shown = capsys.readouterr()
        assert f"the data is no more at {finished}/images: taken from {moved}/images" in shown.err
        assert "resumed  from step 4" in shown.out
        config = (moved / "run" / "config.json").read_bytes()
        (moved / "images").rename(moved / "pictures")
        shutil.move(moved / "run", moved / "deeper" / "run")
        code, line = refusal(["--run-dir", str(moved / "deeper" / "run"), "--resume"], capsys)
        assert code == 2 and line.startswith(f"data.path: the run had its data at {moved}/images")
        given = ["--run-dir", str(moved / "deeper" / "run"), "--resume", "--data.path"]
        code, line = refusal([*given, str(moved / "no")], capsys)
        assert code == 2 and f"got {moved}/no: it does not exist" in line
        assert (moved / "deeper" / "run" / "config.json").read_bytes() == config
        command.main([*given, str(moved / "pictures")])
    finally:
        hidden.rename(finished)


def test_data_of_another_fingerprint_is_refused_by_both(moved, capsys):
    before = contents(moved / "run")
    other = write_images(moved / "other", 24)
    code, words = refusal(["--run-dir", str(moved / "run"), "--resume", "--data.path", str(other)], capsys)
    assert code == 2
    assert re.search("data.fingerprint: checkpoint has [0-9a-f]{64}, this run has [0-9a-f]{64}", words)
    assert "data.images: checkpoint has 16, this run has 24" in words
    assert contents(moved / "run") == before


def test_what_fails_at_the_start_leaves_the_run_as_it_was(images, tmp_path, monkeypatch):
    run = tiny_run(images, tmp_path / "run", steps=2)
    train(prepare(run), arguments=["--seed", "0"])
    before = contents(tmp_path)
    again = replace(run, resume=True)

    def fails(*_, **__):
        raise RuntimeError("a DP world size of 1\n  but the current is 2")

    for part, error in (("wrap", RuntimeError), ("restore", NotLoaded), ("Loader", RuntimeError)):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, part, fails)
            with pytest.raises(error, match="a DP world size of 1"):
                train(prepare(again), arguments=["--seed", "1"])
            if part != "restore":
                with pytest.raises(RuntimeError, match="a DP world size of 1"):
                    train(prepare(replace(run, run_dir=tmp_path / "new")))
                patch.chdir(tmp_path)
                with pytest.raises(RuntimeError, match="a DP world size of 1"):
                    train(prepare(replace(run, run_dir=None)))
                assert list((tmp_path / "runs").iterdir()) == []
                (tmp_path / "runs").rmdir()
        assert contents(tmp_path) == before
        assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="allow-changes: .* got 'sed'; did you mean seed"):
        prepare(replace(again, allow_changes=("sed",)))
    with pytest.raises(CheckpointError, match="seed: checkpoint has 0, this run has 1"):
        prepare(replace(again, seed=1))
    assert contents(tmp_path) == before


def test_config_json_is_the_old_or_the_new(tmp_path, monkeypatch):
    write_configuration(tmp_path, {"arguments": ["--seed", "0"]})
    before = contents(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_configuration(tmp_path, {"arguments": ["--seed", "1"]})
    assert contents(tmp_path)[str(tmp_path / "config.json")] == before[str(tmp_path / "config.json")]


# --- a directory for the run ----------------------------------------------------------------------------


def test_three_runs_of_one_second_have_three_directories(images, tmp_path, monkeypatch):
    class Clock(run_dir.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_dir, "datetime", Clock)
    monkeypatch.chdir(tmp_path)
    made = [prepare(replace(tiny_run(images, tmp_path), run_dir=None)).run_dir for _ in range(3)]
    first = tmp_path / "runs" / "rmae-20260102-030405"
    assert made == [first, first.with_name(f"{first.name}-2"), first.with_name(f"{first.name}-3")]
    assert claimed("mae") == first.with_name("mae-20260102-030405")


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_file_for_a_directory(tmp_path, below, capsys):
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / below
    code, line = refusal(["--run-dir", str(place)], capsys)
    assert code == 2
    assert line == f"run-dir: want a folder that can be written, got {place}: Not a directory"
    assert contents(tmp_path) == {str(tmp_path / "file"): b"mine"}


def test_folders_that_cannot_be_written_or_are_full(capsys, tmp_path, monkeypatch):
    code, line = refusal(["--run-dir", "/proc/run"], capsys)  # read-only to root as well
    assert code == 2 and line.startswith("run-dir: want a folder that can be written, got /proc/run: ")

    def full(*, dir: Path, buffering: int):  # where an empty file would fit
        return Path("/dev/full").open("wb", buffering)

    monkeypatch.setattr(run_dir.tempfile, "TemporaryFile", full)
    code, line = refusal(["--run-dir", str(tmp_path / "run")], capsys)
    assert (code, line[-25:]) == (2, ": No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_without_a_directory_runs_is_looked_at(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert refusal([], capsys)[1].endswith("/runs: Not a directory")


def test_no_room_for_one_checkpoint(images, tmp_path):
    with pytest.raises(OSError, match=r"disk full: .* needs 1,000,000,000,000,000 bytes, [\d,]+ are free"):
        check_room(tmp_path / "not" / "yet", 10**15)
    check_room(tmp_path / "not" / "yet", 1)
    check_run_dir(tiny_run(images, tmp_path / "not" / "yet"))
    assert list(tmp_path.iterdir()) == []
