"""The command line: precedence, suggestions, and every refusal in plain words before anything starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastmim.arguments import parse
from fastmim.methods.rmae import RMAEConfig
from fastmim.train import main

ROOT = Path(__file__).resolve().parents[1]


def run_of(*arguments: str):
    return parse(arguments)[0].run


def test_without_data_it_is_the_sample_run():
    run = run_of("--local_rank=0", "--method", "rmae")
    assert isinstance(run.method, RMAEConfig)
    assert run.model.size == (64, 64)
    assert run.data.path is None


def test_with_data_it_is_the_run_of_the_paper():
    run = run_of("--method=rmae", "--data.path", "somewhere")
    assert (run.model.width, run.model.depth, run.model.patch, run.batch, run.epochs) == (
        768,
        12,
        16,
        1024,
        100,
    )
    assert run.optim.peak_lr(run.batch) == pytest.approx(1.2e-3)
    assert run_of("--data.path=x").optim.peak_lr(1024) == pytest.approx(6e-4)
    assert run_of("--data.path", "x", "--model", "vit_huge").model.patch == 14


def test_dotted_names_override_model_and_recipe():
    run = run_of(
        "--method", "rmae", "--recipe", "cifar10", "--data.path", "x", "--model", "vit_small",
        "--model.image-size", "32", "64", "--method.t2", "full", "--method.relax_weight", "0.5",
        "--method.no-norm-pix", "--optim.betas", "0.9", "0.999", "--zero", "3",
    )  # fmt: skip
    assert (run.model.width, run.model.patch, run.model.size) == (384, 4, (32, 64))
    assert (run.method.t2, run.method.relax_weight, run.method.norm_pix) == ("full", 0.5, False)
    assert run.optim.betas == (0.9, 0.999)
    assert run.zero == 3


def test_resume_takes_up_the_saved_command_line(tmp_path):
    saved = ["--method", "rmae", "--method.t2", "full", "--batch", "48", "--run-dir", str(tmp_path)]
    saved += ["--resume", "--allow-changes", "seed", "world", "--epochs", "3"]
    (tmp_path / "config.json").write_text(json.dumps({"arguments": saved}))
    run = run_of("--run-dir", str(tmp_path), "--resume", "--log-every", "3")
    assert (run.method.t2, run.batch, run.log_every, run.resume) == ("full", 48, 3, True)
    assert (run.allow_changes, run.epochs) == ((), 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "rmea"],
            "method: want one of mae, rmae, cmae, cmae_huang, got 'rmea'; did you mean rmae?",
        ),
        (["--method", "cmae", "--variant", "byoll"], "got 'byoll'; did you mean byol?"),
        (["--method", "mae", "--variant", "byol"], "variant of mae: want one of color-whole, color-visible"),
        (["--method", "rmae", "--variant", "byol"], "variant: rmae has none, got 'byol'"),
        (["--method", "cmae", "--method.no-mask-token"], "complementary views share no position"),
        (["--method", "cmae", "--batch", "1"], "InfoNCE wants two or more images"),
        (["--model", "vit_bsae"], "got 'vit_bsae'; did you mean vit_base?"),
        (["--recipe", "cifar"], "got 'cifar'; did you mean cifar10?"),
        (["--model.image-size", "100"], "model.image-size: want multiples of the patch, 8, got 100 x 100"),
        (["--method.mask-ratio", "1.5"], "method.mask-ratio: want a ratio between 0 and 1, got 1.5"),
        (["--batch", "0"], "batch: want at least 1, got 0"),
        (["--steps", "5", "--epochs", "2"], "steps, epochs: want one of them, got both"),
        (["--resume"], "resume: want --run-dir"),
        (["--resume", "--run-dir", "nowhere"], "want a run directory with its config.json"),
        (["--data.path", "no/such/folder"], "no/such/folder"),
        (["--batch", "63", "--accumulate", "2"], "want a multiple of ranks * accumulate"),
        (
            ["--model.attention", "xformers"],
            "attention: xformers asked for, but xformers has no cpu operator",
        ),
        (["--init-from", "no/such/file"], "init-from: want a run directory or a file of weights"),
        (["--optim.name", "apex"], "optim.name apex: want NVIDIA's apex"),
        (["--model.channels", "2", "--model.mean", "0.5", "0.5", "--model.std", "1", "1"], "channels"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_refused_in_plain_words_with_nothing_written(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.replace("│", " ").split())  # refused while parsing: tyro draws a frame
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--method.mask-raito", "0.5"])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert "--method.mask-ratio" in shown.out + shown.err


def test_print_config_is_json_and_stops(capsys):
    main(["--method", "rmae", "--print-config", "--seed", "7"])
    config = json.loads(capsys.readouterr().out)
    assert config["method"]["name"] == "rmae"
    assert config["seed"] == 7


@pytest.mark.parametrize(
    "command", [["fastmim/train.py"], ["-m", "fastmim.train"], ["-m", "fastmim.cli", "train"]], ids=" ".join
)
def test_all_ways_in(command):
    """As a script sys.path[0] is fastmim/, where a module of ours could hide one of the standard library."""
    run = subprocess.run(
        [sys.executable, *command, "--print-config"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout)["method"]["name"] == "mae"


def test_doctor_says_what_and_why():
    run = subprocess.run(
        [sys.executable, "-m", "fastmim.cli", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(run.stdout)
    assert report["versions"]["torch"]
    assert {"attention", "kernels", "decoder", "optimizer", "precision", "csrc"} <= report["choices"].keys()
    assert all(choice["use"] and choice["why"] for choice in report["choices"].values())
    backends = report["attention_backends"]
    assert list(backends) == ["xformers", "sdpa", "tile", "varlen"] and backends["sdpa"] == "serves"
    if report["choices"]["precision"]["use"] == "fp32":  # no GPU
        assert "no cpu operator" in backends["varlen"] and "torch 2.1" in backends["xformers"]


def test_an_unknown_command_names_the_nearest():
    run = subprocess.run([sys.executable, "-m", "fastmim.cli", "docter"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "did you mean doctor?" in run.stderr
