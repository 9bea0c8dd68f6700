"""The round: every stage runs at tiny shapes; what fails, hangs or is absent stops nothing and is named."""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import gpu_round
from benchmarks.gpu_round import ROOT, Round, Stage


def a_round(tmp_path: Path, seconds: float = 60) -> Round:
    log = tmp_path / "log.txt"
    log.touch()
    return Round(tmp_path / "results", time.monotonic() + seconds, log)


def python(code: str, limit_s: float = 20, name: str = "it", needs: tuple[str, ...] = ()) -> Stage:
    return Stage(name, ("-c", code), limit_s, needs)


def outcome(stage: Stage, r: Round) -> str:
    gpu_round.run_stage(stage, r)
    return r.done[-1][2]


def test_what_becomes_of_a_stage(tmp_path):
    r = a_round(tmp_path)
    assert outcome(python("print('fine')"), r) == "ok"
    assert outcome(python("raise ValueError('too small')"), r) == "failed with 1: ValueError: too small"
    assert outcome(python("print('skipped: no x'); exit(3)"), r) == "skipped: no x"
    assert (
        outcome(python("1", needs=("json", "no_such.thing")), r) == "skipped: no_such.thing is not installed"
    )
    assert len(r.troubles) == 3 and len(r.done) == 4


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path):
    r = a_round(tmp_path)
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        "print(p.pid, flush=True); time.sleep(99)"
    )
    start = time.monotonic()
    said = outcome(python(code, limit_s=2), r)
    assert time.monotonic() - start < 10
    assert said.startswith("stopped after 2 s; last: ")
    pid = int(said.rsplit(" ", 1)[1])
    for _ in range(50):  # the process that adopts it reaps it in its own time
        if not Path(f"/proc/{pid}/stat").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"child {pid} lives")


def test_no_stage_outlives_the_round(tmp_path):
    r = a_round(tmp_path, seconds=6)
    start = time.monotonic()
    assert outcome(python("import time; time.sleep(50)", limit_s=40), r).startswith("stopped after 6 s")
    assert outcome(python("1"), r) == "skipped: no time is left"
    assert time.monotonic() - start < 9


def test_failed_tests_are_named(tmp_path):
    (tmp_path / "test_x.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    said = outcome(gpu_round.tests("x", str(tmp_path / "test_x.py"), 50), a_round(tmp_path))
    assert said.startswith("failed: 1 failed, 1 passed") and "test_x.py::test_bad" in said


def test_rows_of_this_round_go_home_and_are_kept(tmp_path, monkeypatch):
    r = a_round(tmp_path)
    r.results.mkdir()
    path = r.results / "loader.jsonl"
    path.write_text('{"provider": "old", "images_per_s": 1.0}\n')
    r.sizes = {path: path.stat().st_size}
    with path.open("a") as file:
        file.write('{"provider": "new", "images_per_s": 2.0}\n')
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    gpu_round.bring_home(r)
    home = tmp_path / "out" / "rows.jsonl"
    assert json.loads(home.read_text()) == {"file": "loader.jsonl", "provider": "new", "images_per_s": 2.0}
    assert "loader  new: 2.0 img/s" in (tmp_path / "out" / "table.txt").read_text()
    assert gpu_round.keep(home, tmp_path / "kept") == 1
    kept = (tmp_path / "kept" / "loader.jsonl").read_text()
    assert json.loads(kept) == {"provider": "new", "images_per_s": 2.0}


@pytest.mark.parametrize("stages", [gpu_round.full, gpu_round.quick, gpu_round.rehearsal])
def test_every_stage_is_a_command_that_exists(stages):
    """Flags that a tool does not know, or a path that is not there, would be found on the GPU first."""
    for stage in stages(Path("photographs")):
        if stage.command[:2] == ("-m", "pytest"):
            paths = [a.removeprefix("--ignore=") for a in stage.command if "tests/" in a]
            assert paths and all((ROOT / path).exists() for path in paths), stage
        elif stage.command[0] == "-m":
            assert (ROOT / (stage.command[1].replace(".", "/") + ".py")).exists(), stage
            parse_only(stage)


def parse_only(stage: Stage) -> None:
    import argparse

    from benchmarks import harness, throughput
    from benchmarks.peers import race
    from benchmarks.pipeline import loader

    name, arguments = stage.command[1], list(stage.command[2:])
    if name == "benchmarks.throughput":
        throughput.parser().parse_args(arguments)
        return

    class Parsed(Exception):
        pass

    real = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *rest):
        real(self, *rest)
        raise Parsed

    main = {"benchmarks.harness": harness.main, "benchmarks.pipeline.loader": loader.main}.get(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            main(arguments) if main else race.main("peer", "torch", lambda m: m, arguments)


@pytest.mark.parametrize("op", gpu_round.OPS)
def test_every_op_of_the_round_can_be_imported(op):
    """What it imports of ours is still called so; its cases are made on the device alone."""
    assert callable(import_module(f"benchmarks.ops.{op}").cases)


def test_no_op_is_left_out_of_the_round():
    assert sorted(gpu_round.OPS) == sorted(p.stem for p in (ROOT / "benchmarks" / "ops").glob("*.py"))


def test_limits_fit_what_was_promised():
    assert gpu_round.BUDGET_S["round"] <= 8 * 60 - 5 and gpu_round.BUDGET_S["quick"] <= 2 * 60
    assert {s.name for s in gpu_round.full(Path("x"))} >= {
        f"throughput {method} {model}" for method in ("mae", "rmae") for model in ("vit_base", "vit_large")
    }


def test_without_a_gpu_only_the_rehearsal_runs(monkeypatch, capsys):
    monkeypatch.setattr(gpu_round.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu_round.main([])
    assert "want a CUDA device" in capsys.readouterr().err


@pytest.mark.long
def test_rehearsal(tmp_path):
    """The whole round at tiny shapes, as a script, without an installation on the path."""
    out = tmp_path / "out"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OUT": str(out), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu_round.py", "--rehearse", "--results", str(tmp_path / "results")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert {p.name for p in out.iterdir()} == {"rows.jsonl", "table.txt", "log.txt"}
    text = (out / "table.txt").read_text()
    assert "a stage that fails: failed with 1: as it should" in text
    assert "a stage that hangs: stopped after" in text
    for name in ("tests models", "throughput mae vit_tiny", "kernel"):
        assert f"{name}: ok" in text, text
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {row["file"] for row in rows} >= {"throughput.jsonl", "attention.jsonl"}
    assert all("failed" not in row for row in rows)
