"""The shards of a store that is not this machine's: read from the local cache, or record by record over the network.

A record whose shard is not here is read alone, by its byte range, so nothing waits for a whole shard; meanwhile shards
are fetched whole in the background, in no order, until all are here or the cache is full. Shuffled training touches
every shard equally often, so a data set larger than the cache would only evict itself: what is here stays, and the rest
goes on being read by ranges.
"""

import random
import threading
from collections.abc import Mapping

from sumizome.data.shard_cache import RemoteShard, ShardCache
from sumizome.data.shard_files import MAX_HEADER_BYTES, Layout, OpenShard, OpenShards, parse_layout
from sumizome.data.store import Store
from sumizome.errors import ShardError, StoreError

__all__ = ["RemoteShards"]

_HEAD = 16 * 1024
"""Bytes that hold a usual shard's header."""
_FILLERS = 2


class RemoteShards:
    """Reads records of a store's shards, by unit."""

    def __init__(
        self, store: Store, shards: Mapping[int, RemoteShard], cache: ShardCache | None, remedy: str, *, verify: bool
    ) -> None:
        self._store, self._shards, self._cache = store, shards, cache
        self._remedy, self._verify = remedy, verify
        self._keep = frozenset(shard.sha256 for shard in shards.values())
        self._opened = OpenShards(self._open)
        self._layouts: dict[int, Layout] = {}
        self._verified: set[int] = set()
        self._stop = threading.Event()
        self.faults: list[str] = []
        """Cached copies that were damaged and thrown away, shards that could not be fetched, in words."""

    @property
    def parallel(self) -> bool:
        return True

    def location(self, unit: int) -> str:
        return self._store.location(self._shards[unit].name)

    # ── Reading ──

    def read(self, unit: int, tensor: str, row: int, into: memoryview) -> None:
        """From the cached copy, else by range. A copy that cannot be read is thrown away and counted."""
        try:
            if (opened := self._opened.get(unit)) is not None:
                opened.read(tensor, row, into)
                return
        except (OSError, KeyError, TypeError, IndexError, ValueError, RecursionError) as error:
            self._throw_away(unit, str(error))
        self._read_range(unit, tensor, row, into)

    def _read_range(self, unit: int, tensor: str, row: int, into: memoryview) -> None:
        try:
            place = self._layout(unit)[tensor]
            start, stop = place.span(row)
        except (KeyError, TypeError, IndexError, ValueError, RecursionError) as error:
            raise ShardError(f"{self.location(unit)} is damaged ({error}); {self._remedy}") from error
        if stop - start != len(into):
            raise ShardError(f"{self.location(unit)} is damaged: records of {place.size} bytes; {self._remedy}")
        into[:] = self._store.read_range(self._shards[unit].name, start, stop)

    def read_anew(self, unit: int, tensor: str, row: int, into: memoryview) -> bool:
        """The cached copy goes, if there is one, and the store is asked: not the cache, which others fill meanwhile."""
        if self._cache is not None and self._cache.holds(self._shards[unit]):
            self._throw_away(unit, "a record's CRC-32 is wrong")
        else:
            self._opened.forget(unit)  # another thread threw the copy away, and a third may have opened it before
        self._read_range(unit, tensor, row, into)
        return True

    def take_faults(self) -> list[str]:
        return [self.faults.pop(0) for _ in range(len(self.faults))]  # others may append meanwhile

    def _open(self, unit: int) -> OpenShard | None:
        cache, shard = self._cache, self._shards[unit]
        if cache is None or not cache.holds(shard):
            return None
        if self._verify and unit not in self._verified:
            if not cache.verify(shard):
                self.faults.append(f"{cache.path(shard)} was damaged and is read anew from {self.location(unit)}")
                return None
            self._verified.add(unit)
        try:
            return OpenShard(cache.path(shard), cache.mark_used)
        except FileNotFoundError:  # evicted in this moment
            return None

    def _throw_away(self, unit: int, why: str) -> None:
        assert self._cache is not None
        shard = self._shards[unit]
        self.faults.append(f"{self._cache.path(shard)} was damaged ({why}) and is read anew from {self.location(unit)}")
        self._opened.forget(unit)
        self._verified.discard(unit)
        self._cache.drop(shard)

    def _layout(self, unit: int) -> Layout:
        if unit not in self._layouts:
            shard = self._shards[unit]
            head = self._store.read_range(shard.name, 0, min(_HEAD, shard.size))
            length = int.from_bytes(head[:8], "little")
            if _HEAD < 8 + length <= 8 + MAX_HEADER_BYTES <= shard.size:
                head += self._store.read_range(shard.name, _HEAD, 8 + length)
            self._layouts[unit] = parse_layout(head, shard.size)
        return self._layouts[unit]

    # ── Fetching whole shards ──

    def fetch(self, unit: int, *, wait: bool = True) -> bool:
        """Whether the shard is, or now is, in the cache. Raises: ShardError, StoreError."""
        if self._cache is None:
            return False
        try:
            return self._cache.fetch(self._store, self._shards[unit], keep=self._keep, wait=wait)
        except ShardError as error:
            raise ShardError(f"{error}; {self._remedy}") from error

    def fetch_verified(self, unit: int) -> None:
        """Brings the shard here and verifies it by its SHA-256; one that has no room stays checked record by record.

        Raises: ShardError if the store's is damaged, StoreError if it cannot be read.
        """
        if self.fetch(unit) and self._cache is not None:
            if not self._cache.verify(self._shards[unit]):
                self.faults.append(f"{self._cache.path(self._shards[unit])} was damaged and was fetched again")
                self.fetch(unit)
            self._verified.add(unit)

    def fill(self) -> None:
        """Begins to fetch what is not here, in the background, until the cache is full."""
        units = list(self._shards)
        # Each process its own order: several of them on a machine then fetch different shards, each once.
        random.SystemRandom().shuffle(units)
        for number in range(_FILLERS):
            part = units[number::_FILLERS]
            threading.Thread(target=self._fill, args=(part,), name="shard cache", daemon=True).start()

    def stop(self) -> None:
        """Ends the background fetching after the shards at hand."""
        self._stop.set()

    def _fill(self, units: list[int]) -> None:
        for unit in units:
            if self._stop.is_set():
                return
            try:
                self.fetch(unit, wait=False)
            except (ShardError, StoreError) as error:
                # Not this thread's to raise: whoever reads a record of that shard meets it, or need not.
                self.faults.append(str(error))
                if isinstance(error, StoreError):
                    return
