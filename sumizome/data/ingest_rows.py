"""The rows of a manifest on their way: collected as columns, copies found among them, ids given.

Owns what becomes of accepted pictures. Invariant: six million of them are a few Arrow batches, not six million objects;
an id follows from the bytes of the file and the order of (source, path) alone.
"""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sumizome.data.duplicates import find_copies
from sumizome.data.ingest_tables import CopyLine
from sumizome.data.listing import printable
from sumizome.data.manifest import ARCHIVE_SCHEMA, MAX_RATING_LENGTH, RECORD_SCHEMA, SCHEMA
from sumizome.data.source_config import DuplicateConfig
from sumizome.data.tasks import Entry, Reject
from sumizome.data.verification import Facts

__all__ = ["Rows", "manifest_columns", "without_copies"]

_BATCH = 8_192


class Rows:
    """Collects rows in Arrow batches, so that six million pictures are not six million objects."""

    def __init__(self) -> None:
        more = [("captioned", pa.bool_()), ("profile_ignored", pa.bool_()), ("perceptual_hash", pa.uint64())]
        columns = (column for column in SCHEMA if column.name != "id")
        self._schema = pa.schema([*columns, *ARCHIVE_SCHEMA, *RECORD_SCHEMA, *more])
        self._columns: dict[str, list[object]] = {name: [] for name in self._schema.names}
        self._batches: list[pa.Table] = []

    def add(self, entry: Entry, facts: Facts) -> None:
        """A picture that is taken, and what decoding found."""
        task, claims = entry.task, entry.claims
        tagged = {"tags": facts.tags.tags, "kept_tags": facts.tags.kept}
        captioned = {"captioned": task.sidecar is not None or task.text is not None}
        told = {"rating": printable(claims.rating)[:MAX_RATING_LENGTH] or None, "score": claims.score}
        row = task._asdict() | facts._asdict() | tagged | captioned | told
        for name, values in self._columns.items():
            values.append(row[name])
        if len(self._columns["path"]) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        self._batches.append(pa.table(self._columns, schema=self._schema))
        for values in self._columns.values():
            values.clear()

    def table(self) -> pa.Table:
        """All rows; their ids are given when it is known which of them stay."""
        self._flush()
        return pa.concat_tables(self._batches)


def without_copies(table: pa.Table, config: DuplicateConfig, rejects: list[Reject]) -> tuple[pa.Table, list[CopyLine]]:
    """(the rows that stay, with their ids; the copies found). Copies that are dropped are added to `rejects`."""
    pixels = table["height"].to_numpy().astype(np.int64) * table["width"].to_numpy()
    copies = find_copies(table["sha256"], table["perceptual_hash"].to_numpy(), pixels, config)
    sources, paths = table["source"].combine_chunks(), table["path"].combine_chunks()
    stays = np.ones(len(table), bool)
    lines = []
    for row, kept, kind, distance in copies:
        dropped = "drop" in (config.exact if kind == "exact" else config.near)
        line = CopyLine(
            sources[row].as_py(),
            paths[row].as_py(),
            kind,
            distance,
            sources[kept].as_py(),
            paths[kept].as_py(),
            dropped,
        )
        lines.append(line)
        if dropped:
            stays[row] = False
            where = f"{line.kept_path} of source {line.kept_source}"
            sentence = (
                f"it has the bytes of {where}." if kind == "exact" else f"it looks like {where} ({distance} bits)."
            )
            rejects.append(
                Reject(line.source, line.path, "duplicate" if kind == "exact" else "near_duplicate", sentence)
            )
    kept_rows = table.filter(pa.array(stays))
    return kept_rows.add_column(0, SCHEMA.field("id"), _ids(kept_rows["sha256"])), lines


def _ids(digests: pa.ChunkedArray) -> pa.ChunkedArray:
    """The digests' first 16 digits, made unique by "-2", "-3", … in row order."""
    short = pc.utf8_slice_codeunits(digests, 0, 16)
    values, counts = pc.value_counts(short).flatten() if len(short) else (pa.array([]), pa.array([]))
    repeated = values.filter(pc.greater(counts, 1))
    if not len(repeated):
        return short
    texts = short.to_pylist()
    seen: Counter[str] = Counter()
    for row in np.flatnonzero(pc.is_in(short, value_set=repeated).to_numpy()).tolist():
        digest = texts[row]
        seen[digest] += 1
        if seen[digest] > 1:
            texts[row] = f"{digest}-{seen[digest]}"
    return pa.chunked_array([pa.array(texts, pa.string())])


def manifest_columns(table: pa.Table) -> list[str]:
    """The columns of `Rows.table` that the manifest needs: those of tars and of records only where any row has one."""
    told = any(table[name].null_count < len(table) for name in RECORD_SCHEMA.names)
    in_tars = told or table["archive"].null_count < len(table)
    return [*SCHEMA.names, *(ARCHIVE_SCHEMA.names if in_tars else ()), *(RECORD_SCHEMA.names if told else ())]
