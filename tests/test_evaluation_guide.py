"""docs/evaluation.md: every command in it is one, with flags that it has."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from fastmim import cli
from fastmim.arguments import Choices, command_of
from fastmim.commands.transfer import OURS

GUIDE = Path(__file__).parents[1] / "docs" / "evaluation.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), flags=re.S)
LINES = [line for block in BLOCKS for line in block.splitlines() if line]


def flags_of(words):
    return [word for word in words if word.startswith("--")]


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_guide_is_one(line, monkeypatch, capsys):
    program, name, *words = shlex.split(line, comments=True)
    assert program == "fastmim" and name in cli.COMMANDS
    if name in ("finetune", "linear"):
        known = {f"--{flag}" for flag in OURS} | {"--data.path", "--data.val", "--recipe"}
    else:
        monkeypatch.setattr(sys, "argv", ["fastmim", name, "--help"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    assert set(flags_of(words)) <= known


def test_flags_in_its_sentences_are_those_of_training():
    text = re.sub(r"```bash\n.*?```", "", GUIDE.read_text(), flags=re.S)
    given = {"--probe.data": "x", "--probe.every": "2", "--data.subset": "10%", "--model.image-size": "64"}
    assert all(flag in text for flag in given)
    words = [word for pair in given.items() for word in pair]
    run = command_of(Choices.of(words), words, quiet=True).run
    assert (str(run.probe.data), run.probe.every, run.data.subset, run.model.image_size) == (
        "x",
        2,
        "10%",
        64,
    )
