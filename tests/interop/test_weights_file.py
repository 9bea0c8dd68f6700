"""Weights as people have them: wrappers, prefixes, what stands beside them; one line for anything else."""

import argparse
import datetime
import pathlib
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastmim.interop.weights_file import read_weights

FLAT = {"cls_token": torch.ones(1, 1, 4), "blocks.0.norm1.bias": torch.arange(4.0)}


def saved(folder: pathlib.Path, content: object) -> pathlib.Path:
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


def same(found: dict) -> bool:
    return found.keys() == FLAT.keys() and all(torch.equal(found[name], t) for name, t in FLAT.items())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "_orig_mod.module."]
)
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict", "module"])
def test_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    flat = {prefix + name: t for name, t in FLAT.items()}
    content = (
        flat if wrapper is None else {wrapper: flat, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}
    )
    assert same(read_weights(saved(tmp_path, content)))
    save_file(flat, tmp_path / "file.safetensors")
    assert same(read_weights(tmp_path / "file.safetensors"))


def test_a_prefix_of_some_names_only_is_part_of_them(tmp_path):
    flat = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert read_weights(saved(tmp_path, flat)).keys() == flat.keys()


def test_a_block_that_was_compiled_by_itself(tmp_path):
    flat = {"cls_token": FLAT["cls_token"], "blocks.0._orig_mod.norm1.bias": FLAT["blocks.0.norm1.bias"]}
    assert same(read_weights(saved(tmp_path, flat)))


def test_paths_numbers_and_dates_beside_the_weights(tmp_path):
    args = argparse.Namespace(
        output_dir=pathlib.PosixPath("runs/mae"),
        data=pathlib.PureWindowsPath("C:/images"),
        best=np.float64(83.6),
        table=np.arange(3),
        kind=np.dtype("float32"),
        start=datetime.datetime(2026, 1, 1),
    )
    assert same(read_weights(saved(tmp_path, {"model": FLAT, "args": args, "best": np.float32(1)})))


def test_a_configuration_of_a_package_that_is_not_here(tmp_path, monkeypatch):
    """As data2vec's checkpoints have theirs: objects with a state, of a module that this machine lacks."""
    module = ModuleType("omegaconf")
    module.DictConfig = type("DictConfig", (), {"__module__": "omegaconf"})
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    inner, outer = module.DictConfig(), module.DictConfig()
    inner.a, outer.lr, outer.inner = [1], 1.0, inner
    path = saved(tmp_path, {"model": FLAT, "cfg": outer})
    monkeypatch.delitem(sys.modules, "omegaconf")
    assert same(read_weights(path))


def test_a_path_as_a_newer_python_names_its_class(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.PosixPath, "__module__", "pathlib._local")
    monkeypatch.setitem(sys.modules, "pathlib._local", pathlib)
    path = saved(tmp_path, {"model": FLAT, "args": {"out": pathlib.PosixPath("a/b")}})
    monkeypatch.undo()
    assert same(read_weights(path))


class Malicious:
    def __init__(self, function=print):
        self.function = function

    def __reduce__(self):
        return self.function, ("this must never be printed",)


@pytest.mark.parametrize("where", ["weights", "beside"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, capsys, where):
    content = (
        {"model": FLAT | {"x": Malicious()}} if where == "weights" else {"model": FLAT, "args": Malicious()}
    )
    with pytest.raises(ValueError, match=r"holds more than tensors: \S*print would be run$"):
        read_weights(saved(tmp_path, content))
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="init-from: "):
        read_weights(tmp_path / "raw.pth")
    assert capsys.readouterr().out == ""


def test_a_function_of_an_inert_module_is_not_run_either(tmp_path):
    mark = tmp_path / "mark"
    mark.write_text("untouched")
    touch = type("Touch", (), {"__reduce__": lambda self: (np.savetxt, (str(mark), [1.0]))})
    assert same(read_weights(saved(tmp_path, {"model": FLAT, "args": touch()})))
    assert mark.read_text() == "untouched"


def test_what_is_no_checkpoint_is_refused_in_one_plain_line(tmp_path):
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("hello")
    bad = {
        "absent.pth": "want a run directory or a file of weights, got nothing at",
        "text.pth": "cannot be read as weights",
        "text.safetensors": "cannot be read as weights",
    }
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "other.pth")
    bad["other.pth"] = "want a dictionary of tensors, or one under model, .*, got the keys epoch, optimizer"
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    bad["list.pth"] = "got a list"
    torch.save({}, tmp_path / "empty.pth")
    bad["empty.pth"] = "got a dict"
    torch.save({"model": FLAT, "args": Malicious(exec)}, tmp_path / "exec.pth")
    bad["exec.pth"] = "exec would be run"
    for name, message in bad.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_weights(tmp_path / name, "weights")
        text = str(caught.value)
        assert text.startswith("weights: ") and "\n" not in text and "\x1b" not in text
