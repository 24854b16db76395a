"""Files that are whole or not there: atomic writes, appended pieces, digests, sizes, locks. The one home of fsync,
rename and flock.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from sumizome.errors import DataError, SumizomeError

__all__ = [
    "AppendedFile",
    "files_committed",
    "flush_to_disk",
    "folder_committed",
    "give_usual_mode",
    "hold_lock",
    "readable_size",
    "sha256_of",
    "wait_for_lock",
    "write_atomically",
]


class AppendedFile:
    """A file that grows by whole pieces, also when the disk fills up within one."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError."""
        self._file = path.open("ab", buffering=0)  # a buffer would bring a lost piece back, late or in part

    def write(self, piece: bytes) -> None:
        """Appends a piece. Raises: OSError, with nothing appended."""
        before = os.fstat(self._file.fileno()).st_size
        try:
            while piece:  # a full disk takes a part before it refuses
                piece = piece[self._file.write(piece) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            raise

    def close(self) -> None:
        """Closes the file. Raises: OSError."""
        self._file.close()


def write_atomically(path: Path, write: Callable[[Path], object], *, failure: type[SumizomeError] = DataError) -> None:
    """Lets `write` make a temporary file beside `path`, then puts it in the place of `path` in one step.

    Raises: `failure`: what the operating system said.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        give_usual_mode(temporary)
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise failure(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_committed(path: Path, *, failure: type[SumizomeError] = DataError) -> Iterator[Path]:
    """A temporary folder beside `path`, flushed and renamed to `path` if nothing is raised; what stood there goes then.

    Raises: `failure`: what the operating system said.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            if written.is_file():
                give_usual_mode(written)
            flush_to_disk(written)
        if path.exists():  # a folder cannot be renamed over another one
            path.rename(replaced)
        temporary.rename(path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise failure(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        if replaced.is_symlink():
            replaced.unlink()  # what it led to stays
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def files_committed(*paths: Path, failure: type[SumizomeError] = DataError) -> Iterator[list[Path]]:
    """Temporary names for files that are read together; if nothing is raised, they take their places in this order.

    The last is the one that people open: what stands there leaves first, so that it is never seen beside a file that
    is not its own. If anything fails, everything is as it was.
    Raises: `failure`: what the operating system said.
    """
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    replaced = [path.with_name(f".{path.name}.{os.getpid()}.replaced") for path in paths]
    placed: list[Path] = []
    try:
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        for path in filter(Path.is_dir, paths):
            raise failure(f"cannot write {path}: it is a folder.")
        yield temporary
        for written in temporary:
            give_usual_mode(written)
            flush_to_disk(written)
        for path, aside in reversed(list(zip(paths, replaced, strict=True))):
            if path.exists():
                path.rename(aside)
        for written, path in zip(temporary, paths, strict=True):
            written.rename(path)
            placed.append(path)
        flush_to_disk(paths[-1].parent)
    except OSError as error:
        raise failure(f"cannot write {paths[-1]}: {error.strerror or error}.") from error
    finally:
        if len(placed) < len(paths):
            for path in placed:
                path.unlink()
            for path, aside in zip(paths, replaced, strict=True):
                if aside.exists():
                    aside.rename(path)
        for path in (*temporary, *replaced):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """fsync of a file or a folder: a rename must not reach the disk before what it names."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder; its renames are journalled
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_mode(path: Path) -> None:
    """Permissions as any new file has them: safetensors writes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def readable_size(count: int) -> str:
    """A number of bytes in the unit that suits it, of thousands: 7.11 GB, 20.4 MB, 12 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.{2 if count < 10 * size else 1 if count < 100 * size else 0}f} {unit}"
    return f"{count} bytes"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def hold_lock(path: Path, refusal: Callable[[str], SumizomeError]) -> Iterator[IO[str]]:
    """Holds the lock file for this process; the kernel lets go of it however the process ends.

    The file says who holds it. Raises: `refusal(holder)` when another process does.
    """
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise refusal(lock.read().strip() or "an unknown process") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        yield lock


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Holds the lock file, after waiting for whoever else does; the kernel lets go of it however a process ends."""
    with path.open("a+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
