"""Whole shards of a remote store on this machine's disk: fetched once, verified, bounded in size, shared by processes.

Owns the folder and its bound; what is read instead of a shard that is not there is `remote_shards`'. A file is named by
the SHA-256 that it has to have, so another version of a shard is another file. The invariant: a shard has its final
name only once its digest was right, and one that any process holds open is never evicted.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from sumizome.data.store import Store
from sumizome.errors import ShardError, StoreError

__all__ = ["CacheConfig", "RemoteShard", "ShardCache"]

_CHUNK = 16 * 2**20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class CacheConfig:
    """Where shards of a remote store are kept, and how many bytes of them."""

    folder: Path
    limit: int
    """Bytes of shards; 0 = none: every record is read from the store by itself."""


@dataclass(frozen=True)
class RemoteShard:
    """A shard as its unit's record describes it."""

    name: str
    """In its store."""
    sha256: str
    size: int
    """Bytes."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256) or self.size < 0:
            raise ShardError(f"{self.name}: its record holds no SHA-256 and size; prepare it again")


class ShardCache:
    """The folder of a machine's fetched shards, for any number of processes and data sets."""

    def __init__(self, config: CacheConfig) -> None:
        self._shards, self._locks = config.folder / "shards", config.folder / "locks"
        self._limit = config.limit
        try:
            for folder in (self._shards, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the cache {config.folder} cannot be written: {error.strerror}; give another") from error
        self._clear_leftovers()

    def path(self, shard: RemoteShard) -> Path:
        """Where the shard lies, if it does."""
        return self._shards / f"{shard.sha256}.safetensors"

    def holds(self, shard: RemoteShard) -> bool:
        """Whether a file of its name and size is there."""
        with contextlib.suppress(OSError):
            return self.path(shard).stat().st_size == shard.size
        return False

    def mark_used(self, descriptor: int) -> None:
        """Keeps an open shard from eviction until its descriptor closes, and makes it the most recently used."""
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.utime(descriptor)

    def verify(self, shard: RemoteShard) -> bool:
        """Whether the file's bytes are still those that were fetched; one that is damaged is removed."""
        with contextlib.suppress(OSError), self.path(shard).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                return True
        self.drop(shard)
        return False

    def drop(self, shard: RemoteShard) -> None:
        """Removes the file; who holds it open reads on."""
        self.path(shard).unlink(missing_ok=True)

    def fetch(self, store: Store, shard: RemoteShard, *, keep: Collection[str] = (), wait: bool = True) -> bool:
        """Brings a shard here, unless it is. False if there is no room, or, not `wait`, if another is fetching it.

        Room is made by evicting what was not used for longest, but nothing whose SHA-256 is in `keep`, nothing open.
        Raises: StoreError if it cannot be read; ShardError if what the store has is not what the record says.
        """
        with self._locked(shard.sha256[:3], wait=wait) as held:
            if not held:
                return False
            if self.holds(shard):
                return True
            partial = self._shards / f".{shard.sha256}.part"
            try:
                if not self._reserve(partial, shard.size, keep):
                    return False
                self._download(store, shard, partial)
                with self._locked("room"):  # whoever counts what is stored must not miss it between its two names
                    partial.replace(self.path(shard))
                return True
            except OSError as error:
                if error.errno in _NO_ROOM:
                    return False
                raise StoreError(f"the cache {self._shards} cannot be written: {error.strerror}") from error
            finally:
                partial.unlink(missing_ok=True)

    def _download(self, store: Store, shard: RemoteShard, partial: Path) -> None:
        for _ in range(2):  # a second time: the bytes may have changed on the way
            digest = hashlib.sha256()
            with partial.open("r+b") as file:
                for start in range(0, shard.size, _CHUNK):
                    chunk = store.read_range(shard.name, start, min(shard.size, start + _CHUNK))
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() == shard.sha256:
                return
        raise ShardError(f"{store.location(shard.name)} is damaged: its SHA-256 is not the one in its record")

    def _reserve(self, partial: Path, size: int, keep: Collection[str]) -> bool:
        """A file of `size` bytes at `partial`, within the limit and on the disk, or False."""
        with self._locked("room"):
            files = sorted(self._stored(), key=lambda file: file[1])
            used = sum(file[2] for file in files)
            candidates = (path for path, _, _ in files if path.suffix != ".part" and path.stem not in keep)
            while True:
                if used + size <= self._limit and self._allocated(partial, size):
                    return True
                if used + size > self._limit and size > self._limit:
                    return False
                freed = next((bytes_ for path in candidates if (bytes_ := self._evict(path))), 0)
                if not freed:
                    return False
                used -= freed

    def _allocated(self, partial: Path, size: int) -> bool:
        with partial.open("wb") as file:
            try:
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)
                return True
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
        partial.unlink()
        return False

    def _evict(self, path: Path) -> int:
        """Bytes freed; 0 if a process holds the shard open."""
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                return os.fstat(file.fileno()).st_size
        except (BlockingIOError, FileNotFoundError):
            return 0

    def _stored(self) -> Iterator[tuple[Path, float, int]]:
        """(path, last use, bytes) of the files, unfinished ones too."""
        with os.scandir(self._shards) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    yield Path(entry.path), status.st_mtime, status.st_size

    def _clear_leftovers(self) -> None:
        """Removes what killed processes were fetching; what a living one fetches is locked."""
        for path in self._shards.glob(".*.part"):
            with self._locked(path.name[1:4], wait=False) as held:
                if held:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Holds a lock among processes and threads; the kernel lets go of it however the process ends."""
        with (self._locks / name).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
