"""`fastmim methods`: the README's table, made of what each method says of itself."""

from pathlib import Path

from fastmim.commands.methods import main, markdown, rows
from fastmim.methods import METHODS

README = Path(__file__).parents[1] / "README.md"


def test_the_table_of_the_readme_is_what_the_command_prints(capsys):
    assert markdown(rows()) in README.read_text()
    main(["--markdown"])
    assert capsys.readouterr().out.strip() == markdown(rows())


def test_every_method_says_all_of_itself():
    for row, name in zip(rows(), METHODS, strict=True):
        assert row[0] == f"`{name}`" and all(row), row
    assert {row[0]: float(row[5]) for row in rows()}["`mae`"] == 1.0


def test_it_is_printed_for_a_terminal(capsys):
    main([])
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{printed}" for name in METHODS) and "arXiv:2208.04164" in printed
