"""The manifest: one accepted image, one typed row, in one parquet file.

Owns the schema, the file's version and the checks on what was read; `ingest` fills it, everything later reads it.
Invariant: a manifest that loads is sound (types, ids, sizes, paths that stay below their source), so nothing after it
checks again. The columns stay Arrow: six million rows are a few buffers, not six million objects.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from sumizome.data.byte_range import ByteRange
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.images import MAX_SIDE, WHITE, Colour
from sumizome.data.rows_digest import RowsDigest
from sumizome.errors import ManifestError
from sumizome.files import write_atomically

__all__ = [
    "ARCHIVE_SCHEMA",
    "ARCHIVE_VERSION",
    "MANIFEST_VERSION",
    "MAX_RATING_LENGTH",
    "RECORD_SCHEMA",
    "RECORD_VERSION",
    "SCHEMA",
    "Manifest",
    "ManifestRows",
    "check_ids",
    "check_values",
    "is_other_parquet",
    "load_manifest",
    "picture_place",
    "picture_sizes",
    "read_header",
    "refusing_damage",
    "seal_of",
    "tags_by_category",
    "write_manifest",
]

MANIFEST_VERSION = 1
ARCHIVE_VERSION = 2
"""of a manifest with pictures in tars: has the columns of `ARCHIVE_SCHEMA`, too. Without any, a manifest is of
version 1, byte for byte as before"""
RECORD_VERSION = 3
"""of one of which records told a rating or a score: has those of `ARCHIVE_SCHEMA` and of `RECORD_SCHEMA`, too"""

SCHEMA = pa.schema(
    [
        # The first 16 hex digits of sha256; byte-identical files get "-2", "-3", … in the order of (source, path).
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.int16(), nullable=False),  # index into Manifest.sources
        pa.field("path", pa.string(), nullable=False),  # posix, relative to its source
        pa.field("sha256", pa.string(), nullable=False),  # hex, of the file's bytes
        pa.field("file_bytes", pa.int64(), nullable=False),
        pa.field("format", pa.string(), nullable=False),  # by content: PNG, JPEG, WEBP
        pa.field("height", pa.int32(), nullable=False),  # px, after EXIF orientation
        pa.field("width", pa.int32(), nullable=False),
        pa.field("tags", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field("kept_tags", pa.int16(), nullable=False),  # how many leading tags stood before "|||"
        pa.field("repeats", pa.int32(), nullable=False),  # times an epoch shows it
    ]
)

ARCHIVE_SCHEMA = pa.schema(
    [
        # Both null for a file of its own. `path` of a member is `archive/name`, or `name` where the source is the tar.
        pa.field("archive", pa.string()),  # posix, relative to the source; "" = the source is the tar
        pa.field("offset", pa.int64()),  # of the picture's bytes in it; they are `file_bytes` long
    ]
)

RECORD_SCHEMA = pa.schema(
    [
        # As the picture's record has them; null where it says nothing. Training needs neither.
        pa.field("rating", pa.string()),  # in lower case
        pa.field("score", pa.float64()),
    ]
)

MAX_RATING_LENGTH = 64

_METADATA_KEY = b"sumizome"

_LAYOUT: Mapping[str, Any] = {
    "compression": "zstd",
    "row_group_size": 131_072,  # read and checked one at a time
    # A vocabulary of half a million tags is one dictionary; beyond the usual 1 MB each tag would be spelt out.
    "dictionary_pagesize_limit": 16 * 2**20,
    "use_dictionary": ["tags.list.element", "format", "source", "kept_tags", "repeats", "height", "width"],
}


def schema_of(version: int) -> pa.Schema:
    """The columns of a manifest of this version."""
    more = [[], ARCHIVE_SCHEMA, [*ARCHIVE_SCHEMA, *RECORD_SCHEMA]][version - 1]
    return pa.schema([*SCHEMA, *more])


@dataclass(frozen=True, eq=False)
class Manifest:
    """The rows, and where their files lie."""

    table: pa.Table
    """columns of `SCHEMA`, then those of `ARCHIVE_SCHEMA` if pictures lie in tars, then those of `RECORD_SCHEMA` if
    records told them; sorted by (source, path)"""
    sources: tuple[Path, ...]
    """the absolute folders that `source` points into"""
    background: Colour = WHITE
    """what transparent pictures were, and are to be, composited on"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """what else ingest was told, for the record"""
    categories: Mapping[str, str] = field(default_factory=dict)
    """tag → category of those that are not general"""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the rows, the background and the tags' categories.

        The same rows give the same digest however they are chunked, written or read. The sources' absolute paths are
        left out, so that moving a folder does not invalidate what was made from it.
        """
        return self.digests[0]

    @cached_property
    def digests(self) -> tuple[str, str]:
        """(`digest`, the digest of what records say and training does not need)."""
        rows = RowsDigest(self.version)
        rows.update(self.table)
        return rows.hexdigest(self.background, self.categories), rows.records_hexdigest()

    @property
    def version(self) -> int:
        if RECORD_SCHEMA.names[0] in self.table.schema.names:
            return RECORD_VERSION
        return ARCHIVE_VERSION if ARCHIVE_SCHEMA.names[0] in self.table.schema.names else MANIFEST_VERSION

    @property
    def schema(self) -> pa.Schema:
        """The columns of a manifest of this version."""
        return schema_of(self.version)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers."""
        return np.asarray(self.table[name].to_numpy())

    def parts(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """These columns of all rows; of a manifest in a file (`stored_manifest`), some rows at a time."""
        yield self.table.select(list(names))

    def take(self, rows: Int[np.ndarray, " n"], names: Sequence[str] | None = None) -> pa.Table:
        """These rows in this order, whole or some columns of them."""
        return self.table.select(self.schema.names if names is None else list(names)).take(pa.array(rows))

    def picture(self, row: int) -> Path | ByteRange:
        """Where a row's bytes are: see `picture_place`."""
        return picture_place(self.table, row, self.sources)


@runtime_checkable
class ManifestRows(Protocol):
    """A sound manifest, in memory (`Manifest`) or in its file (`stored_manifest.StoredManifest`)."""

    @property
    def sources(self) -> tuple[Path, ...]: ...

    @property
    def background(self) -> Colour: ...

    @property
    def categories(self) -> Mapping[str, str]: ...

    @property
    def digest(self) -> str: ...

    @property
    def version(self) -> int: ...

    def __len__(self) -> int: ...

    def column(self, name: str) -> np.ndarray: ...

    def parts(self, names: Sequence[str]) -> Iterator[pa.Table]: ...

    def take(self, rows: Int[np.ndarray, " n"], names: Sequence[str] | None = None) -> pa.Table: ...


def picture_sizes(manifest: ManifestRows) -> Int[np.ndarray, "n 2"]:
    """(height, width) of each picture, px, int64."""
    return np.stack([manifest.column(side).astype(np.int64) for side in ("height", "width")], axis=1)


def picture_place(rows: pa.Table, row: int, sources: Sequence[Path]) -> Path | ByteRange:
    """Where the bytes of a row are, for `open_image`: a file, or a stretch of a tar.

    Raises: ImageRejected("link_outside") if a link leads to something that is not its source's.
    """
    source: Path = sources[rows["source"][row].as_py()]
    path, archive = str(rows["path"][row]), None
    if "archive" in rows.schema.names:
        archive = rows["archive"][row].as_py()
    file: Path = source / (path if archive is None else archive)
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(source)):
        raise ImageRejected("link_outside", f"expected a file of {source}, found a link out of it: {path}.")
    if archive is None:
        return file
    offset, size = (int(rows[name][row].as_py()) for name in ("offset", "file_bytes"))
    return ByteRange(file, offset, size, path.removeprefix(f"{archive}/"))


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Writes the manifest whole or not at all: a reader sees the old file or the new one.

    Raises: ManifestError: rows that `load_manifest` would refuse. DataError: a disk that does.
    """
    _check_rows(manifest.table, len(manifest.sources), str(path))
    header = {
        "version": manifest.version,
        "sources": [str(source) for source in manifest.sources],
        "background": list(manifest.background),
        "settings": dict(manifest.settings),
    }
    if manifest.categories:
        header["categories"] = tags_by_category(manifest.categories)
    sealed = json.dumps(header | {"seal": _seal(header, manifest)}, sort_keys=True)
    table = (
        manifest.table.select(manifest.schema.names)
        .cast(manifest.schema)
        .replace_schema_metadata({_METADATA_KEY: sealed})
    )
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, **_LAYOUT))


def tags_by_category(categories: Mapping[str, str]) -> dict[str, list[str]]:
    """category → its tags, sorted: as files hold what `Manifest.categories` says; each name is written once."""
    found: dict[str, list[str]] = {}
    for tag, category in sorted(categories.items()):
        found.setdefault(category, []).append(tag)
    return found


def _seal(header: Mapping[str, Any], manifest: Manifest) -> str:
    """SHA-256 over header and rows: parquet notices many a flipped bit, and reads some as another tag or colour."""
    return seal_of(header, "".join(manifest.digests))


def seal_of(header: Mapping[str, Any], digest: str) -> str:
    told = {key: value for key, value in header.items() if key != "seal"}
    return hashlib.sha256((json.dumps(told, sort_keys=True) + digest).encode()).hexdigest()


def load_manifest(path: Path) -> Manifest:
    """The manifest in a file that `sumizome ingest` wrote.

    Raises: ManifestError: missing, damaged, of another version, or with rows that cannot be.
    """
    if not path.is_file():
        raise ManifestError(f"expected a manifest at {path}, found no file: run `sumizome ingest` first.")
    with refusing_damage(path):
        with pq.ParquetFile(path) as file:
            table = file.read()
        table.validate(full=True)
    header = read_header(table.schema, path)
    schema = schema_of(header["version"])
    table = table.select(schema.names)
    _check_rows(table, len(header["sources"]), str(path))
    red, green, blue = header["background"]
    manifest = Manifest(
        table=table.replace_schema_metadata(None).cast(schema),
        sources=tuple(Path(source) for source in header["sources"]),
        background=(red, green, blue),
        settings=header["settings"],
        categories={tag: category for category, tags in header.get("categories", {}).items() for tag in tags},
    )
    if header.get("seal") != _seal(header, manifest):
        raise ManifestError(f"expected {path} as it was written, found its seal broken: run `sumizome ingest` again.")
    return manifest


@contextlib.contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """What Arrow says of a file that is no parquet, as a ManifestError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ManifestError(
            f"expected a manifest in parquet, found {path} damaged or of another kind "
            f"({_first_line(error)}): run `sumizome ingest` again."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_other_parquet(path: Path) -> bool:
    """Whether a file is whole parquet that `sumizome ingest` did not write: somebody's table."""
    try:
        return _METADATA_KEY not in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError, ValueError):
        return False


def read_header(schema: pa.Schema, path: Path) -> dict[str, Any]:
    """The header in the file's metadata, once it and the columns' types are found to be a manifest's.

    Raises: ManifestError.
    """
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise ManifestError(f"expected a manifest of sumizome, found another parquet file at {path}.")
    try:
        header = json.loads(raw)
        version = header["version"]
        well_formed = _is_header(header)
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"expected the manifest's header as JSON, found it damaged in {path}.") from error
    if type(version) is not int or not MANIFEST_VERSION <= version <= RECORD_VERSION:
        raise ManifestError(
            f"expected a manifest of version {MANIFEST_VERSION} to {RECORD_VERSION}, found version {version!r} in "
            f"{path}: run `sumizome ingest` again."
        )
    if not well_formed:
        raise ManifestError(f"expected sources, background and settings in the header, found it damaged in {path}.")
    _check_columns(schema, version, path)
    return dict(header)


def _is_header(header: Mapping[str, Any]) -> bool:
    sources, background = header.get("sources"), header.get("background")
    return (
        isinstance(sources, list)
        and all(isinstance(source, str) and Path(source).is_absolute() for source in sources)
        and isinstance(background, list)
        and len(background) == 3
        and all(isinstance(channel, int) and 0 <= channel <= 255 for channel in background)
        and isinstance(header.get("settings"), dict)
        and _is_tags_by_category(header.get("categories", {}))
    )


def _is_tags_by_category(categories: Any) -> bool:
    return isinstance(categories, dict) and all(
        isinstance(tags, list) and all(isinstance(tag, str) for tag in tags) for tags in categories.values()
    )


def _check_columns(schema: pa.Schema, version: int, path: Path) -> None:
    for expected in schema_of(version):
        if expected.name not in schema.names:
            raise ManifestError(f"expected a column {expected.name!r}, found none in {path}.")
        found = schema.field(expected.name)
        if not found.type.equals(expected.type):
            raise ManifestError(f"expected column {expected.name!r} as {expected.type}, found {found.type} in {path}.")


def _check_rows(table: pa.Table, source_count: int, where: str) -> None:
    """Refuses rows that later code would trust in vain; whole columns at a time."""
    check_values(table, source_count, where)
    check_ids(table["id"], where)


def check_values(table: pa.Table, source_count: int, where: str, first_row: int = 0) -> None:
    """All checks that look at one row at a time; `table` may be a part that begins at `first_row`.

    Raises: ManifestError naming column and row.
    """
    for name, is_wrong, expected in _row_rules(table, source_count):
        _refuse_first(is_wrong, table[name], name, expected, where, first_row)


def check_ids(ids: pa.ChunkedArray, where: str) -> None:
    """Raises: ManifestError naming the first row whose id another has, too."""
    _refuse_first(_is_doubled(ids), ids, "id", "each id once", where)


def _refuse_first(is_wrong: Any, column: pa.ChunkedArray, name: str, expected: str, where: str, first: int = 0) -> None:
    wrong = np.flatnonzero(is_wrong)
    if len(wrong):
        row = int(wrong[0])
        found = column[row].as_py()
        raise ManifestError(
            f"expected {expected}, found {found!r:.200} in column {name!r}, row {first + row}, of {where}."
        )


def _row_rules(table: pa.Table, source_count: int) -> Iterable[tuple[str, Any, str]]:
    """(column, bool [rows] that is true where the row is wrong, what was expected)."""
    for name in SCHEMA.names:
        yield name, pc.is_null(table[name]).to_numpy(), "a value"
    nulls = pc.is_null(pc.list_flatten(table["tags"]))
    if pc.any(nulls).as_py():
        row = np.repeat(np.arange(len(table)), pc.list_value_length(table["tags"]).to_numpy())[nulls.to_numpy()]
        yield "tags", np.isin(np.arange(len(table)), row), "tags without null"
    source = table["source"].to_numpy()
    yield "source", (source < 0) | (source >= source_count), f"a source below {source_count}"
    # A path is data from a file: it must not lead out of its source (absolute, "..", a NUL that ends it early).
    escapes = pc.match_substring_regex(table["path"], r"^$|" + _ESCAPES)
    yield "path", escapes.to_numpy(), "a relative path that stays below its source"
    yield "sha256", ~pc.match_substring_regex(table["sha256"], "^[0-9a-f]{64}$").to_numpy(), "64 hex digits"
    for name in ("height", "width"):
        side = table[name].to_numpy()
        yield name, (side < 1) | (side > MAX_SIDE), f"1 to {MAX_SIDE} px"
    if "archive" in table.schema.names:
        yield from _archive_rules(table)
    if "score" in table.schema.names:
        finite = pc.fill_null(pc.is_finite(table["score"]), True)
        yield "score", ~finite.to_numpy(), "a finite number"
        length = pc.fill_null(pc.utf8_length(table["rating"]), 1).to_numpy()
        yield "rating", (length < 1) | (length > MAX_RATING_LENGTH), f"1 to {MAX_RATING_LENGTH} characters"
    kept, lengths = table["kept_tags"].to_numpy(), pc.list_value_length(table["tags"]).to_numpy()
    yield "kept_tags", (kept < 0) | (kept > lengths), "at most the number of tags"
    yield "repeats", table["repeats"].to_numpy() < 1, "at least 1"


_ESCAPES = r"^/|(^|/)\.\.(/|$)|\x00|\\"


def _archive_rules(table: pa.Table) -> Iterable[tuple[str, Any, str]]:
    archive, offset = table["archive"], table["offset"]
    yield "offset", pc.xor(pc.is_null(archive), pc.is_null(offset)).to_numpy(), "an offset where there is an archive"
    escapes = pc.fill_null(pc.match_substring_regex(archive, _ESCAPES), False)
    yield "archive", escapes.to_numpy(), "a relative path that stays below its source"
    prefix = pc.binary_join_element_wise(archive, "", "/")
    is_below = pc.or_(pc.equal(archive, ""), _starts_with(table["path"], prefix))
    yield "archive", ~pc.fill_null(is_below, True).to_numpy(), "the beginning of the path"
    at = pc.fill_null(offset, _TAR_BLOCK)
    out_of_place = pc.or_(pc.less(at, _TAR_BLOCK), pc.not_equal(pc.bit_wise_and(at, _TAR_BLOCK - 1), 0))
    yield "offset", out_of_place.to_numpy(), "a multiple of 512"
    sized = pc.and_(pc.is_valid(archive), pc.less(table["file_bytes"], 1))
    yield "file_bytes", sized.to_numpy(), "at least 1 byte of a member"


_TAR_BLOCK = 512


def _starts_with(texts: pa.ChunkedArray, prefixes: pa.ChunkedArray) -> pa.ChunkedArray:
    """bool [rows], null where the prefix is. (No kernel takes a prefix for each row.)"""
    found = []
    for start in range(0, len(texts), 65_536):
        pairs = zip(*(column.slice(start, 65_536).to_pylist() for column in (texts, prefixes)), strict=True)
        found.append(pa.array([None if head is None else text.startswith(head) for text, head in pairs], pa.bool_()))
    return pa.chunked_array(found, pa.bool_())


def _is_doubled(ids: pa.ChunkedArray) -> Any:
    if pc.count_distinct(ids).as_py() == len(ids):
        return np.zeros(len(ids), bool)
    _, first = np.unique(ids.to_numpy(), return_index=True)
    doubled = np.ones(len(ids), bool)
    doubled[first] = False
    return doubled
