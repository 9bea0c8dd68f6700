"""Ranks that met are of one run, on this node's own interface; what is published is finite and readable."""

import os
import socket
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmim.engine import one_run
from fastmim.engine.checkpoint import CheckpointError
from fastmim.engine.deepspeed import is_one_node, loopback_store, meet
from fastmim.engine.judge import NonFinite, require_finite
from fastmim.engine.one_run import require_one_run
from fastmim.engine.pretrain import prepare, train
from fastmim.engine.ranks import RankError, Ranks
from tests.engine.conftest import tiny_run

FACTS = {"optim": {"lr": 0.1}, "batch": 8, "data": {"fingerprint": "abc"}}


class Met(Ranks):
    """Rank 0 of two, of which the other says what it is given."""

    def gather_objects(self, obj):
        facts, host, parent = obj
        return [obj, self.other(facts, host, parent)]


def met(monkeypatch, other) -> Ranks:
    monkeypatch.setattr(Met, "other", staticmethod(other), raising=False)
    return Met(rank=0, world=2, local_rank=0)


def test_ranks_of_one_run_go_on(monkeypatch):
    require_one_run(met(monkeypatch, lambda *told: told), FACTS)
    require_one_run(met(monkeypatch, lambda facts, host, parent: (facts, "another node", 1)), FACTS)
    require_one_run(Ranks.single(), FACTS)


def test_another_fact_another_torch_and_another_launch_are_named(monkeypatch):
    with pytest.raises(RankError, match=r"optim.lr: rank 0 has 0.1, rank 1 has 0.2$"):
        require_one_run(met(monkeypatch, lambda f, h, p: (f | {"optim.lr": "0.2"}, h, p)), FACTS)
    without = {name: FACTS[name] for name in ("optim", "batch")}
    mine = {"torch": torch.__version__, **one_run.flat(without)}
    with pytest.raises(RankError, match=r"data.fingerprint: rank 0 has abc, rank 1 has nothing$"):
        require_one_run(met(monkeypatch, lambda f, h, p: (mine, h, p)), FACTS)
    with pytest.raises(RankError, match=r"torch: rank 0 has .*, rank 1 has 1.0$"):
        require_one_run(met(monkeypatch, lambda f, h, p: (f | {"torch": "1.0"}, h, p)), FACTS)
    with pytest.raises(RankError, match="has ranks of several launches .* that met on one port"):
        require_one_run(met(monkeypatch, lambda f, h, p: (f, h, p + 1)), FACTS)


def test_the_ranks_of_one_node_meet_on_its_own_interface(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (names | {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, value)
    assert is_one_node()
    store = loopback_store()
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    places = [row[1] for row in listening if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    assert places == [f"0100007F:{port:04X}"]  # 127.0.0.1
    store.set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(ValueError, match=f"ranks: cannot meet at 127.0.0.1:{port}; does another run use it"):
        meet(None)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert not is_one_node()


def test_an_older_checkpoint_can_be_chosen(images, tmp_path):
    run = tiny_run(images, tmp_path, steps=6, save_every=2, keep=3)
    train(prepare(run))
    again = replace(run, resume=True, resume_step=2)
    assert prepare(again).found.step == 2
    train(prepare(again))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3, only of \[2, 4, 6\]"):
        prepare(replace(again, resume_step=3))
    with pytest.raises(ValueError, match="resume-step: of use with --resume only"):
        replace(run, resume_step=2)


def test_every_file_of_a_run_has_the_mode_of_the_umask(images, tmp_path):
    before = os.umask(0o027)
    try:
        train(prepare(tiny_run(images, tmp_path / "run", steps=1)))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").iterdir() if path.is_file()]
    assert {path.name for path in files} >= {"encoder.safetensors", "model.safetensors", "config.json"}
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == dict.fromkeys(
        [path.name for path in files], "0o640"
    )


def test_weights_that_are_not_finite_are_not_published():
    good = {"a": torch.ones(3), "n": torch.ones(2, dtype=torch.long)}
    require_finite(good)
    bad = {f"b{i}": torch.tensor([1.0, float("nan")]) for i in range(4)}
    with pytest.raises(NonFinite, match="nothing was exported: b0, b1, b2 and 1 more"):
        require_finite(good | bad)
