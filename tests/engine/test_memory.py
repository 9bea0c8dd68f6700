"""Out of memory is said in a line, with what the batch is and what to try."""

import resource
import sys
from dataclasses import replace

import pytest
import torch

from fastmim import train as command
from fastmim.data import find_images
from fastmim.engine import pretrain
from fastmim.engine.config import make_plan
from fastmim.engine.memory import advice, is_out_of_memory, words_on_memory
from tests.engine.conftest import TINY, tiny_run
from tests.engine.forked import Child

LIMIT = 60 << 30  # bytes of address space: torch and its threads want 15 GB of that


def planned(images, tmp_path, **changes):
    run = replace(tiny_run(images, tmp_path), **changes)
    return run, make_plan(run, find_images(images), world=1, device="cpu")


def test_the_next_accumulate_that_gives_the_same_steps(images, tmp_path):
    run, plan = planned(images, tmp_path, batch=24)
    assert advice(run, plan) == "--accumulate 2 makes the same steps of micro-batches of 12"
    run, plan = planned(images, tmp_path, batch=27, accumulate=3)
    assert advice(run, plan) == "--accumulate 9 makes the same steps of micro-batches of 3"
    run, plan = planned(images, tmp_path, batch=8, accumulate=8)
    assert advice(run, plan).startswith("A smaller --batch, more ranks")
    assert words_on_memory(run, plan).startswith(
        "out of memory with micro-batches of 1 images (--batch 8 = 1 ranks x --accumulate 8 x 1): the machine"
    )


def test_what_is_said_of_a_gpu(images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 79 * 10**9)
    run, plan = planned(images, tmp_path)
    words = words_on_memory(run, replace(plan, device="cuda"))
    assert "at most 79.0 GB were taken, 1.0 GB of 80.0 GB are free" in words


def test_errors_that_mean_it():
    def wants_too_much():
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
        try:
            torch.empty(100 << 30, dtype=torch.uint8)
        except RuntimeError as error:
            return is_out_of_memory(error)

    assert Child(wants_too_much).result() is True
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("a bug")) and not is_out_of_memory(
        ValueError("not enough memory")
    )


def test_a_run_that_does_not_fit_ends_in_a_line(images, tmp_path, monkeypatch, capsys):
    """By the command, in this process, whose allocator says what it says of 2 ** 62 bytes."""

    def wants_too_much(*_, **__):
        torch.empty(1 << 62, dtype=torch.uint8)

    monkeypatch.setattr(pretrain, "train_loop", wants_too_much)
    monkeypatch.setattr(command, "leave_at_once", sys.exit)  # or pytest would leave
    flags = ["--data.path", str(images), "--run-dir", str(tmp_path / "run"), "--steps", "2"]
    with pytest.raises(SystemExit) as stopped:
        command.main([*TINY, *flags])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 1
    assert last.startswith(
        "fastmim: error: out of memory with micro-batches of 8 images (--batch 8 = 1 ranks x"
    )
    assert last.endswith("--accumulate 2 makes the same steps of micro-batches of 4")
