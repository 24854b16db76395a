"""Fuzzed input: a manifest, captions, tag lists, dumps and source files are read, or refused in our own words."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_manifest import manifest, rows

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.manifest import ARCHIVE_SCHEMA, SCHEMA, Manifest, load_manifest, write_manifest
from sumizome.data.records import build_record, parse_object, read_rows, row_keys
from sumizome.data.rules import load_tag_rewriter
from sumizome.data.source_config import Columns, TagLists
from sumizome.data.source_file import load_sources
from sumizome.data.tags import MAX_TAG_LENGTH, MAX_TAGS, load_tag_categories, parse_tags
from sumizome.errors import ConfigError, DataError, ManifestError

CASES = int(os.environ.get("SUMIZOME_FUZZ_CASES", "150"))
few = settings(deadline=None, max_examples=CASES, suppress_health_check=list(HealthCheck))

# --- the manifest -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def with_archives() -> Manifest:
    table = rows()
    for name, values in (("archive", ["x", None, None]), ("offset", [512, None, None])):
        table = table.append_column(ARCHIVE_SCHEMA.field(name), pa.array(values, ARCHIVE_SCHEMA.field(name).type))
    return manifest(table, categories={"<3": "meta"})


def check_mangled(place: Path, sound: Manifest, flips: list[tuple[int, int]], cut: int | None, gap: int) -> None:
    """A changed file is a ManifestError, or says what the sound one says."""
    path = place / "m.parquet"
    write_manifest(sound, path)
    data = bytearray(path.read_bytes())
    for at, flip in flips:
        data[at % len(data)] ^= flip
    if cut is not None:
        at = cut % len(data)
        data = data[:at] + data[at + gap :] if gap else data[:at]
    path.write_bytes(data)
    try:
        read = load_manifest(path)
    except ManifestError as error:
        assert "\n" not in str(error)
        return
    assert (read.digest, read.sources, read.background) == (sound.digest, sound.sources, sound.background)
    assert read.table.equals(sound.table.cast(sound.schema))
    assert read.categories == sound.categories


FLIPS = st.lists(st.tuples(st.integers(0, 10**5), st.integers(1, 255)), max_size=4)
CUTS = st.none() | st.integers(0, 10**5)


@few
@given(st.booleans(), FLIPS, CUTS, st.integers(0, 40))
def test_a_mangled_manifest_is_refused_or_the_same(
    place: Path, archives: bool, flips: list[tuple[int, int]], cut: int | None, gap: int
) -> None:
    check_mangled(place, with_archives() if archives else manifest(), flips, cut, gap)


@pytest.mark.slow
@settings(deadline=None, max_examples=6000, suppress_health_check=list(HealthCheck))
@given(st.booleans(), FLIPS, CUTS, st.integers(0, 40))
def test_a_mangled_manifest_thousands_of_times(
    place: Path, archives: bool, flips: list[tuple[int, int]], cut: int | None, gap: int
) -> None:
    check_mangled(place, with_archives() if archives else manifest(), flips, cut, gap)


@few
@given(st.binary(max_size=300), st.sampled_from([b"", b"PAR1"]))
def test_bytes_are_no_manifest(place: Path, data: bytes, magic: bytes) -> None:
    (place / "b.parquet").write_bytes(magic + data + magic)
    with pytest.raises(ManifestError):
        load_manifest(place / "b.parquet")


@few
@given(st.sampled_from(SCHEMA.names), st.sampled_from([pa.int8(), pa.string(), pa.binary(), pa.float64(), pa.null()]))
def test_columns_of_other_types_are_refused(place: Path, name: str, kind: pa.DataType) -> None:
    write_manifest(manifest(), place / "c.parquet")
    table = pq.read_table(place / "c.parquet")
    at = SCHEMA.names.index(name)
    pq.write_table(table.set_column(at, name, pa.nulls(len(table), kind)), place / "c.parquet")
    with pytest.raises(ManifestError):
        load_manifest(place / "c.parquet")


# --- captions and lists -----------------------------------------------------------------------------------------------

TAGS = st.text() | st.text(alphabet="ab_^,|\n\t >(\x00\u202e墨\ud800", max_size=60)


@few
@given(TAGS)
@example("|||")
@example(",|||,")
@example("_" * 300)
def test_a_caption_is_tags_or_refused(text: str) -> None:
    try:
        parsed = parse_tags(text)
    except DataError:
        return
    assert len(set(parsed.tags)) == len(parsed.tags) <= MAX_TAGS
    assert 0 <= parsed.kept <= len(parsed.tags)
    assert all(tag and tag == tag.strip() and "," not in tag and len(tag) <= MAX_TAG_LENGTH for tag in parsed.tags)
    marker = " ||| " * bool(parsed.kept)
    again = parse_tags(", ".join(parsed.tags[: parsed.kept]) + marker + ", ".join(parsed.tags[parsed.kept :]))
    assert again == parsed


LINES = st.lists(st.binary(max_size=40) | TAGS.map(lambda text: text.encode("utf-8", "surrogatepass")), max_size=6)


@few
@given(st.sampled_from([b"tag,category", b"antecedent_name,consequent_name,status", b"id,md5,tags", b"x"]), LINES)
@example(b"id,md5,tags", [b'"' + b"x" * 200_000])
@example(b"tag,category", [b'"open', b"\xff", b"\x00"])
def test_a_csv_is_read_or_refused(place: Path, header: bytes, lines: list[bytes]) -> None:
    path = place / "x.csv"
    path.write_bytes(b"\n".join([header, *lines]))
    for read in (
        lambda: load_tag_categories(path),
        lambda: load_tag_rewriter(TagLists(aliases=path)),
        lambda: load_tag_rewriter(TagLists(implications=path)),
    ):
        try:
            read()
        except DataError as error:
            assert "\n" not in str(error)
    read_all(path)


@few
@given(st.sampled_from(["jsonl", "parquet"]), LINES)
@example("jsonl", [b'{"id":' + b"9" * 5000 + b"}", b'{"id": 1e999, "score": NaN}', b"[" * 5000])
def test_a_dump_is_read_or_refused(place: Path, kind: str, lines: list[bytes]) -> None:
    path = place / f"x.{kind}"
    path.write_bytes(b"\n".join([b'{"id": 1, "tags": "a"}', *lines]))
    read_all(path)


def read_all(path: Path) -> None:
    try:
        for where, row in read_rows(path, Columns(), lambda names: np.ones(len(names), bool)):
            if isinstance(row, dict):
                row_keys(row, Columns())
                build_record(row, Columns(), where)
    except (DataError, ImageRejected) as error:
        assert "\n" not in str(error)


@few
@given(TAGS)
def test_an_object_is_json_or_refused(text: str) -> None:
    assert isinstance(parse_object(text), dict | ImageRejected)


KEYS = st.sampled_from(["folder", "kind", "records", "repeats", "rules", "columns", "damaged_tars", "x"])
VALUES = st.sampled_from(
    ["'a'", "'folder'", "3", "-1", "true", "1.5", "[]", "['a']", "{}", "{min_side=1}", "{tags='x'}"]
)


@few
@given(st.lists(st.tuples(KEYS, VALUES), max_size=5, unique_by=lambda pair: pair[0]), TAGS)
def test_a_file_of_sources_is_read_or_refused(place: Path, pairs: list[tuple[str, str]], text: str) -> None:
    path = place / "s.toml"
    for content in ("[[source]]\n" + "\n".join(f"{key} = {value}" for key, value in pairs), text):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            assert load_sources(path)
        except ConfigError as error:
            assert str(path) in str(error)
