"""Where files lie: a local folder or an S3-compatible object store, behind one small interface.

Owns addresses, names and the local half; `s3_store` is the other. Knows nothing of shards or checkpoints. The
invariant: an object is there whole or not at all, and a name never leads out of its store.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from sumizome.data.retries import RetryPolicy
from sumizome.errors import ConfigError, StoreError
from sumizome.files import write_atomically

__all__ = ["LocalStore", "Store", "as_address", "checked_name", "is_remote", "open_store"]

_CHUNK = 16 * 2**20


@runtime_checkable
class Store(Protocol):
    """A place with named objects. A name is relative, with "/" between its parts; all may raise StoreError."""

    address: str
    """As a user writes it: a path, or s3://bucket/prefix."""

    @property
    def is_local(self) -> bool:
        """Whether `local_path` gives paths."""
        ...

    def local_path(self, name: str = "") -> Path | None:
        """The object's own file, if the store is a folder of this machine."""
        ...

    def location(self, name: str) -> str:
        """The object's address, for messages."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """The whole object."""
        ...

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start…stop of the object; fewer only where it ends."""
        ...

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes the object, whole or not at all; replaces what was there."""
        ...

    def put_file(self, source: Path, name: str) -> None:
        """Copies a local file into the store, whole or not at all."""
        ...

    def fetch(self, name: str, to: Path) -> None:
        """Copies the object to a local file, whole or not at all. Its bytes are the caller's to verify."""
        ...

    def size(self, name: str) -> int:
        """Bytes of the object."""
        ...

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str = "") -> dict[str, int]:
        """name → bytes of the objects in the folder `prefix` and below, by name. Hidden files are not told."""
        ...

    def remove(self, name: str) -> None:
        """Removes the object; one that is not there is no error."""
        ...


def open_store(address: str | Path, policy: RetryPolicy | None = None) -> Store:
    """The store at a path or "s3://bucket/prefix". Nothing is read yet.

    AWS_ENDPOINT_URL (or the AWS configuration) names another S3-compatible server.
    Raises: ConfigError for another kind of address, one that carries credentials, or a missing `sumizome[s3]`.
    """
    address = as_address(address)
    if not is_remote(address):
        return LocalStore(Path(address))
    scheme, _, rest = address.partition("://")
    if scheme != "s3":
        raise ConfigError(f"{scheme}:// is no store that is known here; give a folder or s3://bucket/prefix")
    if "@" in rest or "?" in rest:
        raise ConfigError(
            "an s3:// address must not carry credentials or a query; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(or AWS_PROFILE) in the environment, and give s3://bucket/prefix"
        )
    bucket, _, prefix = rest.partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise ConfigError(f"{address}: no S3 bucket is called '{bucket}'; give s3://bucket/prefix")
    prefix = prefix.strip("/")
    if prefix:
        checked_name(prefix)
    try:
        import s3fs  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{address}: S3 needs s3fs; install it with `pip install 'sumizome[s3]'`") from error
    from sumizome.data.s3_store import S3Store

    return S3Store(bucket, prefix, policy or RetryPolicy())


def as_address(value: str | Path) -> str:
    """A path or URL as text; a URL that went through `Path` gets its second slash back."""
    return re.sub(r"^([a-z][a-z0-9+]+):/+(?=[^/])", r"\1://", str(value))


def is_remote(address: str | Path) -> bool:
    """Whether an address is a URL rather than a path of this machine."""
    return re.match(r"[a-z][a-z0-9+]+:/", str(address)) is not None


def checked_name(name: str) -> str:
    """Raises: ValueError for a name that could lead out of the store."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or re.search(r"[\\\x00-\x1f]", name):
        raise ValueError(f"{name!r} is no name of a store")
    return name


# ── A folder ──


class LocalStore:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.address = str(root)

    @property
    def is_local(self) -> bool:
        return True

    def local_path(self, name: str = "") -> Path:
        return self.root / checked_name(name) if name else self.root

    def location(self, name: str) -> str:
        return str(self.local_path(name))

    def read_bytes(self, name: str) -> bytes:
        with self._reading(name) as path:
            return path.read_bytes()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        with self._reading(name) as path, path.open("rb") as file:
            file.seek(start)
            return file.read(max(0, stop - start))

    def write_bytes(self, name: str, data: bytes) -> None:
        write_atomically(self.local_path(name), lambda temporary: temporary.write_bytes(data), failure=StoreError)

    def put_file(self, source: Path, name: str) -> None:
        _copy(source, self.local_path(name))

    def fetch(self, name: str, to: Path) -> None:
        self.size(name)  # what is missing is the store's fault, not that of `to`
        _copy(self.local_path(name), to)

    def size(self, name: str) -> int:
        with self._reading(name) as path:
            return path.stat().st_size

    def exists(self, name: str) -> bool:
        return self.local_path(name).is_file()

    def list(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for folder, _, files in os.walk(self.local_path(prefix)):
            for name in files:
                path = Path(folder, name)
                if not name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                        found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

    def remove(self, name: str) -> None:
        try:
            self.local_path(name).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.location(name)} cannot be removed: {error.strerror}") from error

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        path = self.local_path(name)
        try:
            yield path
        except FileNotFoundError:
            raise StoreError(f"{path} is missing") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def _copy(source: Path, to: Path) -> None:
    def write(temporary: Path) -> None:
        with source.open("rb") as read, temporary.open("wb") as written:
            while chunk := read.read(_CHUNK):
                written.write(chunk)

    write_atomically(to, write, failure=StoreError)
