"""A manifest read in parts: what opens is what loads, whatever the parts, and faults are named as by loading."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sumizome.data import manifest, stored_manifest
from sumizome.data.manifest import ARCHIVE_SCHEMA, SCHEMA, Manifest, load_manifest, picture_sizes, write_manifest
from sumizome.data.rows_digest import ARCHIVE_COLUMNS, COLUMNS, RowsDigest
from sumizome.data.stored_manifest import open_manifest
from sumizome.errors import ManifestError

COUNT = 50


def rows(count: int = COUNT, **columns: list[object]) -> pa.Table:
    sound: dict[str, list[object]] = {
        "id": [f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" for number in range(count - 2)] + ["a-2", "zoë"],
        "source": [0] * count,
        "path": [f"{number}.png" for number in range(count)],
        "sha256": ["0" * 64] * count,
        "file_bytes": list(range(count)),
        "format": ["PNG"] * count,
        "height": [100 + number for number in range(count)],
        "width": [300 - number for number in range(count)],
        "tags": [["1girl", f"tag {number % 7}", "<ü>"][: number % 4] for number in range(count)],
        "kept_tags": [0] * count,
        "repeats": [1 + number % 3 for number in range(count)],
    }
    return pa.table(sound | columns, schema=SCHEMA)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stored_manifest, "_PART", 7)  # so that the rows do not come in one part
    return tmp_path / "m.parquet"


def written_unchecked(path: Path, table: pa.Table) -> None:
    """A sealed file with rows that `write_manifest` refuses."""
    digest = RowsDigest(1)
    digest.update(table)
    header = {"version": 1, "sources": ["/data"], "background": [255, 255, 255], "settings": {}}
    from sumizome.data.manifest import seal_of

    header["seal"] = seal_of(header, digest.hexdigest((255, 255, 255), {}))
    pq.write_table(table.replace_schema_metadata({"sumizome": json.dumps(header)}), path)


def test_it_opens_as_it_loads(path: Path) -> None:
    written = Manifest(rows(), (Path("/data"),), background=(1, 2, 3), categories={"<ü>": "artist"})
    write_manifest(written, path)
    opened, loaded = open_manifest(path, ["height", "width", "repeats", "file_bytes"]), load_manifest(path)
    assert opened.digest == loaded.digest == written.digest
    assert opened.sources == loaded.sources
    for name, column in opened.columns.items():
        assert column.tolist() == loaded.table[name].to_pylist()
    assert picture_sizes(opened).tolist() == [[100 + number, 300 - number] for number in range(COUNT)]


def test_its_rows_are_read_as_they_were_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(manifest._LAYOUT, "row_group_size", 8)
    written = Manifest(rows(), (Path("/data"),))
    write_manifest(written, path)
    opened = pickle.loads(pickle.dumps(open_manifest(path)))  # noqa: S301 — as it goes to a worker
    assert len(opened) == len(written) == COUNT
    order = np.random.default_rng(0).permutation(np.r_[np.arange(COUNT), 3, 3, 40])
    for wanted in (order, order[:1], order[:0], np.arange(8, 24)):
        for names in (None, ["tags", "id"], ["repeats"]):
            assert opened.take(wanted, names).equals(written.take(wanted, names))
    for name in ("height", "file_bytes", "kept_tags"):
        assert opened.column(name).tolist() == written.column(name).tolist()
    ids, lists = [], []
    for part in opened.parts(["id", "tags"]):
        ids += part["id"].to_pylist()
        lists += part["tags"].to_pylist()
    assert ids == rows()["id"].to_pylist() and lists == rows()["tags"].to_pylist()


def test_a_manifest_that_is_replaced_while_it_is_in_use_is_named(path: Path) -> None:
    write_manifest(Manifest(rows(), (Path("/data"),)), path)
    opened = open_manifest(path)
    write_manifest(Manifest(rows().slice(1), (Path("/data"),)), path)
    for read in (
        lambda: opened.take(np.array([0])),
        lambda: opened.column("height"),
        lambda: list(opened.parts(["id"])),
    ):
        with pytest.raises(ManifestError, match="replaced while it was in use: run the command again"):
            read()


def test_an_empty_manifest_opens(path: Path) -> None:
    write_manifest(Manifest(rows().slice(0, 0), ()), path)
    assert len(picture_sizes(open_manifest(path))) == 0


@pytest.mark.parametrize("first, second", [(3, 41), (0, 1), (48, 49)])
def test_an_id_that_comes_twice_is_named_by_its_row(path: Path, first: int, second: int) -> None:
    ids = rows()["id"].to_pylist()
    ids[second] = ids[first]
    written_unchecked(path, rows(id=ids))
    for read in (open_manifest, load_manifest):
        with pytest.raises(ManifestError, match=f"each id once.*'id', row {second}"):
            read(path)


@pytest.mark.parametrize(
    "name, value", [("path", "../x"), ("height", 0), ("repeats", 0), ("sha256", "0"), ("kept_tags", 9), ("source", 1)]
)
def test_a_wrong_value_is_named_by_its_row_in_the_whole(path: Path, name: str, value: object) -> None:
    values = rows()[name].to_pylist()
    values[33] = value
    written_unchecked(path, rows(**{name: values}))
    for read in (open_manifest, load_manifest):
        with pytest.raises(ManifestError, match=f"'{name}', row 33"):
            read(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_anywhere_is_found(path: Path, data: st.DataObject) -> None:
    """Or it changed nothing that is read: then the columns are those that were written."""
    write_manifest(Manifest(rows(), (Path("/data"),)), path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        opened = open_manifest(path)
    except ManifestError:
        return
    assert opened.digest == Manifest(rows(), (Path("/data"),)).digest
    assert opened.column("height").tolist() == rows()["height"].to_pylist()


def test_the_seal_covers_every_column(path: Path) -> None:
    assert tuple(SCHEMA.names) == COLUMNS
    assert tuple(ARCHIVE_SCHEMA.names) == ARCHIVE_COLUMNS
    write_manifest(Manifest(rows(), (Path("/data"),)), path)
    metadata = pq.read_schema(path).metadata
    changed = {
        "id": ["b", *rows()["id"].to_pylist()[1:]],
        "path": ["b", *rows()["path"].to_pylist()[1:]],
        "file_bytes": [9] * COUNT,
        "format": ["WEBP"] * COUNT,
        "width": [5] * COUNT,
        "tags": [["other"]] * COUNT,
        "repeats": [2] * COUNT,
    }
    for name, values in changed.items():
        pq.write_table(rows(**{name: values}).replace_schema_metadata(metadata), path)
        with pytest.raises(ManifestError, match="seal"):
            open_manifest(path)


def test_dictionary_or_not_the_digest_is_the_same() -> None:
    tags = rows()["tags"].combine_chunks()
    encoded = pa.ListArray.from_arrays(tags.offsets, tags.values.dictionary_encode())
    table = rows()
    place = table.schema.get_field_index("tags")
    digests = set()
    for each in (
        table,
        table.set_column(place, "tags", encoded),
        pa.concat_tables([table.slice(0, 9), table.slice(9)]),
    ):
        digest = RowsDigest(1)
        digest.update(each)
        digests.add(digest.hexdigest((0, 0, 0), {}))
    assert len(digests) == 1


def test_numbers_of_ids_are_exact() -> None:
    ids = pa.chunked_array([["x", "0123456789abcdef", "ffffffffffffffff", "0000000000000000"]]).slice(1)
    assert stored_manifest._numbers(ids).tolist() == [0x0123456789ABCDEF, 2**64 - 1, 0]
    assert stored_manifest._numbers(ids).dtype == np.uint64
