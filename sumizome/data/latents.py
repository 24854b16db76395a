"""Cached latents, as training reads them: any rows of one bucket, checked, by sample.

Owns opening a latent folder and random reads; its rows in memory are `latent_index`'s, the files' format is `shards`'.
The invariant: `LatentCache.read` returns only what matches a digest taken before it was written; damage is an error
that names it.
"""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float16, Int
from safetensors import SafetensorError, safe_open

from sumizome.data.latent_index import LatentIndex, join_indexes, load_unit_index
from sumizome.data.shards import (
    CachePlan,
    Fingerprint,
    crc32,
    differences,
    load_plan,
    tensor_name,
    unit_paths,
    verify_unit,
)
from sumizome.errors import ConfigError, ShardError
from sumizome.shapes import Latents

__all__ = ["LatentCache", "Verify", "open_latents"]

Verify = Literal["auto", "full", "size"]
"""What is checked on opening. "full": SHA-256 of every file. "size": SHA-256 of the indexes, size of the shards.
"auto": "full" up to 4 GiB. A latent's own CRC-32 is checked whenever it is read, so nothing unchecked is ever used."""

_FULL_BELOW = 4 * 2**30


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
        """Raw latents as the U-Net sees them: (raw − mean) / std, those of the VAE that made them if not told."""
        return (raw - self._mean) / self._std

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> "LatentCache":
        """The same latents, normalised by other statistics than their VAE states: `latent_statistics`.

        Raises: ConfigError unless there is one of each for every channel.
        """
        if not len(mean) == len(std) == len(self._mean):
            raise ConfigError(
                f"latent_statistics has {len(mean)} means and {len(std)} deviations; {self.root} has "
                f"{len(self._mean)} channels"
            )
        other = copy.copy(self)
        other._mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        other._std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        return other

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
        tables = list(pool.map(lambda record: load_unit_index(root, record), records))
    return LatentCache(root, plan, join_indexes(tables, plan.fingerprint))
