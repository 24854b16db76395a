"""Cached latents, as training reads them: any rows of one bucket, checked, by sample.

Owns opening a latent folder, its index in memory and random reads. The files' format is `shards`'. The invariant:
`LatentCache.read` returns only what matches a digest taken before it was written; damage is an error that names it.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float16, Int
from safetensors import SafetensorError, safe_open

from sumizome.data.shards import (
    INDEX_SCHEMA,
    CachePlan,
    Fingerprint,
    UnitRecord,
    crc32,
    differences,
    load_plan,
    tensor_name,
    unit_paths,
    verify_unit,
)
from sumizome.errors import ShardError
from sumizome.shapes import Latents

__all__ = ["LatentCache", "LatentIndex", "Verify", "open_latents"]

Verify = Literal["auto", "full", "size"]
"""What is checked on opening. "full": SHA-256 of every file. "size": SHA-256 of the indexes, size of the shards.
"auto": "full" up to 4 GiB. A latent's own CRC-32 is checked whenever it is read, so nothing unchecked is ever used."""

_FULL_BELOW = 4 * 2**30


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


class LatentCache:
    """An opened latent folder. Not tied to a process or thread: files are mapped when first read."""

    def __init__(self, root: Path, plan: CachePlan, index: LatentIndex) -> None:
        self.root = root
        self.plan = plan
        self.index = index
        self.buckets: Int[np.ndarray, "k 2"] = np.array(plan.fingerprint.buckets, np.int64).reshape(-1, 2)
        """The bucket table, (height, width) px; `index.bucket` points into it."""
        self._mean = torch.tensor(plan.fingerprint.latent_mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(plan.fingerprint.latent_std, dtype=torch.float32)[:, None, None]
        self._open_tensor = lru_cache(maxsize=None)(_map_tensor)

    def __len__(self) -> int:
        return len(self.index.row)

    @property
    def fingerprint(self) -> Fingerprint:
        return self.plan.fingerprint

    def require(self, **expected: Any) -> None:
        """Compares parts of the fingerprint, e.g. `require(vae_digest=vae_digest(model.vae))`.

        Raises: ShardError naming what differs, and the command that mends it.
        """
        if wrong := differences(self.fingerprint, expected):
            raise ShardError(
                f"{self.root} was made with another {', another '.join(wrong)} than is used now; "
                f"prepare again into another folder (this one was made by `{self.plan.command}`)"
            )

    def read(self, rows: Int[np.ndarray, " b"]) -> Latents:
        """Raw latents of rows of one bucket, float32, each checked against the CRC-32 taken when it was written.

        Raises: ShardError naming the picture whose record is damaged. ValueError for rows of several buckets.
        """
        (bucket, *others) = np.unique(self.index.bucket[rows]).tolist()
        if others:
            raise ValueError(f"rows of {1 + len(others)} buckets cannot be one batch")
        name = tensor_name(*self.buckets[bucket].tolist())
        return torch.from_numpy(np.concatenate([self._read_record(name, row) for row in rows.tolist()])).float()

    def normalise(self, raw: Latents) -> Latents:
        """Raw latents as the U-Net sees them: (raw − mean) / std of the VAE that made them."""
        return (raw - self._mean) / self._std

    def _read_record(self, name: str, row: int) -> Float16[np.ndarray, "1 c h w"]:
        unit, place = int(self.index.unit[row]), int(self.index.row[row])
        path, *_ = unit_paths(self.root, unit)
        try:
            record = np.asarray(self._open_tensor(path, name)[place : place + 1])
        except (OSError, SafetensorError, IndexError) as error:
            raise ShardError(f"{path} cannot be read ({error}); {self.plan.remedy}") from error
        if crc32(record) != self.index.crc32[row]:
            raise ShardError(
                f"{path} is damaged at picture {self.index.id[row].as_py()}: its CRC-32 is not the one in the index; "
                f"{self.plan.remedy}"
            )
        return record


def _map_tensor(path: Path, name: str) -> Any:
    """A tensor of a shard, mapped: a slice of it reads that slice."""
    shard: Any = safe_open(path, framework="np")
    return shard.get_slice(name)


def open_latents(root: Path, verify: Verify = "auto") -> LatentCache:
    """The latents that `sumizome prepare` wrote, complete and verified.

    Raises: ShardError if a unit is missing, or a file is damaged or foreign, before any of them is used.
    """
    plan = load_plan(root)
    shards = [unit_paths(root, unit)[0] for unit in range(plan.units)]
    if verify == "auto":
        stored = sum(path.stat().st_size for path in shards if path.is_file())
        verify = "full" if stored <= _FULL_BELOW else "size"
    with ThreadPoolExecutor() as pool:  # hashing and decompression leave Python's lock
        records = pool.map(lambda unit: verify_unit(root, plan, unit, verify), range(plan.units))
        tables = list(pool.map(lambda record: _load_index(root, record), records))
    return LatentCache(root, plan, _join(tables, plan.fingerprint))


def _load_index(root: Path, record: UnitRecord) -> pa.Table:
    _, path, _ = unit_paths(root, record.unit)
    # Tags as numbers into a vocabulary: a third of the memory, and they read back as the same strings.
    with pq.ParquetFile(path, read_dictionary=["tags.list.element"]) as file:
        table = file.read()
    if table.num_rows != record.written or table.schema.names != INDEX_SCHEMA.names:
        raise ShardError(f"{path} has {table.num_rows} rows of {table.schema.names}; its record says {record.written}")
    return table


def _join(tables: Sequence[pa.Table], fingerprint: Fingerprint) -> LatentIndex:
    def column(name: str) -> np.ndarray:
        return np.concatenate([table[name].to_numpy() for table in tables])

    def pair(first: str, second: str) -> np.ndarray:
        return np.stack([column(first), column(second)], axis=1)

    def strings(name: str) -> pa.ChunkedArray:
        return pa.chunked_array([chunk for table in tables for chunk in table[name].chunks], type=tables[0][name].type)

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
    )
