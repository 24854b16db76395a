"""The manifest: what is written is read back, the digest follows the content alone, and damage is named before use."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sumizome.data.manifest import SCHEMA, Manifest, load_manifest, write_atomically, write_manifest
from sumizome.data.stored_manifest import open_manifest
from sumizome.errors import DataError, ManifestError


def rows(**columns: list[Any]) -> pa.Table:
    """Three sound rows, with columns replaced."""
    sound: dict[str, list[Any]] = {
        "id": ["a", "b", "b-2"],
        "source": [0, 0, 1],
        "path": ["x/1.png", "2.jpg", "2.jpg"],
        "sha256": ["0" * 64, "1" * 64, "1" * 64],
        "file_bytes": [10, 20, 20],
        "format": ["PNG", "JPEG", "JPEG"],
        "height": [64, 100, 100],
        "width": [64, 50, 50],
        "tags": [["1girl", "blue hair", "^_^"], [], ["<3"]],
        "kept_tags": [1, 0, 0],
        "repeats": [1, 10, 1],
    }
    return pa.table(sound | columns, schema=SCHEMA)


def manifest(table: pa.Table | None = None, **fields: Any) -> Manifest:
    return Manifest(rows() if table is None else table, (Path("/data/a"), Path("/data/ü")), **fields)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "m.parquet"
    written = manifest(background=(1, 2, 3), settings={"pictures_found": 4})
    write_manifest(written, path)
    read = load_manifest(path)
    assert read.table.equals(written.table)
    assert read.table.schema.equals(SCHEMA)
    assert (read.sources, read.background, read.settings) == (written.sources, (1, 2, 3), {"pictures_found": 4})
    assert len(read) == 3
    assert read.picture(2) == Path("/data/ü/2.jpg")
    assert [file.name for file in path.parent.iterdir()] == ["m.parquet"]


def test_the_digest_follows_the_rows_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    original = manifest()
    write_manifest(original, path)
    chunked = pa.concat_tables([rows().slice(0, 1), rows().slice(1, 0), rows().slice(1, 2)])
    same = [load_manifest(path), manifest(chunked), Manifest(rows(), (Path("/moved"), Path("/b")))]
    assert {other.digest for other in same} == {original.digest}
    other_tags = [["1girl", "blue hair", "^_^"], ["<3"], []]  # the same words, borne by another picture
    different = [
        manifest(rows(width=[64, 50, 51])),
        manifest(rows(tags=other_tags)),
        manifest(rows(path=["x/1.pn", "g2.jpg", "2.jpg"])),
        manifest(background=(0, 0, 0)),
        manifest(rows().slice(0, 2)),
    ]
    assert len({other.digest for other in [original, *different]}) == 6


def test_manifests_without_tars_keep_the_digest_that_caches_were_made_with() -> None:
    assert manifest().digest == "1b1b521b3e64d7ca727c613127a6f5870dd2a24d76b1d33d69bfe1eb0bec77cf"


def test_categories_are_stored_sealed_and_part_of_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    plain = manifest()
    told = replace(plain, categories={"hatsune miku": "character", "<b>": "artist", "赤": "artist"})
    write_manifest(told, path)
    read = load_manifest(path)
    assert (read.categories, read.digest) == (told.categories, told.digest)
    other = replace(plain, categories={"hatsune miku": "artist", "<b>": "artist", "赤": "artist"})
    assert len({plain.digest, told.digest, other.digest}) == 3
    header = json.loads(pq.read_schema(path).metadata[b"sumizome"])
    for categories, complaint in [({"artist": ["<b>"]}, "seal"), ({"artist": "x"}, "header"), ([], "header")]:
        write_raw(path, rows(), header | {"categories": categories})
        with pytest.raises(ManifestError, match=complaint):
            load_manifest(path)


def test_an_empty_manifest_has_a_digest_and_reads_back(tmp_path: Path) -> None:
    write_manifest(manifest(rows().slice(0, 0)), tmp_path / "m.parquet")
    assert len(load_manifest(tmp_path / "m.parquet")) == 0
    assert load_manifest(tmp_path / "m.parquet").digest == manifest(rows().slice(3)).digest


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"id": ["a", "b", "a"]}, "'id', row 2"),
        ({"source": [0, 2, 0]}, "'source', row 1"),
        ({"source": [-1, 0, 0]}, "'source', row 0"),
        ({"path": ["../x.png", "2.jpg", "3.jpg"]}, "'path', row 0"),
        ({"path": ["a", "b/../../c", "3.jpg"]}, "'path', row 1"),
        ({"path": ["a", "b", "/etc/passwd"]}, "'path', row 2"),
        ({"path": ["a", "b\\..\\c", "d"]}, "'path', row 1"),
        ({"path": ["a", "", "d"]}, "'path', row 1"),
        ({"path": ["a", "b\0", "d"]}, "'path', row 1"),
        ({"path": ["a", "b", ".."]}, "'path', row 2"),
        ({"sha256": ["0" * 64, "1" * 63, "1" * 64]}, "'sha256', row 1"),
        ({"height": [0, 1, 1]}, "'height', row 0"),
        ({"width": [1, 40_000, 1]}, "'width', row 1"),
        ({"kept_tags": [4, 0, 0]}, "'kept_tags', row 0"),
        ({"repeats": [1, 1, 0]}, "'repeats', row 2"),
    ],
)
def test_rows_that_cannot_be_are_refused_by_place(tmp_path: Path, columns: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ManifestError, match=complaint):
        write_manifest(manifest(rows(**columns)), tmp_path / "m.parquet")
    header = json.dumps({"version": 1, "sources": ["/a", "/b"], "background": [0, 0, 0], "settings": {}})
    pq.write_table(rows(**columns).replace_schema_metadata({"sumizome": header}), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=complaint):
        load_manifest(tmp_path / "m.parquet")


@pytest.mark.parametrize(
    "columns", [{"format": ["PNG", None, "PNG"]}, {"tags": [["a"], None, []]}, {"tags": [["a"], ["b", None], []]}]
)
def test_a_missing_value_is_refused(tmp_path: Path, columns: dict[str, Any]) -> None:
    name = next(iter(columns))
    with pytest.raises(ManifestError, match=f"'{name}', row 1"):
        write_manifest(manifest(rows(**columns)), tmp_path / "m.parquet")
    loose = pa.schema([pa.field(column.name, column.type) for column in SCHEMA if column.name != "tags"])
    loose = loose.append(pa.field("tags", pa.list_(pa.string())))
    table = pa.table({column: rows(**columns)[column].to_pylist() for column in loose.names}, schema=loose)
    header = {"version": 1, "sources": ["/a", "/b"], "background": [0, 0, 0], "settings": {}}
    write_raw(tmp_path / "m.parquet", table, header)
    with pytest.raises(ManifestError, match="expected"):
        load_manifest(tmp_path / "m.parquet")


def write_raw(path: Path, table: pa.Table, header: Any) -> None:
    pq.write_table(table.replace_schema_metadata({"sumizome": json.dumps(header)}), path)


def test_another_version_or_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    sound = {"version": 1, "sources": ["/a", "/b"], "background": [0, 0, 0], "settings": {}}
    write_raw(path, rows(), sound)
    with pytest.raises(ManifestError, match="seal"):
        load_manifest(path)
    for header, complaint in [
        (sound | {"version": 2}, "a column 'archive', found none"),
        (sound | {"version": 3}, "a column 'archive', found none"),
        (sound | {"version": 4}, "version 1 to 3, found version 4"),
        (sound | {"version": 0}, "found version 0"),
        (sound | {"version": True}, "found version True"),
        ({}, "header"),
        ([], "header"),
        (sound | {"sources": ["relative"] * 2}, "header"),
        (sound | {"sources": "/a"}, "header"),
        (sound | {"background": [0, 0, 256]}, "header"),
        (sound | {"settings": None}, "header"),
    ]:
        write_raw(path, rows(), header)
        with pytest.raises(ManifestError, match=complaint):
            load_manifest(path)

    pq.write_table(rows(), path)
    with pytest.raises(ManifestError, match="another parquet file"):
        load_manifest(path)
    write_raw(path, rows().drop_columns(["width"]), sound)
    with pytest.raises(ManifestError, match="column 'width', found none"):
        load_manifest(path)
    write_raw(path, rows().set_column(6, "height", pa.array(["a", "b", "c"])), sound)
    with pytest.raises(ManifestError, match="'height' as int32, found string"):
        load_manifest(path)
    with pytest.raises(ManifestError, match="found no file"):
        load_manifest(tmp_path)
    with pytest.raises(ManifestError, match="found no file"):
        load_manifest(tmp_path / "none.parquet")


def test_every_truncation_and_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(manifest(), path)
    good, digest = path.read_bytes(), manifest().digest
    for end in range(0, len(good), 97):
        path.write_bytes(good[:end])
        with pytest.raises(ManifestError):
            load_manifest(path)
    seen = 0
    for at in range(0, len(good), 13):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        try:
            # A bit of the statistics in the footer may change nothing that is read; what is read is never another.
            read = load_manifest(path)
            assert (read.digest, read.sources) == (digest, manifest().sources)
        except ManifestError:
            seen += 1
    assert seen > len(good) / 13 / 2
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(ManifestError, match="damaged"):
        load_manifest(path)


HARMS: dict[str, Callable[[Path], object]] = {
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "zero": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "delete": Path.unlink,
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("read", [load_manifest, lambda path: open_manifest(path, ["height"])])
def test_a_harmed_manifest_is_named_at_every_opening(tmp_path: Path, read: Callable[[Path], object], harm: str) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(manifest(), path)
    read(path)
    HARMS[harm](path)
    for _ in range(2):
        with pytest.raises(ManifestError, match=r"m\.parquet"):
            read(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(manifest(), path)
    before = path.read_bytes()

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.parquet"]
    with pytest.raises(DataError, match="cannot write"):
        write_atomically(path / "below" / "a.file", lambda temporary: temporary.write_bytes(b""))
