"""Values that no run can mean are refused in a line that names the flag; no number ends in a traceback."""

import dataclasses
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fastmim.arguments import parse
from fastmim.engine import pretrain
from fastmim.engine.config import Run, check_numbers
from fastmim.engine.pretrain import prepare, train
from fastmim.interop.encoders import load_encoder
from fastmim.interop.metadata import config_of, encoder_metadata
from fastmim.methods import METHODS
from fastmim.models.vit import ViTConfig
from fastmim.train import main
from tests.engine.conftest import MODEL, TINY, tiny_run

ODD = (
    *(
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "-0.0",
        "1e308",
        "1e-320",
        "2147483648",
        "9" * 30,
        "1.5",
        "x",
        "",
        "--",
    ),
    *("0x10", "1e", "None", "\u0663", "1,5", "[1]", "-1e308", "18446744073709551616", "True"),
)
REFUSED = [  # the flag with its value, and what the line says
    ("--optim.lr -0.1", "optim.lr: want 0 or more"),
    ("--optim.blr nan", "optim.blr: want 0 or more, and a number, got nan"),
    ("--optim.clip inf", "optim.clip: want 0 or more, and a number, got inf"),
    ("--optim.clip nan", "optim.clip: "),
    ("--optim.eps inf", "optim.eps: "),
    ("--optim.warmup-epochs inf", "optim.warmup-epochs: "),
    ("--optim.weight-decay-end nan", "optim.weight-decay-end: "),
    ("--optim.betas nan 0.9", "optim.betas: "),
    ("--optim.layer-decay nan", "optim.layer-decay: "),
    ("--model.std inf 1 1", "model.std: want a finite number, got inf"),
    ("--model.mean nan 0 0", "model.mean: want a finite number, got nan"),
    ("--model.layer-scale inf", "model.layer-scale: want a finite number"),
    ("--model.depth 1000000000", "model.depth: want 1 to 1024"),
    ("--epochs inf", "epochs: want a finite number"),
    ("--epochs 1e308", "steps, epochs: want a run of at most"),
    ("--steps 99999999999999999999999", "steps: want an integer below 2^63"),
    ("--data.threads 2147483648", "data.threads: want 1 to 1024"),
    ("--data.prefetch 1000000000", "data.prefetch: want 1 to 256"),
    ("--method.mask-ratio nan", "method.mask-ratio: "),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED, ids=[flags for flags, _ in REFUSED])
def test_what_no_run_can_mean_is_refused_by_its_flag(images, tmp_path, capsys, flags, words):
    run_dir = tmp_path / "run"
    arguments = [*TINY, "--data.path", str(images), "--run-dir", str(run_dir), *flags.split()]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and not run_dir.exists()
    said = [line for line in said if "given more than once" not in line]
    assert len(said) == 1 and said[0].startswith(f"fastmim: error: {words}"), said


def numbers(config, prefix: str = "") -> list[str]:
    """The flags of all numbers in a configuration."""
    flags = []
    for f in dataclasses.fields(config):
        flag, value = f"{prefix}{f.name.replace('_', '-')}", getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flags += numbers(value, f"{flag}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flags.append(flag)
    return flags


def test_no_odd_number_ends_in_a_traceback(images, tmp_path):
    """300 command lines up to the first step; a traceback is any exception but a refusal."""
    rng = random.Random(0)
    methods = [name for name in METHODS if name not in ("beit", "cae")]  # these two want a tokenizer
    flags = numbers(tiny_run(images, tmp_path))
    lines = [(method, f"--{flag}", value) for method in methods for flag in flags for value in ODD]
    where = ["--data.path", str(images), "--run-dir", str(tmp_path / "run")]
    refused = 0
    for method, flag, value in rng.sample(lines, 300):
        arguments = plain([*TINY[2:], "--method", method, flag, value], method)
        try:
            command, _ = parse([*arguments, *where], quiet=True)
            prepare(command.run)
        except SystemExit as stopped:
            refused += stopped.code == 2
        except pretrain.REFUSALS:
            refused += 1
    assert 150 < refused < 300 and not (tmp_path / "run").exists()


def plain(arguments: list[str], method: str) -> list[str]:
    """Without the flags of a decoder, which not every method has."""
    pairs = [arguments[i : i + 2] for i in range(0, len(arguments), 2)]
    kept = [pair for pair in pairs if method in ("mae", "rmae") or not pair[0].startswith("--method.decoder")]
    return [word for pair in kept for word in pair]


def test_every_number_of_every_method_is_looked_at(images, tmp_path):
    """A field that is added later is too, at any depth."""
    for method in METHODS.values():
        run = replace(tiny_run(images, tmp_path), method=method())
        for flag in numbers(run):
            if isinstance(value_of(run, flag), float):
                broken = with_value(run, flag, math.inf)
                with pytest.raises(ValueError, match=f"^{flag}: want a finite number, got inf"):
                    check_numbers(broken)


def value_of(config, flag: str):
    for name in flag.replace("-", "_").split("."):
        config = getattr(config, name)
    return config


def with_value(run: Run, flag: str, value) -> Run:
    """A copy in which this field has the value, whatever the configuration thinks of it."""
    import copy

    run = copy.deepcopy(run)
    *path, name = flag.replace("-", "_").split(".")
    config = run
    for part in path:
        config = getattr(config, part)
    object.__setattr__(config, name, value)
    return run


def test_facts_that_json_cannot_hold_are_refused_before_the_first_step(images, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "run_facts", lambda *_: {"x": math.nan, "total_steps": 10})
    with pytest.raises(ValueError, match="JSON compliant"):
        prepare(tiny_run(images, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


BROKEN = [
    ("depth", "1000000000", "model.depth: want 1 to 1024"),
    ("depth", "900", "900 blocks of width 16 have"),
    ("width", "65536", "1 blocks of width 65536 have"),
    ("depth", "((((", "metadata depth: want int, got '(((('"),
    ("depth", "True", "metadata depth: want int"),
    ("mean", "(" * 5000, "metadata mean: want list"),
    ("std", "__import__('os').mkdir('x')", "metadata std: want list"),
    ("mean", "[0.5, 'x', 1]", "metadata mean: want list"),
    ("final_norm", "2", "metadata final_norm: want bool"),
    ("image_height", "10**9", "metadata image_height: want int"),
]


@pytest.mark.parametrize(("name", "value", "words"), BROKEN, ids=[f"{n}-{v[:12]}" for n, v, _ in BROKEN])
def test_metadata_of_an_encoder_is_refused_by_name(encoder_file, tmp_path, name, value, words):
    file = tmp_path / "encoder.safetensors"
    save_file(load_file(encoder_file), file, encoder_metadata(MODEL) | {name: value})
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        load_encoder(file)
    assert str(file) in str(error.value)


@pytest.fixture(scope="module")
def encoder_file(images, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("encoder") / "run"
    train(prepare(tiny_run(images, run_dir, "mae", steps=1)))
    return run_dir / "encoder.safetensors"


def test_metadata_says_the_configuration_again():
    for config in (MODEL, ViTConfig(width=64, depth=2, heads=4, layer_scale=1e-5, final_norm=False)):
        metadata = json.loads(json.dumps(encoder_metadata(config)))
        assert encoder_metadata(config_of(metadata)) == metadata


@pytest.mark.parametrize("method", ["mae", "rmae", "cmae", "cmae_huang", "beit", "data2vec", "cae"])
def test_more_patches_than_a_mask_is_drawn_of(method):
    model = ViTConfig(width=16, depth=1, heads=2, patch=4, image_size=264)
    with pytest.raises(ValueError, match="model.image-size, model.patch: masks are drawn of at most 4096"):
        METHODS[method]().build(model)
