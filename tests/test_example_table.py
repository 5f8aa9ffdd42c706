"""The example of tables: what a file of one's own may lack is said, not left out in silence."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from examples import table

NUMBERS = np.random.default_rng(0).normal(size=(60, 3))


def csv(path: Path, **columns: object) -> Path:
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def test_what_is_left_out_of_a_file_is_said(tmp_path, capsys):
    a, b, _ = NUMBERS.T.copy()
    b[3] = np.nan
    found = table.load(csv(tmp_path / "t.csv", a=a, b=b, name=["x"] * 60), whiten=False)
    said = capsys.readouterr().out
    assert found.names == ["a", "b"] and sum(map(len, found[1:4])) == 59
    assert "without the columns name" in said and "without 1 of 60 rows" in said


@pytest.mark.parametrize(
    ("rows", "whiten", "message"),
    [
        (5, False, r"t\.csv: got 5 rows of 3 numeric columns .* expected 20 rows or more"),
        (60, True, r"data: got a column that those before it determine \(c\)"),
    ],
)
def test_tables_that_are_too_small_or_determined(tmp_path, rows, whiten, message):
    a, b, _ = NUMBERS[:rows].T
    with pytest.raises(ValueError, match=message):
        table.load(csv(tmp_path / "t.csv", a=a, b=b, c=np.zeros(rows) + a), whiten)
