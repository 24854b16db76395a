"""Leases: who is at work on what, among processes that share a folder, on one machine or many.

Owns the lease files and their heartbeat. A lease only saves work: what it guards must come out the same however often
it is done, since no lease on a shared file system is certain. The invariant: a lease whose holder died is free, at
once where the kernel can tell (flock, same machine), else when its heartbeat has not moved for `STALE_SECONDS` of the
watcher's own monotonic clock. Clocks are never compared, so that one which jumps steals nothing.
"""

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sumizome.errors import DataError

__all__ = ["Lease", "Leases"]

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""Longer than a network file system's caches and a machine's hiccups."""


@lru_cache(maxsize=1)
def _machine() -> str:
    """This machine since it was started; after a restart, its old leases are a dead machine's."""
    with contextlib.suppress(OSError):
        return f"{os.uname().nodename} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return os.uname().nodename


@dataclass(eq=False)
class Lease:
    """A lease that this process holds, until `release` or its end."""

    path: Path
    token: str
    _descriptor: int
    _beat: int = 0

    def write(self) -> None:
        """Beats."""
        text = f"{_machine()}\n{os.getpid()}\n{self.token}\n{self._beat:012d}\n"
        self._beat += 1
        os.pwrite(self._descriptor, text.encode(), 0)

    def is_held(self) -> bool:
        """Whether it is still this one's: false once another has taken it for dead."""
        with contextlib.suppress(OSError):
            return _read(self.path)[2:3] == [self.token]
        return False


def _read(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


class Leases:
    """The leases in one folder. A context: one thread beats for all that are held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, Lease] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        """name → (content, monotonic seconds when it was first seen so) of leases of other machines."""
        self._alive: set[str] = set()
        """Those that were seen to beat."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="leases", daemon=True)

    def __enter__(self) -> "Leases":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write {self.folder}: {error.strerror}.") from error
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beating.join()
        for name in list(self._held):
            self.release(name)
        with contextlib.suppress(OSError):  # others may be at work here
            self.folder.rmdir()

    def take(self, name: str) -> Lease | None:
        """The lease of this name; None while another process, or another `Leases` of this one, holds it.

        Raises: DataError if the folder cannot be written.
        """
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # the last to leave it removed it
            descriptor, is_new = _open(path)
        except FileNotFoundError:
            return None  # just released: the next look will find it free
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}.") from error
        if not (_lock_file(descriptor, path, wait=is_new) and (is_new or self._is_dead(name, descriptor))):
            os.close(descriptor)
            return None
        lease = Lease(path, secrets.token_hex(8), descriptor)
        try:
            lease.write()
        except OSError as error:
            path.unlink()
            os.close(descriptor)
            raise DataError(f"cannot write {path}: {error.strerror}.") from error
        if not lease.is_held():  # a machine without common locks was as quick
            os.close(descriptor)
            return None
        with self._lock:
            self._held[name] = lease
        return lease

    def release(self, name: str) -> None:
        """Gives the lease back."""
        with self._lock:
            lease = self._held.pop(name, None)
        if lease is None:
            return
        if lease.is_held():
            with contextlib.suppress(OSError):
                lease.path.unlink()
        os.close(lease._descriptor)

    @contextlib.contextmanager
    def holding(self, name: str, *, poll_seconds: float = 0.2) -> Iterator[Lease]:
        """The lease of this name, waited for."""
        while (lease := self.take(name)) is None:
            time.sleep(poll_seconds)
        try:
            yield lease
        finally:
            self.release(name)

    def owns(self, name: str) -> bool:
        """Whether the lease of this name was taken here and is still held."""
        lease = self._held.get(name)
        return lease is not None and lease.is_held()

    def remove_dead(self) -> None:
        """Removes the leases of processes that are known to be dead."""
        for path in self.folder.iterdir():
            if path.name not in self._held and self.take(path.name) is not None:
                self.release(path.name)

    def holder(self) -> str | None:
        """Some other process that is alive and holds a lease here, in words. Watches other machines' for a minute."""
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if path.name in self._held:
                continue
            while (lease := self.take(path.name)) is None and path.exists():
                with contextlib.suppress(OSError):
                    machine, process = [*_read(path), "", ""][:2]
                    host = machine.split(" ")[0] or "an unknown machine"
                    if machine == _machine() or path.name in self._alive:
                        return f"process {process} on {host}"
                time.sleep(0.2)
            if lease is not None:
                self.release(path.name)
        return None

    def _is_dead(self, name: str, descriptor: int) -> bool:
        """Whether the holder of a file that could be locked is gone."""
        with contextlib.suppress(OSError):
            content = os.pread(descriptor, 1000, 0).decode(errors="replace")
            if content.split("\n")[0] == _machine():
                return True  # it held the lock, so the kernel has let go of it
            seen, since = self._seen.setdefault(name, (content, time.monotonic()))
            if seen != content:
                self._seen[name] = (content, time.monotonic())
                self._alive.add(name)
            # Between creating the file and writing to it are microseconds.
            patience = STALE_SECONDS if content else min(2.0, STALE_SECONDS)
            return seen == content and time.monotonic() - since > patience
        return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock:
                held = list(self._held.values())
            for lease in held:
                with contextlib.suppress(OSError):  # a disk that is full or away costs the beat, not the work
                    lease.write()


def _open(path: Path) -> tuple[int, bool]:
    """(descriptor, whether the file is new): creation is exclusive on every file system."""
    try:
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), True
    except FileExistsError:
        return os.open(path, os.O_RDWR), False


def _lock_file(descriptor: int, path: Path, *, wait: bool) -> bool:
    """Locks the file that is still the one at `path`; false if another has it. `wait` for one who only looks at it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a file system without locks: creation and heartbeat decide alone
