"""What a stranger's run directory may do to the one who resumes it: nothing."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmim.engine import durable
from fastmim.engine.pretrain import NotLoaded, prepare, train
from tests.engine.conftest import tiny_run
from tests.engine.siamese import SiameseConfig


class Hostile:
    """Leaves a file where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def run_of(images: Path, run_dir: Path, method: str, **changes):
    run = tiny_run(images, run_dir, "mae", steps=2, save_every=2, **changes)
    return run if method == "mae" else replace(run, method=SiameseConfig())


@pytest.fixture(scope="module", params=[("mae", 1), ("siamese", 0), ("siamese", 3)], ids=str)
def saved(request, images, tmp_path_factory) -> tuple[Path, str, int]:
    """The directory of a run, with and without a teacher, of a method and a ZeRO stage."""
    run_dir = tmp_path_factory.mktemp("stranger") / "run"
    method, zero = request.param
    train(prepare(run_of(images, run_dir, method, zero=zero)))
    return run_dir, method, zero


def files_of(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints" / "step-00000002").rglob("*.pt"))


def test_no_file_of_a_checkpoint_runs_code(saved, images, tmp_path, capsys):
    """Each in turn is replaced by one that is hostile, and the manifest says that it is right."""
    saved, method, zero = saved
    names = [path.relative_to(saved) for path in files_of(saved)]
    assert "random-rank0.pt" in {name.name for name in names} and any("states" in n.name for n in names)
    assert any("teacher" in name.name for name in names) == (method == "siamese")
    for i, name in enumerate(names):
        run_dir, marker = tmp_path / f"run{i}", tmp_path / f"marker{i}"
        shutil.copytree(saved, run_dir)
        content = torch.load(run_dir / name, weights_only=False)
        torch.save({**content, "more": Hostile(marker)}, run_dir / name)
        manifest = (run_dir / name).parent / "manifest.json"
        body = durable.unseal(manifest)
        body["files"][name.name] = durable.describe(run_dir / name)
        manifest.write_text(durable.seal(body))
        p = prepare(replace(run_of(images, run_dir, method, zero=zero), resume=True))
        with pytest.raises(Exception, match="refused|weights_only|Weights only") as error:
            train(p)
        assert not marker.exists(), name
        if "states" in name.name:
            assert isinstance(error.value, NotLoaded) and "mkdir, which may run code" in str(error.value)
    assert names and not list(tmp_path.glob("marker*"))


def test_a_name_with_brackets_resumes(images, tmp_path):
    run_dir = tmp_path / "[1] *?"
    run = tiny_run(images, run_dir, "mae", steps=2, save_every=2)
    train(prepare(run))
    train(prepare(replace(run, steps=4, resume=True, allow_changes=("total_steps",))))
    assert (run_dir / "checkpoints" / "step-00000004").exists()
