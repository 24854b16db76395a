"""Records out of shard files: where a latent lies in a safetensors file, and its bytes, wherever the file is.

Owns the files' layout and their descriptors; whether the bytes are right is the caller's to check. Reads with `pread`,
not through a memory map: a file that shrinks under a reader is a short read, an error that can be named, where a map
would end the process. The descriptors that stay open are bounded.
"""

import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sumizome.errors import ShardError

__all__ = ["LocalShards", "OpenShard", "RecordPlace", "ShardSource", "parse_layout"]

MAX_HEADER_BYTES = 1_000_000
"""A shard has one tensor a bucket, about 70 bytes of header each."""
_MAX_OPEN = 256
"""Descriptors a cache keeps; most systems allow a process 1024."""


@dataclass(frozen=True)
class RecordPlace:
    """A bucket's tensor in a shard: record k is `size` bytes from `start` + k·`size` on."""

    start: int
    count: int
    size: int
    shape: tuple[int, ...]
    """Of one record: (channels, height, width) in latents."""

    def span(self, row: int) -> tuple[int, int]:
        """(first byte, one past the last) of a record. Raises: IndexError if there is none."""
        if not 0 <= row < self.count:
            raise IndexError(f"row {row} of {self.count}")
        return self.start + row * self.size, self.start + (row + 1) * self.size


Layout = Mapping[str, RecordPlace]


def parse_layout(head: bytes, file_bytes: int) -> Layout:
    """Where the tensors of a shard lie, from its header; `head` is the file's beginning, header included.

    Raises: ValueError unless they are float16, of four axes, and fill the file without holes or overlaps.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8) or len(head) < 8 + length:
        raise ValueError("its header is damaged")
    header = json.loads(head[8 : 8 + length])
    header.pop("__metadata__", None)
    layout, reached = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (count, *shape), (start, stop) = entry["shape"], entry["data_offsets"]
        size = 2 * math.prod(shape)
        if entry["dtype"] != "F16" or len(shape) != 3 or start != reached or stop - start != count * size:
            raise ValueError(f"its tensor {name!r} is not where or what it should be")
        layout[name] = RecordPlace(8 + length + start, count, size, tuple(shape))
        reached = stop
    if 8 + length + reached != file_bytes:
        raise ValueError("its header does not describe all of it")
    return layout


@runtime_checkable
class ShardSource(Protocol):
    """Where the latents of a unit are read."""

    @property
    def parallel(self) -> bool:
        """Whether reading waits for a network, so that many records should be asked for at once."""
        ...

    def location(self, unit: int) -> str:
        """The shard's address, for messages."""
        ...

    def read(self, unit: int, tensor: str, row: int, into: memoryview) -> None:
        """Fills `into` with a record's bytes, unchecked. Raises: ShardError, StoreError."""
        ...

    def read_anew(self, unit: int, tensor: str, row: int, into: memoryview) -> bool:
        """Told that a record was wrong, reads it from what is no copy; False if there is none. Raises: as `read`."""
        ...

    def take_faults(self) -> list[str]:
        """What went wrong and was made good since this was last asked, in words."""
        ...


class OpenShard:
    """A shard file held open. Threads may share it; it closes when its last user lets go."""

    def __init__(self, path: Path, prepare: Callable[[int], None] | None = None) -> None:
        self._file = path.open("rb", buffering=0)
        if prepare is not None:
            prepare(self._file.fileno())
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(os.pread(self._file.fileno(), 8, 0), "little")
        head = os.pread(self._file.fileno(), 8 + min(length, MAX_HEADER_BYTES), 0)
        self.layout = parse_layout(head, size)

    def read(self, tensor: str, row: int, into: memoryview) -> None:
        """Raises: OSError, KeyError, IndexError, ValueError for a record that is not there in full."""
        place = self.layout[tensor]
        start, stop = place.span(row)
        if stop - start != len(into):
            raise ValueError(f"its records of {tensor} have {place.size} bytes, {len(into)} were expected")
        while start < stop:
            got = os.preadv(self._file.fileno(), [into[len(into) - (stop - start) :]], start)
            if not got:
                raise ValueError(f"it ends {stop - start} bytes too early")
            start += got


class OpenShards:
    """Shards held open by unit, the least recently used let go."""

    def __init__(self, open_one: Callable[[int], Any], limit: int = _MAX_OPEN) -> None:
        self._open_one, self._limit = open_one, limit
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, unit: int) -> Any:
        """The unit's shard; what `open_one` gives of it, which is held unless it is None."""
        with self._lock:
            if (found := self._held.get(unit)) is not None:
                self._held.move_to_end(unit)
                return found
        opened = self._open_one(unit)  # not under the lock: others read on
        if opened is not None:
            with self._lock:
                opened = self._held.setdefault(unit, opened)
                while len(self._held) > self._limit:
                    self._held.popitem(last=False)
        return opened

    def forget(self, unit: int) -> None:
        with self._lock:
            self._held.pop(unit, None)

    def __len__(self) -> int:
        return len(self._held)


class LocalShards:
    """The shards of a folder; `path_of` says where a unit's lies, `remedy` what mends one."""

    def __init__(self, path_of: Callable[[int], Path], remedy: str) -> None:
        self._path_of, self._remedy = path_of, remedy
        self._opened = OpenShards(lambda unit: OpenShard(path_of(unit)))

    @property
    def parallel(self) -> bool:
        return False

    def location(self, unit: int) -> str:
        return str(self._path_of(unit))

    def read(self, unit: int, tensor: str, row: int, into: memoryview) -> None:
        try:
            self._opened.get(unit).read(tensor, row, into)
        except (OSError, KeyError, TypeError, IndexError, ValueError, RecursionError) as error:
            raise ShardError(f"{self.location(unit)} cannot be read ({error}); {self._remedy}") from error

    def read_anew(self, unit: int, tensor: str, row: int, into: memoryview) -> bool:
        return False

    def take_faults(self) -> list[str]:
        return []
