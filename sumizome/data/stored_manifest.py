"""A manifest of any size, checked whole once, whose rows stay on the disk until they are asked for.

Owns the reading in parts; the checks are `manifest`'s. The invariant: what opens here would load there, and the other
way round: the same types, values, ids and seal are asked for, only never all rows at a time. The file that was checked
is the file that is read: one that was replaced since is an error, not another answer.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int, UInt64

from sumizome.data.images import Colour
from sumizome.data.manifest import SCHEMA, check_ids, check_values, read_header, refusing_damage, schema_of, seal_of
from sumizome.data.rows_digest import RowsDigest
from sumizome.errors import ManifestError

__all__ = ["StoredManifest", "open_manifest"]

_PART = 65_536
"""rows read and checked at a time"""
_GROUPS_KEPT = 3
"""row groups that stay in memory when some of their rows were asked for; some 40 MB each"""
_TAGS = "tags.list.element"


@dataclass(frozen=True, eq=False)
class StoredManifest:
    """A sound manifest in its file: what `Manifest` tells of its rows, read anew each time. Threads may share it."""

    path: Path
    sources: tuple[Path, ...]
    background: Colour
    categories: Mapping[str, str]
    digest: str
    """as `Manifest.digest`"""
    version: int
    columns: Mapping[str, np.ndarray]
    """those that were asked for, by their names; they hold numbers"""
    ends: Int[np.ndarray, " g"]
    """of each row group: one more than its last row"""
    identity: tuple[int, int, int]
    _groups: "_Groups" = field(default_factory=lambda: _Groups())

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def column(self, name: str) -> np.ndarray:
        """A column of numbers."""
        if name in self.columns:
            return self.columns[name]
        kind = SCHEMA.field(name).type.to_pandas_dtype()
        return np.concatenate([np.empty(0, kind), *(part[name].to_numpy() for part in self.parts([name]))])

    def parts(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """These columns of all rows, in their order, some rows at a time; tags may be dictionary-encoded.

        Raises: ManifestError if the file is not the one that was opened.
        """
        self._check_same()
        yield from _parts(self.path, list(names))

    def take(self, rows: Int[np.ndarray, " n"], names: Sequence[str] | None = None) -> pa.Table:
        """These rows in this order, whole or some columns of them.

        Raises: ManifestError if the file is not the one that was opened.
        """
        own = schema_of(self.version)
        schema = own if names is None else pa.schema([own.field(name) for name in names])
        group = np.searchsorted(self.ends, rows, side="right")
        found, order = [schema.empty_table()], [np.empty(0, np.int64)]
        for number in np.unique(group).tolist():
            order.append(np.flatnonzero(group == number))
            first = int(self.ends[number - 1]) if number else 0
            table = self._group(number, tuple(schema.names))
            found.append(table.take(pa.array(rows[order[-1]] - first)).cast(schema))
        return pa.concat_tables(found).take(pa.array(np.argsort(np.concatenate(order))))

    def _group(self, number: int, names: tuple[str, ...]) -> pa.Table:
        def read() -> pa.Table:
            self._check_same()
            with refusing_damage(self.path), pq.ParquetFile(self.path, read_dictionary=[_TAGS]) as file:
                return file.read_row_group(number, columns=list(names))

        return self._groups.get((number, names), read)

    def _check_same(self) -> None:
        if _identity(self.path) != self.identity:
            raise ManifestError(f"{self.path} was replaced while it was in use: run the command again.")


class _Groups:
    """The row groups that were used last. They stay behind when the manifest goes to another process."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, tuple[str, ...]], read: Callable[[], pa.Table]) -> pa.Table:
        with self._lock:
            if key not in self._tables:
                while len(self._tables) >= _GROUPS_KEPT:
                    self._tables.popitem(last=False)
                self._tables[key] = read()
            self._tables.move_to_end(key)
            return self._tables[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Groups, ()


def _identity(path: Path) -> tuple[int, int, int]:
    """Which file it is; of a network drive's, the same on every machine."""
    try:
        status = path.stat()
    except OSError as error:
        raise ManifestError(f"expected a manifest at {path}, found none: {error.strerror}.") from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def open_manifest(path: Path, names: Iterable[str] = ()) -> StoredManifest:
    """Verifies the manifest at `path` whole; its columns `names`, which hold numbers, stay in memory.

    Six million rows of thirty tags need less than a gigabyte, most of it for a moment.
    Raises: ManifestError as `load_manifest` does.
    """
    path = path.absolute()
    if not path.is_file():
        raise ManifestError(f"expected a manifest at {path}, found no file: run `sumizome ingest` first.")
    identity = _identity(path)
    with refusing_damage(path), pq.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    header = read_header(schema, path)
    kept: dict[str, list[np.ndarray]] = {
        name: [np.empty(0, SCHEMA.field(name).type.to_pandas_dtype())] for name in names
    }
    digest, ids, first_row = RowsDigest(header["version"]), _Ids(), 0
    for table in _parts(path, schema_of(header["version"]).names):
        check_values(table, len(header["sources"]), str(path), first_row)
        digest.update(table)
        ids.update(table["id"])
        for name, parts in kept.items():
            parts.append(table[name].to_numpy())
        first_row += len(table)
    categories = {tag: category for category, tags in header.get("categories", {}).items() for tag in tags}
    found = digest.hexdigest(header["background"], categories)
    if ids.any_twice():
        with refusing_damage(path):
            check_ids(pq.read_table(path, columns=["id"])["id"], str(path))  # slow, and names the row
    if header.get("seal") != seal_of(header, found + digest.records_hexdigest()):
        raise ManifestError(f"expected {path} as it was written, found its seal broken: run `sumizome ingest` again.")
    red, green, blue = header["background"]
    return StoredManifest(
        path=path,
        sources=tuple(Path(source) for source in header["sources"]),
        background=(red, green, blue),
        categories=categories,
        digest=found,
        version=header["version"],
        columns={name: np.concatenate(parts) for name, parts in kept.items()},
        ends=np.cumsum(groups, dtype=np.int64),
        identity=identity,
    )


def _parts(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """The rows in parts, each read while the one before it is worked on."""
    # Tags stay numbers into a vocabulary, as the file has them: a quarter of the time of spelling them out.
    with refusing_damage(path), pq.ParquetFile(path, read_dictionary=[_TAGS]) as file:
        groups = ([number] for number in range(file.num_row_groups))  # a part of two could not keep their dictionaries
        batches = (batch for one in groups for batch in file.iter_batches(_PART, row_groups=one, columns=columns))

        def next_part() -> pa.Table | None:
            batch = next(batches, None)
            if batch is None:
                return None
            table = pa.Table.from_batches([batch])
            table.validate(full=True)
            return table

        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(next_part)
            while (part := coming.result()) is not None:
                coming = ahead.submit(next_part)
                yield part


class _Ids:
    """Whether an id comes twice, in eight bytes an id: sixteen hex digits are a number; other spellings stay text."""

    def __init__(self) -> None:
        self._numbers: list[UInt64[np.ndarray, " n"]] = []
        self._others: list[pa.ChunkedArray] = []

    def update(self, ids: pa.ChunkedArray) -> None:
        plain = pc.match_substring_regex(ids, "^[0-9a-f]{16}$")
        self._numbers.append(_numbers(ids.filter(plain)))
        self._others.append(ids.filter(pc.invert(plain)))

    def any_twice(self) -> bool:
        numbers = np.sort(np.concatenate([np.empty(0, np.uint64), *self._numbers]))
        chunks: list[Any] = [chunk for others in self._others for chunk in others.chunks]
        others = pa.chunked_array(chunks, pa.string())
        return bool((numbers[1:] == numbers[:-1]).any() or pc.count_distinct(others).as_py() < len(others))


def _numbers(ids: pa.ChunkedArray) -> UInt64[np.ndarray, " n"]:
    """The numbers that ids of sixteen hex digits spell."""
    text = ids.combine_chunks()
    if not len(text):
        return np.empty(0, np.uint64)
    _, offsets, letters = text.buffers()
    first = np.frombuffer(offsets, np.int32)[text.offset]
    digits = np.frombuffer(letters, np.uint8)[first : first + 16 * len(text)]
    nibbles = np.where(digits >= ord("a"), digits - (ord("a") - 10), digits - ord("0")).reshape(-1, 16)
    return np.ascontiguousarray(nibbles[:, 0::2] << 4 | nibbles[:, 1::2]).view(">u8")[:, 0].astype(np.uint64)
