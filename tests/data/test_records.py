"""Records: rows as booru dumps, e621, gelbooru and gallery-dl write them, and tables that are damaged or hostile."""

import datetime
import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.records import build_record, read_rows, row_keys
from sumizome.data.source_config import Columns
from sumizome.errors import ConfigError, DataError

DANBOORU = {
    "id": 12,
    "md5": "D41D8CD98F00B204E9800998ECF8427E",
    "file_ext": "png",
    "tag_string": "1girl hatsune_miku vocaloid ^_^ artist_a highres",
    "tag_string_general": "1girl ^_^",
    "tag_string_character": "hatsune_miku",
    "tag_string_copyright": "vocaloid",
    "tag_string_artist": "artist_a",
    "tag_string_meta": "highres",
    "rating": "S",
    "score": 41,
    "created_at": "2021-05-03T01:02:03.000-04:00",
}


def test_a_danbooru_row_keeps_its_categories() -> None:
    record = build_record(DANBOORU, Columns(), "posts.jsonl:1")
    assert record.text == "hatsune miku, vocaloid, artist a, 1girl, ^_^, highres"
    assert dict(record.categories) == {
        "hatsune miku": "character",
        "vocaloid": "copyright",
        "artist a": "artist",
        "1girl": "general",
        "^_^": "general",
        "highres": "meta",
    }
    facts = (record.md5, record.rating, record.score, record.year)
    assert facts == ("d41d8cd98f00b204e9800998ecf8427e", "s", 41.0, 2021)
    assert row_keys(DANBOORU, Columns())[1] >= {"12", "d41d8cd98f00b204e9800998ecf8427e"}


@pytest.mark.parametrize(
    ("row", "text", "facts"),
    [
        (  # e621: everything nested
            {"tags": {"artist": ["any_body"], "general": ["solo"]}, "score": {"up": 9, "total": 7}, "rating": "e"},
            "any body, solo",
            ("e", 7.0, None),
        ),
        (  # gelbooru: one string, the year last
            {"tags": "1girl  blue_hair", "rating": "general", "created_at": "Sat May 01 12:00:00 -0500 2021"},
            "1girl, blue hair",
            ("general", None, 2021),
        ),
        ({"tags": "1girl, blue hair", "date": "2019-12-31 23:59:59"}, "1girl, blue hair", (None, None, 2019)),
        ({"caption": "A girl, seen from above.", "tags": ["x_yz"]}, "A girl, seen from above., x yz", (None,) * 3),
        ({"created_at": 1_600_000_000, "score": "12"}, "", (None, 12.0, 2020)),
        ({"created_at": 1_600_000_000_000, "score": True}, "", (None, None, 2020)),
        ({"created_at": datetime.datetime(2018, 1, 1), "score": float("nan")}, "", (None, None, 2018)),
        ({"created_at": "20220304", "score": "many", "rating": 3}, "", (None, None, 2022)),
        ({"created_at": "yesterday", "score": 10**400, "rating": " "}, "", (None, None, None)),
        ({"created_at": [2021], "tag_string_general": None, "tags": None}, "", (None, None, None)),
    ],
)
def test_rows_of_other_sites_are_understood(row: dict[str, Any], text: str, facts: tuple[Any, ...]) -> None:
    record = build_record(row, Columns(), "x")
    assert (record.text, (record.rating, record.score, record.year)) == (text, facts)


def test_a_mapping_names_any_column() -> None:
    columns = Columns(
        tags=("words",), categories={"style": ("a.b.c",)}, separator=";", rating=("safety",), score=("likes", "stars")
    )
    row = {"a": {"b": {"c": "oil;ink wash"}}, "words": "not read", "safety": "Safe", "stars": 2, "rating": "e"}
    record = build_record(row, columns, "x")
    assert (record.text, record.categories) == ("oil, ink wash", (("oil", "style"), ("ink wash", "style")))
    assert (record.rating, record.score) == ("safe", 2.0)


@pytest.mark.parametrize(
    "row",
    [
        {"md5": "abc"},
        {"md5": 3},
        {"tags": 3},
        {"tags": ["a", 3]},
        {"caption": ["a"]},
        {"tags_artist": [None]},
        {"caption": "\ud83d"},
    ],
)
def test_a_row_of_other_types_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ImageRejected) as caught:
        build_record(row, Columns(), "x")
    assert caught.value.reason == "record_invalid"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({"id", "md5", "tags", "score", "rating", "created_at", "caption", "tag_string_general", "file_name"})


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # the first draw builds tables of letters
@given(st.dictionaries(st.sampled_from(NAMES), JSON))
def test_no_row_is_more_than_refused(row: dict[str, Any]) -> None:
    try:
        row_keys(row, Columns())
        record = build_record(row, Columns(), "x")
    except ImageRejected:
        return
    assert record.year is None or 1900 <= record.year < 2100


def rows(path: Path, stems: set[str], columns: Columns | None = None) -> list[tuple[str, Any]]:
    def known(names: Sequence[str | None]) -> np.ndarray:
        return np.array([name in stems for name in names], bool)

    return [(where, row) for where, row in read_rows(path, columns or Columns(), known) if not isinstance(row, int)]


def test_the_three_kinds_of_table_say_the_same(tmp_path: Path) -> None:
    content = [{"id": number, "md5": f"{number:032x}", "tag_string_general": f"tag_{number}"} for number in range(5)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, content)))
    (tmp_path / "a.csv").write_text(
        "id,md5,tag_string_general\n" + "".join(f"{n},{n:032x},tag_{n}\n" for n in range(5))
    )
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "a.parquet", row_group_size=2)
    texts = {
        suffix: [build_record(row, Columns(), where).text for where, row in rows(tmp_path / f"a.{suffix}", {"3", "0"})]
        for suffix in ("jsonl", "csv", "parquet")
    }
    assert texts["jsonl"] == texts["csv"] == [f"tag {number}" for number in range(5)]
    assert texts["parquet"] == ["tag 0", "tag 3"]  # what names no file is never made a Python object
    wheres = [where for where, _ in rows(tmp_path / "a.parquet", {f"{3:032x}", "4"})]
    assert wheres == ["a.parquet:4", "a.parquet:5"]
    assert rows(tmp_path / "a.jsonl", set())[1][0] == "a.jsonl:3"


def test_nested_parquet_is_read(tmp_path: Path) -> None:
    content = [{"file": {"md5": "0" * 32}, "tags": {"artist": ["x"]}, "score": {"total": 3}, "created_at": None}]
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "a.parquet")
    ((_, row),) = rows(tmp_path / "a.parquet", {"0" * 32})
    record = build_record(row, Columns(), "x")
    assert (record.text, record.score, record.md5) == ("x", 3.0, "0" * 32)


@pytest.mark.parametrize(
    ("dates", "year"),
    [
        (pa.array([1_234_567_890_123_456_789], pa.timestamp("ns")), 2009),
        (pa.array([1_230_768_000_000_000_001], pa.timestamp("ns", tz="America/New_York")), 2008),
        (pa.array([10**18], pa.timestamp("us")), None),
        (pa.array([14_000], pa.date32()), 2008),
    ],
)
def test_dates_that_python_has_not_are_read(tmp_path: Path, dates: pa.Array, year: int | None) -> None:
    pq.write_table(pa.table({"id": [1], "created_at": dates}), tmp_path / "a.parquet")
    ((_, row),) = rows(tmp_path / "a.parquet", {"1"})
    assert build_record(row, Columns(), "x").year == year


def test_a_score_of_a_database_is_a_number(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "score": [Decimal("41.5")], "width": [Decimal(7)]}), tmp_path / "a.parquet")
    ((_, row),) = rows(tmp_path / "a.parquet", {"1"})
    record = build_record(row, Columns(), "x")
    assert (record.score, record.width) == (41.5, 7)


def test_a_bad_line_is_named_and_the_rest_go_on(tmp_path: Path) -> None:
    lines = ['{"id": 1}', "{broken", "[1]", "[" * 100_000, '{"id": 2}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = [(where, getattr(row, "reason", row)) for where, row in rows(tmp_path / "a.jsonl", set())]
    expected = [{"id": 1}, *["record_invalid"] * 3, {"id": 2}]
    assert found == [(f"a.jsonl:{number}", each) for number, each in enumerate(expected, start=1)]


def test_tables_that_cannot_be_read_are_one_clear_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": list(range(1000))}), tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:500])
    pq.write_table(pa.table({"number": [1], "tags": ["a"]}), tmp_path / "nameless.parquet")
    (tmp_path / "latin.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
    (tmp_path / "a.json").write_text("{}")
    cases = [
        ("cut.parquet", DataError, "readable table"),
        ("nameless.parquet", DataError, "names files"),
        ("latin.jsonl", DataError, "readable table"),
        ("a.json", ConfigError, "jsonl, .parquet or .csv"),
        ("none.jsonl", ConfigError, "found none"),
    ]
    for name, error, message in cases:
        with pytest.raises(error, match=message):
            rows(tmp_path / name, {"1"})
