"""The repository keeps its shape: no name that hides another package, arrows one way, formatting."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from fastmim_kernels.inductor import needs_brief_log

from tests.conftest import LONGEST_FIRST

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def names(folder: Path) -> set[str]:
    return {p.stem for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}


def test_nothing_in_fastmim_hides_another_package():
    # `deepspeed fastmim/train.py` puts fastmim/ first on sys.path: fastmim/logging.py would be `logging`
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert names(ROOT / "fastmim") & taken <= {"__init__", "__pycache__"}


def test_no_folder_called_kernels_is_a_package():
    # Hugging Face publishes a package called `kernels`; ours is fastmim_kernels
    assert [*ROOT.glob("kernels/__init__.py"), *ROOT.glob("*/kernels/__init__.py")] == []


@pytest.mark.parametrize(
    "command",
    [["lint-imports"], ["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["codespell"]],
    ids=" ".join,
)
def test_tools_agree(command):
    tool = BIN / command[0]
    if not tool.exists():
        pytest.skip(f"{command[0]} is not installed beside {sys.executable}")
    run = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_only_the_engine_knows_torch_distributed():
    """import-linter sees packages, and torch is one: here the lines that import it are read."""
    for path in [*(ROOT / "fastmim").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        if "engine" not in path.parts:
            assert not re.search(
                r"torch\.distributed|from torch import .*\bdistributed\b", path.read_text()
            ), path


def test_the_kernels_need_nothing_but_torch_and_triton():
    code = "import sys, fastmim_kernels; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    heavy = {
        "fastmim",
        "deepspeed",
        "xformers",
        "mslk",
        "nvidia",
        "PIL",
        "tyro",
        "safetensors",
        "tensorboard",
    }
    heavy |= {"timm", "transformers", "torchvision"}
    assert {name.partition(".")[0] for name in loaded} & heavy == set()
    if (
        not needs_brief_log()
    ):  # the tracer of torch.compile takes as long as all of torch: not before it is wanted
        assert "torch._dynamo" not in loaded


def test_the_base_needs_torch_and_triton_only():
    """`pip install .` inside another codebase; the engine's needs are an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.split(r"[^a-z]", need)[0] for need in project["dependencies"]] == ["torch", "triton"]
    code = (
        "import sys\nfor name in ('numpy', 'timm', 'transformers', 'torchvision'): sys.modules[name] = None\n"
        "import torch, fastmim_kernels as k\n"
        "rows = torch.ones(2, 4, requires_grad=True)\n"
        "k.norm_pix_loss(rows, torch.rand(2, 4)).sum().backward()\n"
        "k.split_patches(k.sample_seeds(0, 0, torch.arange(2)), 4, 1)\n"
        "try: k.apply(torch.nn.Linear(2, 2))\nexcept ValueError as error: print(error)"
    )
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    }  # needs numpy
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and run.stdout.startswith("nothing to patch"), run.stdout + run.stderr


def test_help_imports_no_engine():
    """--help and a refused flag answer within a second or two: DeepSpeed and DALI take several."""
    code = (
        "import sys; sys.argv = ['train', '--help']\n"
        "from fastmim.train import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split("LOADED")[1].split())
    assert loaded & {"deepspeed", "nvidia", "matplotlib"} == set()
    assert "--method.mask-ratio" in run.stdout


def test_files_that_are_run_first_are_there():
    assert [path for path in LONGEST_FIRST if not (ROOT / path).is_file()] == []
    assert len(set(LONGEST_FIRST)) == len(LONGEST_FIRST)


def test_the_metadata_admits_what_is_known_to_serve():
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = SpecifierSet(project["requires-python"])
    assert all(f"3.{minor}.1" in python for minor in (11, 12, 13)) and "3.10.9" not in python
    needs = {need.name: need for need in map(Requirement, project["dependencies"])}
    assert all(f"2.{minor}.0" in needs["torch"].specifier for minor in range(10, 15))


def test_both_packages_say_that_they_are_typed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package, folder in (("fastmim", "fastmim"), ("fastmim_kernels", "kernels/fastmim_kernels")):
        assert "py.typed" in settings[package] and (ROOT / folder / "py.typed").is_file()


def test_the_grammar_is_that_of_the_oldest_python():
    import ast

    for folder in ("fastmim", "kernels", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            ast.parse(path.read_text(), str(path), feature_version=(3, 11))


def test_every_command_of_the_documents_names_what_there_is():
    """Paths, modules and make targets that a document tells one to use."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "ARCHITECTURE.md",
        "benchmarks/README.md",
        "docs/results.md",
        "docs/reliability.md",
        "SECURITY.md",
    ):
        text = (ROOT / name).read_text()
        for target in re.findall(r"`make ([a-z-]+)", text):
            assert target in targets, f"{name}: make {target}"
        for module in re.findall(r"-m ((?:benchmarks|tests)[.\w]+)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{name}: {module}"
        for path in re.findall(
            r"`((?:fastmim|tests|benchmarks|kernels|csrc|docs)/[\w/]+\.(?:py|md|cpp))`", text
        ):
            assert (ROOT / path).is_file(), f"{name}: {path}"
