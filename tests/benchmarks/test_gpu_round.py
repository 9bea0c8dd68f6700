"""The round: shares that fit, parts that stop nothing, rows that are not lost, a second call that goes on."""

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import gpu_round
from benchmarks.gpu import parts, prepare, sanitize, stages, wheels
from benchmarks.gpu.parts import MARK, Part, Runner, Stage, marked, remaining
from benchmarks.gpu.record import ROUND, Record, earlier, keep, table
from benchmarks.gpu.shares import Want, divide
from benchmarks.provenance import NULL_DEVICE, ROOT, environment, sources_digest

KINDS = ("round", "quick", "rehearse")


def listed(kind: str, scratch: Path) -> list[Stage]:
    return gpu_round.KINDS[kind][0](scratch)


# --- shares -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_the_whole_and_every_minimum_fits(kind, tmp_path):
    found, seconds = listed(kind, tmp_path), gpu_round.KINDS[kind][1] - gpu_round.CLOSE_S - 5
    assert sum(stage.share for stage in found) == pytest.approx(1)
    limits = divide(seconds, [stage.want() for stage in found])
    assert sum(limits) <= seconds + 1e-6
    for stage, limit in zip(found, limits, strict=True):
        assert limit >= stage.want().least_s > 0, stage.name
        wants = [Want(part.share, stage.least_s) for part in stage.parts]
        assert sum(divide(limit, wants)) <= limit + 1e-6 and all(divide(limit, wants)), stage.name


def test_budgets_are_those_promised():
    assert gpu_round.KINDS["round"][1] <= 600 - 30 and gpu_round.KINDS["quick"][1] <= 300


def test_what_one_leaves_flows_to_all_later_ones():
    wants = [Want(0.5, 1), Want(0.3, 1), Want(0.2, 1)]
    assert divide(100, wants) == pytest.approx([50, 30, 20])
    assert divide(90, wants[1:]) == pytest.approx([54, 36])  # the first took 10 of its 50


def test_minima_come_before_shares_and_the_last_go_without():
    assert divide(100, [Want(0.9, 1), Want(0.1, 40)]) == pytest.approx([60, 40])
    assert divide(50, [Want(0.1, 20), Want(0.1, 20), Want(0.8, 20)]) == pytest.approx([25, 25, 0])
    assert divide(5, [Want(1, 20)]) == [0.0]


# --- parts ------------------------------------------------------------------------------------------


@pytest.fixture
def runner(tmp_path):
    found = Runner(Record(tmp_path / "results", tmp_path / "out"), scratch(tmp_path), ready=())
    yield found
    found.close()


def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return tmp_path / "scratch"


def python(code: str, name: str = "it", **more) -> Part:
    return Part(name, ("-c", code), **more)


def test_what_becomes_of_a_part(runner):
    said = [
        runner.run(part, 30).what
        for part in (
            python("print('fine'); print('Warning: at exit')"),
            python("raise ValueError('too small')"),
            python("print('skipped: no x'); raise SystemExit(3)"),
            python("1", needs=("json", "no_such.thing")),
            python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        )
    ]
    assert said[:4] == [
        "ok: fine", "failed with 1: ValueError: too small", "skipped: no x",
        "skipped: no_such.thing is not installed",
    ]  # fmt: skip
    assert said[4].startswith("failed with -11")
    log = (runner.record.home / "log.txt").read_text()
    assert "fine" in log and "ValueError: too small" in log


HANGS = """
import subprocess, sys, time
for own in (False, True):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], start_new_session=own)
print("two children", flush=True)
time.sleep(99)
"""


def test_a_part_that_hangs_is_ended_with_all_that_it_started(runner):
    start = time.monotonic()
    assert runner.run(python(HANGS), 3).what == "stopped after 3 s; last: two children"
    assert time.monotonic() - start < 12
    assert set(marked(runner.mark)) <= {runner.next.pid}  # the one in waiting
    assert runner.run(python("print('next')"), 20).what == "ok: next"


def test_a_part_that_ignores_the_signal_is_ended(runner):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True)"
    assert runner.run(python(f"{code}; time.sleep(99)"), 2).what == "stopped after 2 s; last: deaf"


def test_a_long_log_keeps_its_begin_and_its_end(runner):
    runner.run(
        python("print('begin'); [print('y' * 999) for _ in range(2000)]; print('end')"),
        20,
    )
    log = (runner.record.home / "log.txt").read_text()
    assert "begin" in log and log.rstrip().endswith("end") and 200_000 < len(log) < 250_000


def test_rows_come_home_while_a_part_still_runs(runner):
    code = (
        "import json, sys, time, pathlib\n"
        f"p = pathlib.Path({str(runner.record.results)!r}) / 'x.jsonl'\n"
        "p.open('a').write(json.dumps({'provider': 'p', 'verdict': 'done'}) + chr(10) + 'half a ro')\n"
        "print('FAILED at once'); sys.stdout.flush(); time.sleep(99)"
    )
    runner.run(python(code), 2)
    home = (runner.record.home / "rows.jsonl").read_text()
    assert json.loads(home) == {"file": "x.jsonl", "provider": "p", "verdict": "done"}


# --- a whole round, killed in the middle, and the next ------------------------------------------------

SCRIPT = """
import sys, time
from pathlib import Path
from benchmarks import gpu_round
from benchmarks.gpu.parts import Part, Runner, Stage, remaining
from benchmarks.gpu.record import Record, earlier
folder, *done = map(Path, sys.argv[1:])
(folder / "scratch").mkdir(parents=True)
WAIT = f"import time; time.sleep({0 if done else 600})"
def part(name, code): return Part(name, ("-c", f"print({name!r}); {code}"))
stages = [
    Stage("always", 0.2, (part("prepare", "1"),), least_s=1, always=True),
    Stage("first", 0.4, (part("a", "1"), part("b", "raise SystemExit('no')")), least_s=1),
    Stage("second", 0.4, (part("c", WAIT), part("d", "1")), least_s=1),
]
record = Record(folder / "results", folder / "out")
runner = Runner(record, folder / "scratch", ready=())
print(runner.mark, flush=True)
r = gpu_round.Round(runner, record, time.monotonic() + 60)
r.run(remaining(stages, earlier(done), r.about["sources"], r.about["device"]))
runner.close()
"""


def outcomes(folder: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()]
    return [(row["part"], row["outcome"].split()[0].rstrip(":")) for row in rows]


def test_a_killed_round_leaves_nothing_running_and_the_next_goes_on(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", SCRIPT]
    first = subprocess.Popen(
        [*command, str(tmp_path / "1")], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    mark = first.stdout.readline().strip()
    log = tmp_path / "1" / "out" / "log.txt"
    for _ in range(600):
        if log.exists() and "=== c" in log.read_text():
            break
        time.sleep(0.1)
    assert list(marked(mark))
    first.kill()
    first.wait()
    for _ in range(100):
        if not list(marked(mark)):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"alive after the round: {list(marked(mark))}")
    assert outcomes(tmp_path / "1") == [("prepare", "ok"), ("a", "ok"), ("b", "failed")]
    second = [*command, str(tmp_path / "2"), str(tmp_path / "1" / "out" / "rows.jsonl")]
    subprocess.run(second, cwd=ROOT, env=environment, check=True, timeout=1200, stdout=subprocess.DEVNULL)
    assert outcomes(tmp_path / "2") == [("prepare", "ok"), ("c", "ok"), ("d", "ok"), ("b", "failed")]


def row(part: str, outcome: str, sources: str = "s", device: str = "d") -> dict[str, str]:
    return {"stage": "x", "part": part, "outcome": outcome, "sources": sources, "device": device}


def order(*done: dict[str, str]) -> str:
    stage = Stage("x", 1, tuple(Part(name, ("-c", "1")) for name in "abc"))
    return " ".join("".join(p.name for p in s.parts) for s in remaining([stage], done, "s", "d"))


def test_what_was_never_answered_comes_first():
    assert order() == "abc"
    assert order(row("a", "ok")) == "bc"
    assert order(row("a", "ok: fine", sources="other")) == "bc a"
    assert order(row("a", "ok", device="another card"), row("b", "failed with 1: x")) == "c a b"
    assert order(row("a", "failed with 1: x", sources="other")) == "abc"  # it may have been mended
    assert order(row("a", "stopped after 3 s; last: x"), row("b", "skipped: no time")) == "abc"
    assert order(row("a", "ok"), row("a", "failed with 1: x")) == "bc"  # in any order of the files
    assert order(row("a", "ok", sources="other"), row("a", "ok")) == "bc"


def test_a_part_for_which_no_time_is_left_is_named(tmp_path, runner):
    r = gpu_round.Round(runner, runner.record, time.monotonic() + 7)
    slow = python("import time; print(1); time.sleep(2)", "a")
    r.run([Stage("x", 1.0, (slow, python("print(2)", "b")), least_s=5.5)])
    said = [line["outcome"] for line in runner.record.rows]
    assert said[0] == "ok: 1" and said[1].startswith("skipped: ") and "of the 5.5 it wants" in said[1]
    assert r.troubles == [f"x, b: {said[1]}"]


# --- rows -------------------------------------------------------------------------------------------


def test_rows_of_this_round_go_home_and_are_kept(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "loader.jsonl").write_text('{"provider": "old", "images_per_s": 1.0}\n')
    record = Record(results, tmp_path / "out")
    with (results / "loader.jsonl").open("a") as file:
        file.write('{"provider": "new", "images_per_s": 2.0}\n')
    record.collect()
    record.table(table(record.rows, ["x: failed"]))
    home = tmp_path / "out" / "rows.jsonl"
    assert json.loads(home.read_text()) == {"file": "loader.jsonl", "provider": "new", "images_per_s": 2.0}
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "loader new: 2.0 img/s" in text and text.endswith("x: failed\n")
    assert keep(home, tmp_path / "kept") == 1
    kept = (tmp_path / "kept" / "loader.jsonl").read_text()
    assert json.loads(kept) == {"provider": "new", "images_per_s": 2.0}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rows.jsonl", "log.txt", "table.txt"}


def test_rows_of_a_null_device_are_not_kept(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"file": "x.jsonl", "device": NULL_DEVICE}) + "\n")
    with pytest.raises(ValueError, match="want rows of a device that computes, got 1"):
        keep(rows, tmp_path / "kept")


def test_rows_of_a_machine_without_git_bear_the_commit_of_the_same_code(tmp_path):
    """Those of other code stay without: nobody can say which it was."""
    rows = [
        {"file": "ops.jsonl", "commit": None, "dirty": None, "sources": s}
        for s in (sources_digest(), "other")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep(tmp_path / "rows.jsonl", tmp_path / "kept")
    ours, other = map(json.loads, (tmp_path / "kept" / "ops.jsonl").read_text().splitlines())
    here = environment()
    assert ours["commit"] == (None if here["dirty"] else here["commit"]) and other["commit"] is None


def test_a_broken_file_of_rows_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"file": "round.jsonl"}\nhalf a')
    with pytest.raises(ValueError, match=r"rows.jsonl: want a row of JSON in line 2, got 'half a'"):
        earlier([tmp_path / "rows.jsonl"])


# --- what it is told --------------------------------------------------------------------------------


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        gpu_round.main([*arguments])
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_arguments_are_refused_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_round, "DEVICE", "cpu")
    assert "want a CUDA device, got none" in refused(capsys)
    assert "--seconds: want 20 to 3600, got 5" in refused(capsys, "--rehearse", "--seconds", "5")
    assert "want --quick or --rehearse, got both" in refused(capsys, "--rehearse", "--quick")
    assert "stages: want some of prepare, " in refused(capsys, "--rehearse", "--stages", "nonsense")
    assert "No such file" in refused(capsys, "--rehearse", "--done", str(tmp_path / "none.jsonl"))
    missing = refused(capsys, "--rehearse", "--wheels", str(tmp_path / "none"))
    assert missing.endswith("none, which is none") and "wheels: want a folder" in missing


def wheel(folder: Path, name: str, tag: str = "py3-none-any") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / f"{name}-1.0-{tag}.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "VALUE = 7\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_joined_and_installed_without_a_network(tmp_path):
    whole = wheel(tmp_path / "a", "carried_one")
    content = whole.read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / f"{whole.name}.part-aa").write_bytes(content[:200])
    (tmp_path / "b" / f"{whole.name}.part-ab").write_bytes(content[200:])
    whole.unlink()
    wheel(tmp_path / "b", "torch")  # this Python has it: its own stays
    site = tmp_path / "scratch" / "site"
    assert wheels.install([tmp_path / "a", tmp_path / "b"], site) == ["carried-one"]
    assert (site / "carried_one.py").read_text() == "VALUE = 7\n" and not (site / "torch.py").exists()


def test_wheels_that_do_not_fit_are_refused(tmp_path):
    wheel(tmp_path / "a", "carried_one", "cp39-cp39-win_amd64")
    with pytest.raises(wheels.NoWheels, match=r"^wheels: Python 3\.\d+ cannot use what is there: .*carried"):
        wheels.install([tmp_path / "a"], tmp_path / "1" / "site")
    (tmp_path / "empty").mkdir()
    with pytest.raises(wheels.NoWheels, match="got none"):
        wheels.install([tmp_path / "empty"], tmp_path / "2" / "site")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "x-1.0-py3-none-any.whl.part-ab").write_bytes(b"1")
    with pytest.raises(wheels.NoWheels, match="want x-1.0-py3-none-any.whl.part-aa, got ab"):
        wheels.install([tmp_path / "cut"], tmp_path / "3" / "site")


# --- its stages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_a_command_that_exists(kind, tmp_path):
    """Flags that a tool does not know, or a path that is not there, would be found on the GPU first."""
    for stage in listed(kind, tmp_path):
        for part in stage.parts:
            assert len(f"python {' '.join(part.command)}") < 2000
            if part.command[0] == "-m":
                parse_only(part)


def parse_only(part: Part) -> None:
    import argparse

    name, arguments = part.command[1], list(part.command[2:])
    file = ROOT / (name.replace(".", "/") + ".py")
    assert file.exists() or (ROOT / name.replace(".", "/") / "__main__.py").exists(), part
    if name == "benchmarks.gpu.tests":
        for path in (word for word in arguments if word.startswith("tests/")):
            assert (ROOT / path).exists(), path
    if not file.exists():
        return

    class Parsed(Exception):
        pass

    real = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *rest):
        real(self, *rest)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        main = import_module(name).main
        if ".rivals." in name:
            main = partial(main, "rival", "torch", lambda method: method)
        with pytest.raises(Parsed):
            main(arguments)


@pytest.mark.parametrize("op", stages.OPS)
def test_every_op_of_the_round_can_be_imported(op):
    """What it imports of ours is still called so; its cases are made on the device alone."""
    assert callable(import_module(f"benchmarks.ops.{op}").cases)


def test_no_op_and_no_test_is_left_out_of_the_round():
    assert sorted(stages.OPS) == sorted(p.stem for p in (ROOT / "benchmarks" / "ops").glob("*.py"))
    of_ops = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").rglob("test_*.py")}
    run = {Path(path).stem.removeprefix("test_") for path in stages.op_tests()}
    assert run == of_ops - set(stages.NOT_HERE) and of_ops > set(stages.NOT_HERE)


# --- tests on many processes --------------------------------------------------------------------------


def run_tests(folder: Path, results: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable, "-m", "benchmarks.gpu.tests", str(folder), "--workers", "2", "--each-s", "3",
            "--results", str(results), *flags,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=1200,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip


def test_failed_and_lost_tests_are_named_and_cost_no_other(tmp_path):
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "test_faults.py").write_text(stages.FAULTS)
    (suite / "test_good.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    (suite / "test_unreadable.py").write_text("import no_such_module\n")
    run = run_tests(suite, tmp_path)
    said = re.sub(
        r"\S*/suite/", "", run.stdout
    ).splitlines()  # pytest names files from where both folders are
    assert run.returncode == 1
    assert "FAILED test_faults.py::test_unequal: test_faults.py:4: assert (1 + 1) == 3" in said
    assert "LOST test_faults.py::test_endless: longer than 3 s" in said
    assert "LOST test_faults.py::test_deadly: its process ended with 11" in said
    assert any(line.startswith("FAILED test_unreadable.py: ") and "no_such_module" in line for line in said)
    assert said[-1] == "2 failed, 2 lost, 4 passed"
    again = run_tests(suite, tmp_path)
    assert again.stdout.splitlines()[-1] == "2 failed, 2 lost, 2 passed; 1 files passed in an earlier round"


# --- its instruments --------------------------------------------------------------------------------


def test_without_a_sanitizer_its_stage_says_so(capsys, monkeypatch):
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main([]) == parts.SKIPPED
    assert capsys.readouterr().out.startswith("skipped: compute-sanitizer is neither on the path")


@pytest.mark.parametrize(("found", "bad"), [("0 errors", False), ("3 errors", True)])
def test_what_a_sanitizer_finds(tmp_path, capsys, found, bad):
    said = f"========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: {found}\n"
    run = subprocess.CompletedProcess([], 9 if bad else 0, said)
    assert sanitize.judge("memcheck", "attention", run, tmp_path, {}) is bad
    assert json.loads((tmp_path / "sanitizer.jsonl").read_text())["verdict"] == found
    assert ("FAILED memcheck attention: 3 errors" in capsys.readouterr().out) is bad


def test_jobs_that_prepare_run_at_once_and_a_failed_one_is_named(capsys, tmp_path):
    commands = {"good": ("-c", "1"), "bad": ("-c", "raise SystemExit('no')"), "more": ("-c", "1")}
    assert prepare.run(commands, 2) == ["bad"]
    said = capsys.readouterr().out
    assert "bad: 1: no, " in said and "good: ok" in said and "more: ok" in said


@pytest.mark.long
def test_rehearsal(tmp_path):
    """The whole round at tiny shapes, as a script, without an installation on the path."""
    out = tmp_path / "out"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "benchmarks/gpu_round.py",
        "--rehearse",
        "--results",
        str(tmp_path / "results"),
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2000)
    assert run.returncode == 0, run.stderr
    assert {p.name for p in out.iterdir()} == {"rows.jsonl", "table.txt", "log.txt"}
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    became = {(r["stage"], r["part"]): r["outcome"] for r in rows if r["file"] == ROUND}
    assert became[("faults", "fails")] == "failed with 1: as it should"
    assert became[("faults", "hangs")].startswith("stopped after")
    assert became[("sanitizer", "memcheck, racecheck")].startswith("skipped: ")
    assert became[("tests", "with faults")] == "failed with 1: 1 failed, 2 lost, 2 passed"
    assert "FAILED " in run.stdout and "assert (1 + 1) == 3" in run.stdout
    for key in (("prepare", "machine, Triton"), ("step", "mae by kernel"), ("rivals", "timm_mae")):
        assert became[key].startswith("ok"), became
    assert all(became[("methods", name)].startswith("ok") for name in ("mae", "rmae", "cmae", "cmae_huang"))
    assert {r["file"] for r in rows} >= {"throughput.jsonl", "resized_crop.jsonl", "step_profile.jsonl"}
    assert all("failed" not in row for row in rows)
    assert MARK not in os.environ
