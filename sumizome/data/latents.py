"""Cached latents, as training reads them: any rows of one bucket, checked, by sample.

Owns opening a latent folder and random reads; its rows in memory are `latent_index`'s, the files' format is `shards`'.
The invariant: `LatentCache.read` returns only what matches a digest taken before it was written; damage is an error
that names it.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float16, Int
from safetensors import SafetensorError, safe_open

from sumizome.data.index_cache import default_folder, mapped_index
from sumizome.data.latent_index import LatentIndex, column_parts, join_parts, load_unit_index
from sumizome.data.shards import (
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

__all__ = ["LatentCache", "Verify", "open_latents"]

Verify = Literal["auto", "full", "size"]
"""What is checked on opening. "full": SHA-256 of every file. "size": SHA-256 of the indexes, size of the shards.
"auto": "full" up to 4 GiB. A latent's own CRC-32 is checked whenever it is read, so nothing unchecked is ever used."""

_FULL_BELOW = 4 * 2**30

_MAPPED_FROM = 200_000
"""samples; a smaller index is joined in memory, in less than a second"""

_AHEAD = 8
"""units' indexes read before they are joined"""

_T = TypeVar("_T")
_R = TypeVar("_R")


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
            (picture,) = self.index.ids(np.array([row]))
            raise ShardError(
                f"{path} is damaged at picture {picture}: its CRC-32 is not the one in the index; {self.plan.remedy}"
            )
        return record


def _map_tensor(path: Path, name: str) -> Any:
    """A tensor of a shard, mapped: a slice of it reads that slice."""
    shard: Any = safe_open(path, framework="np")
    return shard.get_slice(name)


def open_latents(root: Path, verify: Verify = "auto", *, index_folder: Path | None = None) -> LatentCache:
    """The latents that `sumizome prepare` wrote, complete and verified.

    The joined index of a large set lies in mapped files below `index_folder` (default: `index_cache.default_folder`),
    made once a machine and content, so that a process holds next to nothing of it.

    Raises: ShardError if a unit is missing, or a file is damaged or foreign, before any of them is used.
    """
    plan = load_plan(root)
    shards = [unit_paths(root, unit)[0] for unit in range(plan.units)]
    if verify == "auto":
        stored = sum(path.stat().st_size for path in shards if path.is_file())
        verify = "full" if stored <= _FULL_BELOW else "size"
    with ThreadPoolExecutor() as pool:  # hashing and decompression leave Python's lock
        records = list(pool.map(lambda unit: verify_unit(root, plan, unit, verify), range(plan.units)))

        def columns() -> Iterator[dict[str, np.ndarray]]:
            tables = _in_order(pool, lambda record: load_unit_index(root, record), records)
            return column_parts(tables, plan.fingerprint)

        if sum(record.written for record in records) < _MAPPED_FROM:
            index = join_parts(columns())
        else:
            index = mapped_index(index_folder or default_folder(), _index_key(plan, records), columns)
    return LatentCache(root, plan, index)


def _index_key(plan: CachePlan, records: Sequence[UnitRecord]) -> str:
    """Names what a joined index was made from: the fingerprint, and the SHA-256 of each unit's own index."""
    digest = hashlib.sha256(plan.fingerprint.digest.encode())
    for record in records:
        digest.update(
            next(facts["sha256"] for name, facts in record.files.items() if name.endswith(".parquet")).encode()
        )
    return digest.hexdigest()


def _in_order(pool: ThreadPoolExecutor, work: Callable[[_T], _R], items: Sequence[_T]) -> Iterator[_R]:
    """work(item) of each in order, some ahead; differs from pool.map: because that would hold all results."""
    ahead: deque[Future[_R]] = deque()
    for item in items:
        ahead.append(pool.submit(work, item))
        if len(ahead) > _AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
