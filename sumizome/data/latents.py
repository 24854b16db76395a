"""Cached latents, as training reads them: any rows of one bucket, checked, by sample.

Owns opening a latent folder, here or in a store, and random reads; its rows in memory are `latent_index`'s, the files'
format is `shards`', their bytes come from `shard_files` or `remote_shards`. The invariant: `LatentCache.read` returns
only what matches a digest taken before it was written; damage is an error that names it.
"""

import copy
import hashlib
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float16, Int

from sumizome.data.index_cache import default_folder, mapped_index
from sumizome.data.latent_index import LatentIndex, column_parts, join_parts, load_unit_index
from sumizome.data.latent_plan import CachePlan, Fingerprint, differences, load_plan
from sumizome.data.remote_shards import RemoteShards
from sumizome.data.shard_cache import CacheConfig, RemoteShard, ShardCache
from sumizome.data.shard_files import LocalShards, ShardSource
from sumizome.data.shards import UnitRecord, tensor_name, unit_paths, verify_unit
from sumizome.data.store import Store, is_remote, open_store
from sumizome.data.unit_mirror import mirror_units
from sumizome.errors import ConfigError, ShardError
from sumizome.shapes import Latents

__all__ = ["LatentCache", "Verify", "open_latents"]

Verify = Literal["auto", "full", "size"]
"""What is checked on opening. "full": SHA-256 of every file. "size": SHA-256 of the indexes, size of the shards.
"auto": "full" up to 4 GiB. A latent's own CRC-32 is checked whenever it is read, so nothing unchecked is ever used.
In a store that is not this machine's, "full" fetches the shards, as far as the cache has room."""

_FULL_BELOW = 4 * 2**30
_BLOCK = 32768
"""Numbers converted at once: as many as torch converts without waking other threads, which costs more than it gives."""
_REQUESTS = 32
"""Records asked for at once over a network."""
_AHEAD = 2048
"""Records held that nobody has read yet: 270 MB at 1024²."""

_MAPPED_FROM = 200_000
"""samples; a smaller index is joined in memory, in less than a second"""

_UNITS_AHEAD = 8
"""units' indexes read before they are joined"""

_T = TypeVar("_T")
_R = TypeVar("_R")


class LatentCache:
    """An opened latent folder or store. Threads may share it; a forked process may go on with it."""

    def __init__(self, root: Path | str, plan: CachePlan, index: LatentIndex, shards: ShardSource) -> None:
        self.root = root
        self.plan = plan
        self.index = index
        self.shards = shards
        self.buckets: Int[np.ndarray, "k 2"] = np.array(plan.fingerprint.buckets, np.int64).reshape(-1, 2)
        """The bucket table, (height, width) px; `index.bucket` points into it."""
        self._mean = torch.tensor(plan.fingerprint.latent_mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(plan.fingerprint.latent_std, dtype=torch.float32)[:, None, None]
        self._pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="latents") if shards.parallel else None
        self._coming: dict[int, Future[np.ndarray]] = {}

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
        buckets = self.index.bucket[rows]
        if (buckets != buckets[:1]).any():
            raise ValueError(f"rows of {len(np.unique(buckets))} buckets cannot be one batch")
        self.prefetch(rows)
        shape = self._shape(int(buckets[0]))
        # numpy asks for huge pages, and a block is checked and converted while it is still in the processor's cache.
        read = torch.from_numpy(np.empty((len(rows), *shape), np.float32))
        block = max(1, _BLOCK // math.prod(shape))
        half = np.empty((min(block, len(rows)), *shape), np.float16)
        for first in range(0, len(rows), block):
            part = rows[first : first + block]
            self._gather(half[: len(part)], part)
            _convert(half[: len(part)], read[first : first + block])
        return read

    def prefetch(self, rows: Int[np.ndarray, " n"]) -> None:
        """Begins to read rows, of any buckets, that `read` will be asked for. Nothing to do where no network is."""
        if self._pool is not None:
            for row in rows.tolist():
                if row not in self._coming and len(self._coming) < _AHEAD:
                    self._coming[row] = self._pool.submit(self._one, row)

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

    def _shape(self, bucket: int) -> tuple[int, int, int]:
        """(channels, height, width) of a bucket's latents."""
        height, width = (self.buckets[bucket] // self.fingerprint.vae_factor).tolist()
        return len(self.fingerprint.latent_mean), height, width

    def _gather(self, half: Float16[np.ndarray, "b c h w"], rows: Int[np.ndarray, " b"]) -> None:
        """Records of one bucket, checked, read now or taken from what `prefetch` began."""
        if self._pool is None:
            self._fill(half, rows)
            return
        for place, row in enumerate(rows.tolist()):
            coming = self._coming.pop(row, None)  # None: another thread asked for the same row, and took it
            half[place] = self._one(row) if coming is None else coming.result()

    def _one(self, row: int) -> Float16[np.ndarray, "c h w"]:
        half = np.empty((1, *self._shape(int(self.index.bucket[row]))), np.float16)
        self._fill(half, np.array([row]))
        return np.asarray(half[0])

    def _fill(self, half: Float16[np.ndarray, "b c h w"], rows: Int[np.ndarray, " b"]) -> None:
        """Reads records of one bucket into `half`."""
        index = self.index
        tensor = tensor_name(*self.buckets[index.bucket[rows[0]]].tolist())
        expected = zip(index.unit[rows].tolist(), index.row[rows].tolist(), index.crc32[rows].tolist(), strict=True)
        size, whole = half[0].nbytes, half.reshape(-1).view(np.uint8).data
        for number, (unit, row, crc) in enumerate(expected):
            record = whole[number * size : (number + 1) * size]
            self.shards.read(unit, tensor, row, record)
            if zlib.crc32(record) == crc:
                continue
            if self.shards.read_anew(unit, tensor, row, record) and zlib.crc32(record) == crc:
                continue
            raise ShardError(
                f"{self.shards.location(unit)} is damaged at picture {index.ids(rows[number : number + 1])[0]}: its "
                f"CRC-32 is not the one in the index; {self.plan.remedy}"
            )


def _convert(half: Float16[np.ndarray, "b c h w"], into: Latents) -> None:
    numbers, target = torch.from_numpy(half.reshape(-1)), into.view(-1)
    for first in range(0, len(numbers), _BLOCK):
        target[first : first + _BLOCK].copy_(numbers[first : first + _BLOCK])


def open_latents(
    root: Path | str, verify: Verify = "auto", cache: CacheConfig | None = None, *, index_folder: Path | None = None
) -> LatentCache:
    """The latents that `sumizome prepare` wrote, complete and verified; `root` is a folder, or an address of a store.

    `cache` says where shards of a store are kept on this machine; a folder needs none. The joined index of a large set
    lies in mapped files below `index_folder` (default: `index_cache.default_folder`), made once a machine and content,
    so that a process holds next to nothing of it.

    Raises: ShardError if a unit is missing, or a file is damaged or foreign, before any of them is used. StoreError,
        ConfigError if a store cannot be read.
    """
    if not is_remote(root):
        return _open_folder(Path(root), verify, index_folder)
    if cache is None:
        raise ConfigError(f"{root} is not on this machine; give a cache_dir")
    return _open_store(open_store(root), verify, cache, index_folder)


def _open_folder(root: Path, verify: Verify, index_folder: Path | None) -> LatentCache:
    plan = load_plan(root)

    def path_of(unit: int) -> Path:
        return unit_paths(root, unit)[0]

    if verify == "auto":
        paths = [path_of(unit) for unit in range(plan.units)]
        stored = sum(path.stat().st_size for path in paths if path.is_file())
        verify = "full" if stored <= _FULL_BELOW else "size"
    level: Literal["full", "size"] = verify
    index, _ = _load_units(root, plan, lambda unit: verify_unit(root, plan, unit, level), index_folder)
    return LatentCache(root, plan, index, LocalShards(path_of, plan.remedy))


def _open_store(store: Store, verify: Verify, config: CacheConfig, index_folder: Path | None) -> LatentCache:
    mirror, listed = mirror_units(store, config.folder)
    try:
        plan = load_plan(mirror)
        index, records = _load_units(mirror, plan, lambda unit: verify_unit(mirror, plan, unit, "index"), index_folder)
    except ShardError as error:  # the copy is what the store has
        raise ShardError(str(error).replace(str(mirror), store.address)) from error
    # Of a unit of which a later generation uses nothing, nothing needs to be there.
    shards = {record.unit: _remote_shard(record, listed, store, plan) for record in records if record.written}
    stored = sum(shard.size for shard in shards.values())
    full = verify == "full" or (verify == "auto" and stored <= min(_FULL_BELOW, config.limit))
    cache = ShardCache(config) if config.limit else None
    source = RemoteShards(store, shards, cache, plan.remedy, verify=full)
    if full:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(source.fetch_verified, shards))
    elif cache is not None:
        source.fill()
    return LatentCache(store.address, plan, index, source)


def _load_units(
    root: Path, plan: CachePlan, verified: Callable[[int], UnitRecord], index_folder: Path | None
) -> tuple[LatentIndex, list[UnitRecord]]:
    with ThreadPoolExecutor() as pool:  # hashing and decompression leave Python's lock
        records = list(pool.map(verified, range(plan.units)))

        def columns() -> Iterator[dict[str, np.ndarray]]:
            tables = _in_order(pool, lambda record: load_unit_index(root, record), records)
            return column_parts(tables, plan.fingerprint)

        if sum(record.written for record in records) < _MAPPED_FROM:
            index = join_parts(columns())
        else:
            index = mapped_index(index_folder or default_folder(), _index_key(plan, records), columns)
        index = replace(index, variants=plan.fingerprint.variants)
    return index, records


def _index_key(plan: CachePlan, records: Sequence[UnitRecord]) -> str:
    """Names what a joined index was made from: the fingerprint, and the SHA-256 of each unit's own index."""
    digest = hashlib.sha256(plan.fingerprint.digest.encode())
    for record in records:
        for name, facts in record.files.items():
            if name.endswith(".parquet"):
                digest.update(str(facts["sha256"]).encode())
    return digest.hexdigest()


def _in_order(pool: ThreadPoolExecutor, work: Callable[[_T], _R], items: Sequence[_T]) -> Iterator[_R]:
    """work(item) of each in order, some ahead; differs from pool.map: because that would hold all results."""
    ahead: deque[Future[_R]] = deque()
    for item in items:
        ahead.append(pool.submit(work, item))
        if len(ahead) > _UNITS_AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _remote_shard(record: UnitRecord, listed: dict[str, int], store: Store, plan: CachePlan) -> RemoteShard:
    """Raises: ShardError unless the store lists the unit's shard with the size that its record says."""
    path = unit_paths(Path(), record.unit)[0]
    told = record.files[path.name]
    shard = RemoteShard(path.as_posix(), str(told["sha256"]), int(told["bytes"]))
    if shard.name not in listed:
        raise ShardError(f"{store.location(shard.name)} is missing; {plan.remedy}")
    if listed[shard.name] != shard.size:
        raise ShardError(
            f"{store.location(shard.name)} has {listed[shard.name]} bytes, its record says {shard.size}; {plan.remedy}"
        )
    return shard
