"""The planted faults still fit the code they are of; and the script that plants them, on a tiny tree."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mutants import run
from tests.mutants.run import CAUGHT, NOT_APPLIED, ROOT, SURVIVED, Fault, Group, Runner

GROUPS = run.groups()
FAULTS = [(name, i) for name, group in GROUPS.items() for i in range(len(group.faults))]


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_has_faults_and_tests_that_exist(name):
    group = GROUPS[name]
    assert len(group.faults) >= 3
    assert len({(fault.path, fault.old, fault.new) for fault in group.faults}) == len(group.faults)
    assert group.tests and all((ROOT / path).is_file() for path in group.tests)


@pytest.mark.parametrize(("name", "i"), FAULTS)
def test_a_fault_fits_its_file(name, i):
    fault = GROUPS[name].faults[i]
    text = (ROOT / fault.path).read_text()
    assert text.count(fault.old) == 1, f"{fault.what}: want the old text once in {fault.path}"
    assert fault.planted(text) != text
    if fault.path.endswith(".py"):
        ast.parse(fault.planted(text))  # red for what it does, not for how it is written


# --- the script -------------------------------------------------------------------------------------

CODE = "def twice(x):\n    return 2 * x\n\n\ndef wait():\n    return 0\n"
TEST = (
    "from fastmim_kernels import twice, wait\n\n\ndef test_it():\n    assert (twice(2), wait()) == (4, 0)\n"
)


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A repository of one module, never committed, and one test."""
    for path, text in {"kernels/fastmim_kernels/__init__.py": CODE, "tests/test_x.py": TEST}.items():
        (tmp_path / "repo" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / path).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "repo", check=True)
    monkeypatch.setattr(run, "ROOT", tmp_path / "repo")
    return tmp_path


def planted(tree: Path, *faults: Fault) -> list[str]:
    scratch = tree / "scratch"
    scratch.mkdir()
    results = run.run_group(Group("x", ("tests/test_x.py",), faults), Runner(scratch), jobs=2)
    assert list(scratch.iterdir()) == []
    assert (run.ROOT / "kernels/fastmim_kernels/__init__.py").read_text() == CODE
    print(run.table({"x": results}))
    return [outcome for _, outcome, _ in results]


def test_what_becomes_of_a_fault(tree, monkeypatch, capsys):
    monkeypatch.setattr(run, "GRACE_S", 1)
    path = "kernels/fastmim_kernels/__init__.py"
    faults = (
        Fault(path, "2 * x", "3 * x", "a wrong factor"),
        Fault(path, "2 * x", "x + 2", "right for two alone"),
        Fault(path, "return", "yield", "there twice"),
        Fault(path, "return 0", "return next(filter(None, iter(int, 1)))", "an endless loop"),
        Fault(path, "2 * x", "3 * x", "tests that are not there", "no_such_test"),
    )
    assert planted(tree, *faults) == [CAUGHT, SURVIVED, NOT_APPLIED, CAUGHT, SURVIVED]
    said = capsys.readouterr().out
    assert "tests/test_x.py::test_it" in said and "it hung: ended after" in said and "no test was run" in said
    assert f"x: {SURVIVED}: {path}: right for two alone" in said


def test_nothing_is_planted_into_a_red_tree(tree):
    (run.ROOT / "tests/test_x.py").write_text(TEST.replace("4", "5"))
    with pytest.raises(SystemExit, match="red without any fault"):
        planted(tree, Fault("kernels/fastmim_kernels/__init__.py", "2", "3", ""))


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    script = subprocess.Popen(
        [sys.executable, "tests/mutants/run.py", "ema"], cwd=ROOT, env=environment, stdout=subprocess.PIPE
    )
    for _ in range(300):  # until its first test runs
        children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
        if children and any(tmp_path.glob("mutants-*/*/tests")):
            break
        time.sleep(0.1)
    else:
        pytest.fail("nothing was begun")
    time.sleep(0.5)
    script.terminate()
    script.communicate(timeout=300)
    assert script.returncode == 143
    assert not list(tmp_path.glob("mutants-*"))
    assert not any(Path(f"/proc/{child}/cmdline").exists() for child in children)


def test_flags(capsys):
    assert run.main(["ema", "--list"]) == 0
    assert "ema_update.py: momentum and rate exchanged" in capsys.readouterr().out
    for flags in (["emma"], ["--jobs", "0"]):
        with pytest.raises(SystemExit, match="2"):
            run.main(flags)
