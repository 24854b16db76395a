"""What decoding has found so far, kept beside the manifest: a second ingest decodes only what is new or changed.

Owns the file and its checks. Invariants: an entry holds for one state of a picture's file (path, size, time of last
change, place in its tar) and one way of looking (background, hash, decoder); what the file says wrongly, cut short or
of another way of looking is passed over and decoded again, never believed. A process that is killed loses what it had
found in the last `SECONDS` at most. Tags are not in it: captions are read each time.
"""

import contextlib
import hashlib
import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sumizome.data.tags import ParsedTags
from sumizome.data.verification import Facts, Look, Outcome
from sumizome.errors import DataError
from sumizome.files import hold_lock, write_atomically

__all__ = ["Journal", "look_digest"]

SECONDS = 10.0
ROWS = 2048
_MAGIC = b"SMZJ\x00\x01\r\n"
_HEAD = struct.Struct("<8sI16s16s")
"""magic, bytes of contents, what was looked for, digest of the contents"""
_MAX_BYTES = 2**28

_SCHEMA = pa.schema(
    [
        ("stamp", pa.binary(16)),
        ("sha256", pa.binary(32)),
        ("md5", pa.binary(16)),
        ("file_bytes", pa.int64()),
        ("format", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("profile_ignored", pa.bool_()),
        ("perceptual_hash", pa.uint64()),
        ("reason", pa.string()),
        ("sentence", pa.string()),
    ]
)

_LASTING = frozenset(
    {"not_an_image", "format_not_supported", "animated", "truncated", "undecodable", "bad_chunk", "broken_palette"}
    | {"too_many_pixels", "side_too_long", "too_elongated", "too_small", "fully_transparent", "empty_file"}
    | {"file_too_large"}
)
"""what is wrong with a picture's bytes; other reasons (memory, a disk, a caption) may be gone next time"""

_NO_TAGS = ParsedTags((), 0)


def look_digest(look: Look) -> bytes:
    """16 bytes that stand for a way of looking: its settings, and the decoder's version."""
    return hashlib.blake2b(f"1 pillow {PIL.__version__} {tuple(look)}".encode(), digest_size=16).digest()


class Journal:
    """The outcomes of a way of looking, by the stamp of the file's state. Use as a context; one process at a time."""

    def __init__(self, path: Path | None, look: Look, *, anew: bool = False) -> None:
        """`anew` forgets what the file has, once no other process is at it."""
        self._path, self._look, self._anew = path, look_digest(look), anew
        self._rows: list[dict[str, Any]] = []
        self._written = time.monotonic()
        self._held = contextlib.ExitStack()

    @cached_property
    def _table(self) -> pa.Table:
        """What the file had when this was entered, or first asked."""
        tables = _read_blocks(self._path, self._look) if self._path and self._path.is_file() else ()
        return pa.concat_tables([_SCHEMA.empty_table(), *tables]).combine_chunks()

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        return _sorted_keys(self._table["stamp"])

    @cached_property
    def _used(self) -> NDArray[np.bool_]:
        """[rows]: it was asked for."""
        return np.zeros(len(self._table), bool)

    def __enter__(self) -> "Journal":
        if self._path is not None:
            self._held.enter_context(_lock(self._path))
            try:
                self._begin(self._path)
            except BaseException:
                self._held.close()
                raise
        return self

    def _begin(self, path: Path) -> None:
        """Reads the file, or forgets it: only now, for until now another process may have been writing it."""
        if self._anew:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise DataError(f"cannot remove {path}: {error.strerror}.") from error
        len(self._table)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            self.flush()

    def __len__(self) -> int:
        return len(self._table)

    def find(self, stamps: Sequence[bytes | None], md5s: Sequence[str | None]) -> list[Outcome | None]:
        """What is known of files in these states, with these md5s where a record says so; their tags are empty."""
        found: list[Outcome | None] = [None] * len(stamps)
        asked = [at for at, stamp in enumerate(stamps) if stamp is not None]
        keys, order = self._sorted
        if not asked or not len(keys):
            return found
        wanted = np.array([int.from_bytes((stamps[at] or b"")[:8], "little") for at in asked], np.uint64)
        last = np.searchsorted(keys, wanted, "right") - 1  # the newest of equal ones
        hits = np.flatnonzero((last >= 0) & (keys[np.maximum(last, 0)] == wanted))
        rows = order[last[hits]]
        for at, row, values in zip(
            hits.tolist(), rows.tolist(), self._table.take(pa.array(rows)).to_pylist(), strict=True
        ):
            place = asked[at]
            if values["stamp"] == stamps[place]:
                self._used[row] = True
                if _agrees(values, md5s[place]):
                    found[place] = _outcome(values)
        return found

    def add(self, stamp: bytes | None, outcome: Outcome, md5: str | None) -> None:
        """Keeps an outcome, if it lasts."""
        if self._path is None or stamp is None:
            return
        row: dict[str, Any]
        if isinstance(outcome, Facts):
            row = outcome._asdict() | {"sha256": bytes.fromhex(outcome.sha256)}
        elif outcome[0] in _LASTING:
            row = {"reason": outcome[0], "sentence": outcome[1]}
        else:
            return
        row["md5"] = bytes.fromhex(md5) if md5 else None  # decoding has checked it
        self._rows.append(row | {"stamp": stamp})
        if len(self._rows) >= ROWS or time.monotonic() - self._written > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Appends what is not yet on the disk.

        Raises: DataError: a disk that cannot be written.
        """
        self._written = time.monotonic()
        if not self._rows or self._path is None:
            return
        block = _block(pa.Table.from_pylist(self._rows, schema=_SCHEMA), self._look)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror or error}.") from error
        self._rows.clear()  # interrupted before this, rows are written twice, which does no harm

    def prune(self) -> None:
        """Writes the file anew without entries that nothing asked for, once they are more than the others."""
        self.flush()
        if self._path is None or not self._path.is_file() or self._used.sum() * 2 >= len(self._used):
            return
        table = pa.concat_tables([_SCHEMA.empty_table(), *_read_blocks(self._path, self._look)])
        # By stamp, not by place: a user may have deleted the file meanwhile, and it began anew.
        old, asked = self._table["stamp"], self._table["stamp"].filter(pa.array(self._used))
        unasked = pc.and_(_is_in(table["stamp"], old), pc.invert(_is_in(table["stamp"], asked)))
        kept = table.filter(pc.invert(unasked))
        blocks = [_block(kept.slice(start, 65_536), self._look) for start in range(0, len(kept), 65_536)]
        write_atomically(self._path, lambda temporary: temporary.write_bytes(b"".join(blocks)))


def _is_in(stamps: pa.ChunkedArray, those: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.is_in(stamps, value_set=those.combine_chunks())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    def refusal(holder: str) -> DataError:
        return DataError(f"{path}: {holder} is ingesting here; wait for it, or give another --manifest.")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = contextlib.ExitStack()
        held.enter_context(hold_lock(path.with_name(f".{path.name}.lock"), refusal))
    except OSError as error:
        raise DataError(f"cannot write beside {path}: {error.strerror or error}.") from error
    with held:
        yield


def _agrees(values: dict[str, Any], md5: str | None) -> bool:
    return md5 is None or (values["md5"] is not None and values["md5"].hex() == md5)


def _outcome(values: dict[str, Any]) -> Outcome:
    if values["reason"] is not None:
        return values["reason"], values["sentence"] or ""
    told = {name: values[name] for name in Facts._fields if name in _SCHEMA.names and name != "sha256"}  # no thumbnails
    return Facts(sha256=values["sha256"].hex(), tags=_NO_TAGS, **told)


def _sorted_keys(stamps: pa.ChunkedArray) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(first eight bytes of each stamp, rising; the row of each), of equal ones the newest last."""
    keys = np.frombuffer(b"".join(stamps.to_pylist()), np.uint64)[::2]
    order = np.argsort(keys, kind="stable")
    return keys[order], order


def _block(table: pa.Table, look: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, _SCHEMA, options=options) as writer:
        writer.write_table(table.combine_chunks())
    content = bytes(sink.getvalue().to_pybytes())
    return _HEAD.pack(_MAGIC, len(content), look, _digest(look + content)) + content


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _read_blocks(path: Path, look: bytes) -> Iterable[pa.Table]:
    """The sound blocks of this way of looking; past damage the search goes on at the next mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; delete it, and all pictures are decoded again."
        ) from error
    at = data.find(_MAGIC)
    while 0 <= at <= len(data) - _HEAD.size:
        _, size, of, digest = _HEAD.unpack_from(data, at)
        content = data[at + _HEAD.size : at + _HEAD.size + size]
        if len(content) < size or size > _MAX_BYTES or _digest(of + content) != digest:
            at = data.find(_MAGIC, at + 1)
            continue
        if of == look and (table := _table(content)) is not None:
            yield table
        at = data.find(_MAGIC, at + _HEAD.size + size)


def _table(content: bytes) -> pa.Table | None:
    try:
        with pa.ipc.open_stream(content) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError):
        return None
    sound = table.schema.equals(_SCHEMA) and not table["stamp"].null_count
    return table if sound else None
