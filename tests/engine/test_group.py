"""The command leaves the ranks it has met; an optimizer that cannot be built is refused before the start."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastmim.engine import extension
from fastmim.engine.deepspeed import meet
from fastmim.engine.pretrain import prepare, train
from fastmim.engine.ranks import RankError
from fastmim.train import start
from tests.engine.conftest import tiny_run


def flags(images: Path, run_dir: Path) -> list[str]:
    return (
        f"--method mae --data.path {images} --data.decoder pillow --recipe sample --run-dir {run_dir} "
        "--model.width 16 --model.depth 1 --model.heads 2 --model.image-size 16 --model.patch 4 "
        "--method.decoder.width 16 --method.decoder.depth 1 --method.decoder.heads 2 --batch 8 --steps 2"
    ).split()


def test_the_command_leaves_the_group_at_its_end_and_when_refused(images, tmp_path, capsys):
    start(flags(images, tmp_path / "run"))
    assert not dist.is_initialized()
    with pytest.raises(SystemExit) as refused:  # its directory holds a run now
        start(flags(images, tmp_path / "run"))
    assert refused.value.code == 2 and "holds checkpoints of a run" in capsys.readouterr().err
    assert not dist.is_initialized()
    with pytest.raises(SystemExit) as ended:
        start([*flags(images, tmp_path / "bad"), "--optim.lr", "1e30", "--steps", "9"])
    assert ended.value.code == 1 and "not finite at step" in capsys.readouterr().err
    assert not dist.is_initialized()


def test_one_process_meets_and_leaves_as_often_as_it_likes(images, tmp_path):
    start(flags(images, tmp_path / "run"))
    for zero in (3, 1):  # DeepSpeed keeps groups of its own, which must have gone with the first
        train(prepare(tiny_run(images, tmp_path / str(zero), zero=zero, steps=2)))
    assert dist.is_initialized()


def test_nccl_is_told_its_device(monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda **how: calls.append(how))
    meet(torch.device("cuda", 1))
    meet(None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    meet(torch.device("cuda", 1))
    assert [(how["backend"], how["device_id"]) for how in calls] == [
        ("nccl", torch.device("cuda", 1)),
        ("gloo", None),
        ("nccl", torch.device("cuda", 1)),
    ]
    assert calls[-1]["timeout"].total_seconds() == 1800


# --- what cannot be built -----------------------------------------------------------------------------


def refusal(images: Path, tmp_path: Path) -> str:
    run = tiny_run(images, tmp_path / "run")
    with pytest.raises(RankError) as caught:
        prepare(replace(run, optim=replace(run.optim, name="deepspeed")))
    assert not (tmp_path / "run").exists()
    (line,) = str(caught.value).splitlines()
    assert "building the optimizer failed" in line and "optim.name deepspeed: DeepSpeed cannot" in line
    assert line.endswith(extension.ADVICE)
    return line


def test_without_a_compiler_or_ninja(images, tmp_path, monkeypatch):
    which = shutil.which
    monkeypatch.setenv("CXX", "no-such-c++")
    assert "want a C++ compiler, got none called no-such-c++" in refusal(images, tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ninja" else which("true"))
    assert "want ninja, got none on PATH" in refusal(images, tmp_path)


@pytest.mark.parametrize(
    ("nvcc", "said"),
    [
        (None, "want the nvcc of CUDA 13.0, got none"),
        ((12, 8), "want the nvcc of CUDA 13.0, as torch has, got 12.8"),
    ],
)
def test_without_nvcc_or_with_another_cuda(images, tmp_path, monkeypatch, nvcc, said):
    class Cuda:
        @staticmethod
        def device_name() -> str:
            return "cuda"

    def installed() -> tuple[int, int]:
        if nvcc is None:
            raise extension.MissingCUDAException("CUDA_HOME does not exist")
        return nvcc

    monkeypatch.setattr(extension, "get_accelerator", Cuda)
    monkeypatch.setattr(extension, "installed_cuda_version", installed)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert said in refusal(images, tmp_path)


def test_what_the_compiler_says_is_one_line(images, tmp_path, monkeypatch):
    page = (
        "Error building extension 'fused_adam': [1/3] c++\nx.cpp:3: fatal error: omp.h: No such file\n1 error"
    )

    class Fails:
        def create_op_builder(self, name):
            return self

        def device_name(self):
            return "cpu"

        def load(self, verbose):
            raise RuntimeError(page)

    monkeypatch.setattr(extension, "get_accelerator", Fails)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "here: x.cpp:3: fatal error: omp.h: No such file; " in refusal(images, tmp_path)
