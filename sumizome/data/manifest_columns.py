"""A manifest of any size, checked whole and held in part: every row is read and verified, chosen columns stay.

Owns the reading in parts; the checks are `manifest`'s. The invariant: what opens here would load there, and the other
way round: the same types, values, ids and seal are asked for, only never all rows at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import UInt64

from sumizome.data.buckets import Sizes
from sumizome.data.manifest import SCHEMA, check_ids, check_values, read_header, refusing_damage, schema_of, seal_of
from sumizome.data.rows_digest import RowsDigest
from sumizome.errors import ManifestError

__all__ = ["ManifestColumns", "open_manifest_columns"]

_PART = 65_536
"""rows read and checked at a time"""
_NUMBERS = ("source", "file_bytes", "height", "width", "kept_tags", "repeats")


@dataclass(frozen=True, eq=False)
class ManifestColumns:
    """Some columns of a sound manifest, as numpy arrays of their own small types."""

    columns: Mapping[str, np.ndarray]
    sources: tuple[Path, ...]
    digest: str
    """as `Manifest.digest`"""

    @property
    def sizes(self) -> Sizes:
        """(height, width) px of each row."""
        return np.stack([self.columns["height"], self.columns["width"]], axis=1)


def open_manifest_columns(path: Path, names: Iterable[str] = ("height", "width", "repeats")) -> ManifestColumns:
    """Verifies the manifest at `path` whole, and returns its columns `names`, which hold numbers.

    Six million rows of thirty tags need less than a gigabyte, most of it for a moment.
    Raises: ManifestError as `load_manifest` does.
    """
    if not path.is_file():
        raise ManifestError(f"expected a manifest at {path}, found no file: run `sumizome ingest` first.")
    with refusing_damage(path):
        schema = pq.read_schema(path)
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
    if header.get("seal") != seal_of(header, found):
        raise ManifestError(f"expected {path} as it was written, found its seal broken: run `sumizome ingest` again.")
    columns = {name: np.concatenate(parts) for name, parts in kept.items()}
    return ManifestColumns(columns, tuple(Path(source) for source in header["sources"]), found)


def _parts(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """The rows in parts, each read while the one before it is worked on."""
    # Tags stay numbers into a vocabulary, as the file has them: a quarter of the time of spelling them out.
    with refusing_damage(path), pq.ParquetFile(path, read_dictionary=["tags.list.element"]) as file:
        batches = file.iter_batches(batch_size=_PART, columns=columns)

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
