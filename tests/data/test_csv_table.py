"""CSVs that people open: no cell is a formula, and what is read back is what was written."""

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumizome.data.csv_table import guard, unguard, write_csv
from sumizome.data.reject_table import RejectLine, read_rejects, write_rejects
from sumizome.data.tasks import Reject
from sumizome.errors import DataError

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=HYPERLINK(0)", '=cmd|"/c calc"!A1')


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_begins_as_a_formula(text: str) -> None:
    assert guard(text)[0] == "'"


@given(st.text(max_size=8) | st.sampled_from(("'", "''", "'=", *FORMULAS)))
def test_a_guarded_text_comes_back(text: str) -> None:
    assert unguard(guard(text)) == text
    assert not guard(text).startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


def test_numbers_are_no_texts(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["a", "b"], [["-1", -1], ["x", 0.5]])
    with (tmp_path / "a.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["'-1", "-1"], ["x", "0.5"]]


def test_rejects_come_back(tmp_path: Path) -> None:
    rejects = [Reject(0, "=1.png", "truncated", 'its, "end"'), Reject(1, "'a.png", "too_small", "line\nbreak")]
    write_rejects(tmp_path / "r.csv", rejects, [Path("/a"), Path("/-b")])
    assert list(read_rejects(tmp_path / "r.csv")) == [
        RejectLine("/a", "=1.png", "truncated", 'its, "end"'),
        RejectLine("/-b", "'a.png", "too_small", "line\\nbreak"),  # a line end is shown, not made
    ]


@pytest.mark.parametrize("content", [b"", b"a,b\n", b"source,path,reason,sentence\na,b\n", b"\xff"])
def test_another_file_is_no_table_of_rejects(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"r\.csv"):
        list(read_rejects(tmp_path / "r.csv"))
