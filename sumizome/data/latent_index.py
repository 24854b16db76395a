"""The rows of a latent cache as columns in memory: what each sample is and where its latent lies.

Owns reading the units' indexes and joining them; the latents themselves are `latents`'. Strings stay Arrow, one chunk a
unit, so that a million rows are no Python objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from sumizome.data.shards import INDEX_SCHEMA, Fingerprint, UnitRecord, unit_paths
from sumizome.errors import ShardError

__all__ = ["LatentIndex", "join_indexes", "load_unit_index"]


@dataclass(frozen=True, eq=False)
class LatentIndex:
    """The rows of a cache as columns; strings stay Arrow, one chunk a unit, so a million rows are no Python objects."""

    id: pa.ChunkedArray
    tags: pa.ChunkedArray
    unit: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    """Of the bucket's tensor in the unit."""
    bucket: Int[np.ndarray, " n"]
    """Row of the bucket table."""
    original: Int[np.ndarray, "n 2"]
    """(height, width) px."""
    crop: Int[np.ndarray, "n 2"]
    """(top, left) px of the resized picture."""
    kept_tags: Int[np.ndarray, " n"]
    repeats: Int[np.ndarray, " n"]
    crc32: Int[np.ndarray, " n"]
    variants: int = 1
    """Latents of each picture: rows p·variants … (p + 1)·variants − 1 are one, cropped or mirrored otherwise."""

    def pictures(self) -> Int[np.ndarray, " p"]:
        """The first row of each picture: what a plan draws from."""
        return np.arange(0, len(self.row), self.variants)

    def ids(self, rows: Int[np.ndarray, " b"]) -> list[str]:
        """The sample ids of some rows."""
        return [self.id[row].as_py() for row in rows.tolist()]

    def tag_lists(self, rows: Int[np.ndarray, " b"]) -> list[list[str]]:
        """The tags of some rows, in the order of the caption file."""
        return [self.tags[row].as_py() for row in rows.tolist()]

    def table(self, rows: Int[np.ndarray, " b"]) -> pa.Table:
        """Columns `tags` and `repeats` of some rows, as `tags.tag_loss_weights` takes them."""
        tags = self.tags.take(pa.array(rows)).cast(pa.list_(pa.string()))
        return pa.table({"tags": tags, "repeats": self.repeats[rows]})


def load_unit_index(root: Path, record: UnitRecord) -> pa.Table:
    _, path, _ = unit_paths(root, record.unit, record.overlay)
    # Tags as numbers into a vocabulary: a third of the memory, and they read back as the same strings.
    with pq.ParquetFile(path, read_dictionary=["tags.list.element"]) as file:
        names = file.schema_arrow.names
        table = file.read([name for name in names if name != "sha256"])
    if names != INDEX_SCHEMA.names:
        raise ShardError(f"{path} has columns {names}; this version reads {INDEX_SCHEMA.names}")
    return table


def join_indexes(tables: Sequence[pa.Table], fingerprint: Fingerprint) -> LatentIndex:
    def column(name: str) -> np.ndarray:
        return np.concatenate([table[name].to_numpy() for table in tables])

    def pair(first: str, second: str) -> np.ndarray:
        return np.stack([column(first), column(second)], axis=1)

    def strings(name: str) -> pa.ChunkedArray:
        return pa.chunked_array([chunk for table in tables for chunk in table[name].chunks], type=tables[0][name].type)

    variants = fingerprint.variants
    for table in tables:
        if not np.array_equal(table["variant"].to_numpy(), np.arange(table.num_rows) % variants):
            raise ShardError(
                f"an index does not have {variants} variants of each picture; run `sumizome prepare` again"
            )
    sides = pair("bucket_h", "bucket_w")
    bucket = np.full(len(sides), -1)
    for number, (height, width) in enumerate(fingerprint.buckets):
        bucket[(sides[:, 0] == height) & (sides[:, 1] == width)] = number
    return LatentIndex(
        id=strings("id"),
        tags=strings("tags"),
        unit=np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
        row=column("row"),
        bucket=bucket,
        original=pair("original_h", "original_w"),
        crop=pair("crop_top", "crop_left"),
        kept_tags=column("kept_tags"),
        repeats=column("repeats"),
        crc32=column("crc32").astype(np.int64),
        variants=variants,
    )
