"""`fastmim tables`: a row from first weights to Markdown by the real commands, kept and gone on with."""

import csv
import json
import sys
from dataclasses import replace

import pytest

from fastmim import cli
from fastmim.commands import tables
from fastmim.commands.paper import SCRATCH, TABLES
from fastmim.methods import METHODS
from tests.engine.conftest import write_images

SMALL = ("--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.image-size", "16")
FLAGS = ("--recipe", "cifar10", "--data.decoder", "pillow", "--data.threads", "1")


@pytest.fixture
def data(tmp_path):
    for split, count in (("train", 72), ("test", 12)):
        write_images(tmp_path / "data" / split, count)
    return tmp_path / "data"


@pytest.fixture
def smaller(monkeypatch):
    """The same commands at a scale of seconds."""
    scale = replace(
        tables.SCALES["tiny"], model=SMALL, images=16, batch=8, finetune_images=128, linear_images=128,
        pretrain=FLAGS, finetune=(*FLAGS, "--method.mix-block", "4"), linear=(*FLAGS, "--optim.lr", "0.1"),
    )  # fmt: skip
    monkeypatch.setitem(tables.SCALES, "tiny", scale)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastmim", "tables", *map(str, arguments)])
    cli.main()


@pytest.mark.slow
@pytest.mark.usefixtures("smaller")
def test_a_row_is_made_kept_and_written(data, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    arguments = ["1", "--data", data, "--out", out, "--rows", "MAE"]
    run(monkeypatch, *arguments)
    assert "table_1.md: 1 of 1 rows" in capfd.readouterr().out
    rows = list(csv.DictReader((out / "table_1.csv").open()))
    assert [(row["row"], row["column"], row["paper"]) for row in rows] == [
        ("MAE", "FT", "83.1"), ("MAE", "PSNR", "22.2"),
    ]  # fmt: skip
    last = json.loads((out / "runs" / "mae-ft" / "validation.jsonl").read_text().splitlines()[-1])
    assert float(rows[0]["here"]) == pytest.approx(100 * last["top1"]) and last["images"] == 12
    text = (out / "table_1.md").read_text()
    assert (
        f"| MAE | {100 * last['top1']:.1f} |" in text and "| 83.1 | 22.2 |" in text and "Scale tiny" in text
    )
    weights = json.loads((out / "runs" / "mae-ft" / "config.json").read_text())["run"]["init_from"]
    assert weights == str(out / "runs" / "mae")
    monkeypatch.setattr(tables.subprocess, "run", None)  # nothing is left to run
    run(monkeypatch, *arguments)
    assert (out / "table_1.md").read_text() == text


@pytest.mark.usefixtures("smaller")
def test_what_is_done_stays_and_what_was_stopped_goes_on(data, tmp_path, monkeypatch, capsys):
    said = []

    class Ended:
        returncode = 1

    monkeypatch.setattr(tables.subprocess, "run", lambda command, **_: said.append(command) or Ended())
    arguments = ["3", "--data", data, "--out", tmp_path, "--rows", "class token"]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 1 and "the same command goes on from here" in capsys.readouterr().err
    assert said[0][2:4] == ["--method", "cmae"] and "--resume" not in said[0]
    (tmp_path / "runs" / "cmae-variant-cls" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert said[1][2:] == ["--run-dir", str(tmp_path / "runs" / "cmae-variant-cls"), "--resume"]
    assert not (tmp_path / "table_3.md").exists()


@pytest.mark.parametrize("row", ["MAE", "C-MAE"])
def test_a_tenth_of_each_run_warms_up(row, data, tmp_path, monkeypatch, capsys):
    """Whatever an epoch is of: the whole set, or a tenth of the labels."""
    monkeypatch.setattr(tables.Maker, "num_images", 50_000)
    run(monkeypatch, "4", "--data", data, "--out", tmp_path, "--dry-run", "--rows", row)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "train.py" in line]
    found = {}
    for words in lines:
        names = ("--steps", "--batch", "--optim.warmup-epochs")
        value = {name: float(words[words.index(name) + 1]) for name in names}
        epoch = 5_000 if "--labels" in words else 50_000
        per_epoch = epoch // int(value["--batch"])
        found[epoch, value["--batch"]] = value["--optim.warmup-epochs"] * per_epoch / value["--steps"]
    assert {epoch for epoch, _ in found} == {5_000, 50_000} and len(lines) == 4
    assert all(share == pytest.approx(0.1, rel=1e-3) for share in found.values())


def test_every_table_says_its_commands(data, tmp_path, monkeypatch, capsys):
    """Each line of each table at each scale is one that the training command takes."""
    import shlex

    from fastmim.arguments import parse

    for scale in tables.SCALES:
        run(monkeypatch, *TABLES, "--data", data, "--out", tmp_path, "--scale", scale, "--dry-run",
            "--tokenizer", tmp_path)  # fmt: skip
        lines = [line for line in capsys.readouterr().out.splitlines() if "train.py" in line]
        assert len(lines) > 60
        for line in dict.fromkeys(lines):
            words = shlex.split(line)
            given = words[2:]
            if "--labels" in given:  # what `fastmim finetune` makes of it
                given = ["--data.subset" if word == "--labels" else word for word in given]
            command, _ = parse(given, quiet=True)
            assert command.run.run_dir is not None


@pytest.mark.slow
@pytest.mark.usefixtures("smaller")
def test_a_figure_is_drawn_of_the_runs(data, tmp_path, monkeypatch):
    from fastmim.commands import figures

    monkeypatch.setitem(figures.FIGURES, 1, (figures.MAE, figures.RANDOM))
    command = ["fastmim", "figures", "1", "--data", str(data), "--out", str(tmp_path / "o"), "--images", "12"]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    rows = list(csv.DictReader((tmp_path / "o" / "figure_1.csv").open()))
    assert {row["checkpoint"] for row in rows} == {"MAE", "random init"}
    assert len(rows) == 9 * (2 + 1)  # of MAE the block and the norm, of the classifier the block alone
    assert (tmp_path / "o" / "figure_1.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "o" / "runs" / "scratch-ft" / "model.safetensors").exists()


def test_every_figure_says_its_commands(data, tmp_path, monkeypatch, capsys):
    command = ["fastmim", "figures", "1", "2", "3", "4", "--data", str(data), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--dry-run"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--cue-conflict: want the images of figure 4" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--dry-run", "--cue-conflict", str(tmp_path)])
    cli.main()
    said = capsys.readouterr().out
    assert said.count("--method mae") >= 8 and said.count("--method mocov3") >= 1


def test_rows_are_the_papers():
    assert [len(TABLES[n].rows) for n in sorted(TABLES)] == [11, 11, 4, 7, 16, 8, 3, 6]
    for table in TABLES.values():
        labels = [row.label for row in table.rows]
        assert len(set(labels)) == len(labels)
        for row in table.rows:
            assert row.method == SCRATCH or row.method in METHODS
            assert set(row.paper) <= {"FT", "PSNR", "linear", "10% FT"}
    keys = {}
    for table in TABLES.values():
        for row in table.rows:
            how = row.method, row.flags, row.epochs, row.subset
            assert keys.setdefault(row.key, how) == how  # one place, one run


def test_hours_are_of_the_arithmetic():
    """100 epochs from scratch at the 3,564 images/s that an H200 reached are ten hours."""
    mae, scratch = (tables.with_rows(TABLES[1], [label]) for label in ("MAE", "random init"))
    assert tables.gpu_hours(scratch) == pytest.approx(100 * tables.IMAGENET_IMAGES / 3564 / 3600, rel=0.3)
    assert 1.3 < tables.gpu_hours(mae) / tables.gpu_hours(scratch) < 2
    assert tables.gpu_hours(TABLES[5]) / 16 < 0.5 * tables.gpu_hours(mae)  # of ViT-S
    assert tables.gpu_hours(TABLES[1]) > 5 * tables.gpu_hours(mae)


def test_bad_questions_are_a_line(data, tmp_path, monkeypatch, capsys):
    for arguments, message in [
        (("1", "--data", tmp_path / "no"), "want train/CLASS and val/CLASS or test/CLASS, got no"),
        (("1", "--data", data, "--rows", "nobody"), "--rows: want some of random init"),
        (("1", "--data", data, "--seeds", "0"), "--seeds of at least 1"),
        (("9", "--data", data), "invalid choice: 9"),
    ]:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *arguments, "--out", tmp_path / "out")
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
