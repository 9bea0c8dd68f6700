"""Whatever is changed in the files of a run: a resume goes on, or ends in a line that says what is wrong."""

import pytest

from tests.engine.mutations import outcomes


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.long)])
def test_mutated_files_of_a_run_end_in_one_line(images, tmp_path, capsys, count):
    found = outcomes(images, tmp_path, count, capsys, first=1000 if count == 60 else 0)
    assert set(found) == {"resumed", "refused"}, found
    assert min(found.values()) > count // 10
