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


def saved_run(folder: Path, *arguments: str, **more) -> tuple[str, ...]:
    """A run directory that these arguments started; the flags that resume it."""
    (folder / "config.json").write_text(json.dumps({"arguments": arguments, **more}))
    return "--run-dir", str(folder), "--resume"


def test_what_is_given_on_resume_takes_the_place_of_what_was_saved(tmp_path):
    saved = ["--method=rmae", "--method.no-norm-pix", "--optim.betas", "0.9", "0.99", "--steps", "4"]
    resume = saved_run(tmp_path, *saved, "--log-every=7", "--seed", "3")
    run, kept = parse([*resume, "--method.norm_pix", "--optim.betas=0.8", "0.95", "--log-every", "5"])
    assert (run.run.method.norm_pix, run.run.optim.betas, run.run.log_every) == (True, (0.8, 0.95), 5)
    assert (run.run.seed, run.run.steps, run.run.allow_changes) == (3, 4, ())
    again = saved_run(tmp_path, *kept)
    assert parse(again)[0].run == run.run
    assert kept.count("--optim.betas") + kept.count("--optim.betas=0.8") == 1  # it does not grow by resuming
    assert run_of(*resume, "--method.no-norm-pix").method.norm_pix is False  # the same command, once more


@pytest.mark.parametrize(
    ("saved", "given", "steps", "epochs"),
    [
        (["--steps", "4"], ["--epochs", "5"], None, 5.0),
        (["--steps=4"], ["--epochs=5"], None, 5.0),
        (["--epochs", "2"], ["--steps", "9"], 9, 6.0),
        (["--steps", "4"], ["--steps", "9"], 9, 6.0),
    ],
)
def test_epochs_and_steps_replace_one_another_and_may_differ_from_the_checkpoint(
    tmp_path, saved, given, steps, epochs
):
    run = run_of(*saved_run(tmp_path, *saved), *given, "--allow-changes", "seed")
    assert (run.steps, run.epochs, run.allow_changes) == (steps, epochs, ("seed", "total_steps"))
    assert run_of(*saved_run(tmp_path, *saved)).allow_changes == ()


@pytest.mark.parametrize(
    ("saved", "given", "words"),
    [
        ([], ["--method", "rmae"], "method: the run was started with mae, got rmae"),
        (["--method", "rmae", "--method.t2", "full"], ["--method=mae"], "started with rmae, got mae"),
        (
            ["--data.path", "/x"],
            ["--recipe", "cifar10"],
            "recipe: the run was started with imagenet, got cif",
        ),
        (["--method", "cmae"], ["--variant", "byol"], "variant: the run was started without --variant, got"),
        (["--model", "vit_small"], ["--model", "vit_tiny"], "model: the run was started with vit_small, got"),
        ([], ["--init-from", "a.pth"], "init-from: the run started from fresh weights, got "),
        (["--init-from", "/b.pth"], ["--init-from", "/a.pth"], "the run started from /b.pth, got /a.pth"),
        (
            [],
            ["--recipe", "imagnet"],
            "recipe: want one of imagenet, cifar10, sample, got 'imagnet'; did you",
        ),
    ],
)
def test_a_run_keeps_what_it_is_of(tmp_path, capsys, saved, given, words):
    resume = saved_run(tmp_path, *saved)
    with pytest.raises(SystemExit) as stopped:
        main([*resume, *given])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in error and error.count("\n") == 1


def test_what_a_run_is_of_may_be_said_again(tmp_path, capsys):
    saved = ["--method", "cmae", "--init-from", "/a/b.pth", "--data.path", "/x"]
    resume = saved_run(tmp_path, *saved)
    run = run_of(*resume)
    assert run_of(*resume, *saved, "--variant", "patch", "--model", "vit_base", "--recipe", "imagenet") == run
    assert run_of(*resume, "--init-from", "/a/./b.pth").init_from == Path("/a/b.pth")
    assert capsys.readouterr().err == ""


def test_data_given_anew_is_no_other_recipe(tmp_path):
    resume = saved_run(tmp_path, "--method", "mae")
    run = run_of(*resume, "--data.path", "/images")
    assert (run.data.path, run.model.size) == (Path("/images"), (64, 64))


def test_paths_are_saved_as_they_mean_the_same_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, kept = parse(["--data.path", "a/{0..3}.tar", "--init_from=b.pth", "--run-dir", "runs/x"])
    assert kept == [
        "--data.path", f"{tmp_path}/a/{{0..3}}.tar", f"--init_from={tmp_path}/b.pth",
        "--run-dir", f"{tmp_path}/runs/x",
    ]  # fmt: skip
    assert command.run.data.path == tmp_path / "a/{0..3}.tar"
    resume = saved_run(tmp_path, "--data.path", "images")  # as older versions saved it
    assert run_of(*resume).data.path == tmp_path / "images"


def test_data_moved_with_the_run_is_found_by_its_place(tmp_path, capsys):
    (tmp_path / "new" / "run").mkdir(parents=True)
    (tmp_path / "new" / "set").mkdir()
    for path in ("set", "set/{0..3}.tar"):
        saved = ["--data.path", f"{tmp_path}/old/{path}"]
        resume = saved_run(tmp_path / "new" / "run", *saved, run_dir=f"{tmp_path}/old/run")
        assert run_of(*resume).data.path == tmp_path / "new" / path
        assert (
            f"no more at {tmp_path}/old/{path}: taken from {tmp_path}/new/{path}" in capsys.readouterr().err
        )
        assert run_of(*resume, "--data.path", "/x").data.path == Path("/x")
    (tmp_path / "new" / "set").rmdir()
    with pytest.raises(
        ValueError, match="where nothing is, nor at .*/new/set/.*give its place by --data.path"
    ):
        parse(resume)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"arguments": 3}', "{}"])
def test_a_config_that_no_run_wrote(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged, or no run wrote it"):
        parse(["--resume", "--run-dir", str(tmp_path)])


def test_a_flag_given_twice_is_said(capsys):
    assert run_of("--seed", "1", "--method.no-norm-pix", "--seed=2", "--method.norm-pix").seed == 2
    assert capsys.readouterr().err.splitlines() == [
        "fastmim: note: --seed is given more than once; the last counts",
        "fastmim: note: --method.norm-pix is given more than once; the last counts",
    ]


def test_shortened_flags_are_none(capsys):
    for flag in ("--resum", "--epoch", "--method.mask"):
        with pytest.raises(SystemExit):
            parse([flag, "1"])
        assert "Unrecognized" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "rmea"],
            "method: want one of mae, rmae, cmae, cmae_huang, simmim, beit, ibot, data2vec, mocov3, dino, "
            "cae, supervised, finetune, linear, dvae, dvae_large, vq, kmeans, got 'rmea'; did you mean rmae?",
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
        (["--data.threads", "0"], "data.threads: want 1 to 1024, got 0"),
        (["--allow-changes", "seed"], "allow-changes: of use with --resume only, got seed"),
        (["--data.path="], "data.path: want a path, got nothing"),
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
    assert message in error
    assert error.startswith("fastmim: error: ") and error.count("\n") == 1
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


def test_a_tokenizer_is_found_from_any_folder(tmp_path, monkeypatch):
    """What is saved with the run names it absolutely, as it does the data."""
    monkeypatch.chdir(tmp_path)
    command, saved = parse(["--method", "beit", "--method.tokenizer", "tokens/run"])
    assert command.run.method.tokenizer == tmp_path / "tokens" / "run"
    assert str(tmp_path / "tokens" / "run") in saved
