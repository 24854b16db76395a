"""SHA-256 of a manifest's rows, taken a part at a time.

Owns what the digest covers and in which order. The invariant: the same rows give the same digest however they are
chunked, written, read or encoded, so a file of millions of rows is hashed in the memory of one part.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["ARCHIVE_COLUMNS", "COLUMNS", "RECORD_COLUMNS", "RowsDigest"]

COLUMNS = (
    "id", "source", "path", "sha256", "file_bytes", "format", "height", "width", "tags", "kept_tags", "repeats",
)  # fmt: skip
"""in the order of hashing"""

ARCHIVE_COLUMNS = ("archive", "offset")
"""which the second version of the manifest has, too"""


RECORD_COLUMNS = ("rating", "score")
"""which the third version has, too; they decide nothing in training, and so are not in its digest"""


class RowsDigest:
    """Feed it the rows in order with `update`, whole columns of a part at a time; then ask for `hexdigest`."""

    def __init__(self, version: int) -> None:
        names = COLUMNS + ARCHIVE_COLUMNS * (version > 1) + RECORD_COLUMNS * (version > 2)
        self._columns: dict[str, _ColumnHash] = {
            name: _ListHash() if name == "tags" else _StringHash() if name in _STRINGS else _NumberHash()
            for name in names
        }
        self._in_tars = version == 2
        """The third version may have no tar: then its rows have the digest of the first."""

    def update(self, table: pa.Table) -> None:
        """Takes in the next rows; strings may be dictionary-encoded."""
        for name, column in self._columns.items():
            for chunk in table[name].chunks:
                if len(chunk):
                    column.update(pc.fill_null(chunk, _NULL[name]) if name in _NULL else chunk)
        if "archive" in self._columns:
            self._in_tars = self._in_tars or table["archive"].null_count < len(table)

    def hexdigest(self, background: Sequence[int], categories: Mapping[str, str]) -> str:
        """Over the rows, the background and the tags' categories."""
        digest = hashlib.sha256(f"manifest {1 + self._in_tars} {tuple(background)}".encode())
        for name in COLUMNS + ARCHIVE_COLUMNS * self._in_tars:
            digest.update(f"\x1f{name}\x1f".encode() + self._columns[name].digest())
        if categories:
            digest.update(json.dumps(sorted(categories.items())).encode())
        return digest.hexdigest()

    def records_hexdigest(self) -> str:
        """Over what records say and training does not need; "" for a manifest without them."""
        parts = [self._columns[name].digest() for name in RECORD_COLUMNS if name in self._columns]
        return hashlib.sha256(b"".join(parts)).hexdigest() if parts else ""


_STRINGS = {"id", "path", "sha256", "format", "archive", "rating"}

_NULL = {"archive": "\0", "offset": -1, "rating": "\0", "score": float("nan")}
"""what stands for null: values that no row can have"""


class _ColumnHash(Protocol):
    def update(self, chunk: pa.Array) -> None: ...

    def digest(self) -> bytes: ...


class _NumberHash:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, chunk: pa.Array) -> None:
        self._hash.update(np.ascontiguousarray(chunk.to_numpy(zero_copy_only=False)).data)

    def digest(self) -> bytes:
        return self._hash.digest()


class _StringHash:
    """Lengths and contents are hashed apart, so that chunks leave no trace."""

    def __init__(self) -> None:
        self._lengths, self._contents = _NumberHash(), hashlib.sha256()

    def update(self, chunk: pa.Array) -> None:
        if pa.types.is_dictionary(chunk.type):
            self._lengths.update(pc.binary_length(chunk.dictionary).take(chunk.indices))
            chunk = chunk.dictionary.take(chunk.indices)
        else:
            self._lengths.update(pc.binary_length(chunk))
        _, offsets, text = chunk.buffers()
        first, last = np.frombuffer(offsets, np.int32)[[chunk.offset, chunk.offset + len(chunk)]]
        if last > first:
            self._contents.update(memoryview(text)[first:last])

    def digest(self) -> bytes:
        return hashlib.sha256(self._lengths.digest() + self._contents.digest()).digest()


class _ListHash:
    def __init__(self) -> None:
        self._lengths, self._values = _NumberHash(), _StringHash()

    def update(self, chunk: pa.Array) -> None:
        self._lengths.update(pc.list_value_length(chunk))
        if len(values := chunk.flatten()):
            self._values.update(values)

    def digest(self) -> bytes:
        return hashlib.sha256(self._lengths.digest() + self._values.digest()).digest()
