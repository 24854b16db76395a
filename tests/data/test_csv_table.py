"""CSVs that people open: no cell is a formula, and what is read back is what was written."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumizome.data.csv_table import guard, unguard, write_csv
from sumizome.data.records import read_rows
from sumizome.data.reject_table import RejectLine, read_rejects, write_rejects
from sumizome.data.rules import load_tag_rewriter
from sumizome.data.source_config import Columns, TagLists
from sumizome.data.tag_table import load_tag_table
from sumizome.data.tags import load_tag_categories
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


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("tag,weight,count,weight", load_tag_table),
    "categories": ("tag,category,category", load_tag_categories),
    "aliases": (
        "antecedent_name,consequent_name,antecedent_name",
        lambda path: load_tag_rewriter(TagLists(aliases=path)),
    ),
    "records": ("id,tags,score,tags", lambda path: list(read_rows(path, Columns(), _none_known))),
}


def _none_known(names: Sequence[str | None]) -> np.ndarray:
    return np.zeros(len(names), bool)


@pytest.mark.parametrize("kind", READERS)
def test_a_column_that_is_there_twice_is_named_and_none_is_chosen(tmp_path: Path, kind: str) -> None:
    header, read = READERS[kind]
    columns = header.split(",")
    path = tmp_path / "t.csv"
    path.write_text(f"\ufeff{header},,\n" + ",".join("1" for _ in columns) + ",,\n", "utf-8")
    with pytest.raises(DataError, match=rf"each column once in {path}, found '{columns[-1]}' twice"):
        read(path)
    columns.pop()
    path.write_text(f"{','.join(columns)},,\n" + ",".join("1" for _ in columns) + ",,\n", "utf-8")
    read(path)  # a spreadsheet's empty columns have no name to be mistaken for another


def test_a_parquet_dump_with_a_column_twice_is_refused_as_well(tmp_path: Path) -> None:
    twice = pa.table([pa.array([1]), pa.array(["a"]), pa.array(["b"])], names=["id", "tags", "tags"])
    pq.write_table(twice, tmp_path / "p.parquet")
    with pytest.raises(DataError, match="found 'tags' twice"):
        list(read_rows(tmp_path / "p.parquet", Columns(), _none_known))


@pytest.mark.parametrize("content", [b"", b"a,b\n", b"source,path,reason,sentence\na,b\n", b"\xff"])
def test_another_file_is_no_table_of_rejects(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"r\.csv"):
        list(read_rejects(tmp_path / "r.csv"))
