"""An S3-compatible object store through fsspec: the remote half of `store`.

Owns which failures are tried again, and what an error may say. The invariant: no credential is in a setting, a log or a
message; they come from the environment or the AWS configuration, as for every other AWS program. A PUT, and the end of
a multipart upload, put an object there whole or not at all; doing it twice is doing it once.
"""

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sumizome.data.retries import GaveUp, RetryPolicy, redacted
from sumizome.data.store import checked_name
from sumizome.errors import StoreError
from sumizome.files import write_atomically

__all__ = ["S3Store"]

Result = TypeVar("Result")

_CHUNK = 16 * 2**20
"""Bytes of a download that are asked for, and tried again, together."""
_CONNECTIONS = 64
_OPENING = threading.Lock()
_SLOWEST = 128 * 1024
"""Bytes a second: a transfer slower than this counts as dead. A server that is silent before "100 Continue" trips no
other timeout."""
_TRANSIENT_STATUS = (408, 429)
_TRANSIENT_CODES = ("RequestTimeout", "SlowDown", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")
"""S3's codes that are worth another attempt although their HTTP status says 400."""


class ShortRead(Exception):
    """Fewer bytes came than the server has: worth another attempt."""


class S3Store:
    """A prefix of a bucket. Threads may share it; a forked process opens its own connections."""

    def __init__(self, bucket: str, prefix: str, policy: RetryPolicy) -> None:
        self._root = f"{bucket}/{prefix}" if prefix else bucket
        self._policy = policy
        self.address = f"s3://{self._root}"

    @property
    def is_local(self) -> bool:
        return False

    def local_path(self, name: str = "") -> None:
        return None

    def location(self, name: str) -> str:
        return f"s3://{self._key(name)}"

    def read_bytes(self, name: str) -> bytes:
        return self.read_range(name, 0, self.size(name))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """As Store says, but fewer bytes than asked for are a failure: S3 tells the size beforehand."""
        if stop <= start:
            return b""

        def read() -> bytes:
            data: bytes = self._call(
                "_cat_file", self._key(name), start=start, end=stop, max_concurrency=1, size=stop - start
            )
            if len(data) != stop - start:
                raise ShortRead(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return self._tried("read", name, read)

    def write_bytes(self, name: str, data: bytes) -> None:
        self._tried("written", name, lambda: self._call("_pipe_file", self._key(name), data, size=len(data)))

    def put_file(self, source: Path, name: str) -> None:
        try:
            size = source.stat().st_size
        except OSError as error:
            raise StoreError(f"{source} cannot be read: {error.strerror}") from error
        self._tried("written", name, lambda: self._call("_put_file", str(source), self._key(name), size=size))

    def fetch(self, name: str, to: Path) -> None:
        size = self.size(name)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for start in range(0, size, _CHUNK):
                    file.write(self.read_range(name, start, min(size, start + _CHUNK)))

        write_atomically(to, write, failure=StoreError)

    def size(self, name: str) -> int:
        return int(self._tried("found", name, lambda: self._call("_info", self._key(name))["size"]))

    def exists(self, name: str) -> bool:
        def found() -> bool:
            try:
                return bool(self._call("_info", self._key(name))["type"] == "file")
            except FileNotFoundError:
                return False

        return self._tried("looked for", name, found)

    def list(self, prefix: str = "") -> dict[str, int]:
        folder = self._key(prefix) if prefix else self._root

        def found() -> dict[str, Any]:
            listed: dict[str, Any] = self._call("_find", folder, detail=True)
            return listed

        entries = self._tried("listed", prefix, found)
        names = {key[len(self._root) + 1 :]: int(entry["size"]) for key, entry in entries.items()}
        return {name: names[name] for name in sorted(names) if not PurePosixPath(name).name.startswith(".")}

    def remove(self, name: str) -> None:
        def removed() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._call("_rm_file", self._key(name))

        self._tried("removed", name, removed)

    def _key(self, name: str) -> str:
        return f"{self._root}/{checked_name(name)}" if name else self._root

    def _tried(self, verb: str, name: str, action: Callable[[], Result]) -> Result:
        """`action`, tried again while that may help.

        Raises: StoreError in one line. Its cause is not chained: a traceback would show what `redacted` takes out.
        """
        where = self.location(name)
        try:
            return self._policy.run(action, _is_transient)
        except GaveUp as gave_up:
            raise StoreError(
                f"{where} could not be {verb} in {gave_up} (last: {_in_words(gave_up.cause)}); check the network and "
                "the server, then run the command again: it goes on where it stopped"
            ) from None
        except FileNotFoundError:
            raise StoreError(f"{where} is missing, or its bucket is") from None
        except Exception as error:
            remedy = (
                "check the credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE) and their rights on the bucket"
                if isinstance(error, PermissionError) or "credentials" in str(error).lower()
                else "check the address, AWS_ENDPOINT_URL and the rights on the bucket"
            )
            raise StoreError(f"{where} could not be {verb} ({_in_words(error)}); {remedy}") from None

    def _call(self, method: str, *arguments: Any, size: int = 0, **options: Any) -> Any:
        """One attempt at a coroutine of the file system, cancelled when it takes longer than any live connection."""
        from fsspec.asyn import sync

        filesystem = self._filesystem()
        seconds = self._policy.connect_timeout_s + self._policy.read_timeout_s + size / _SLOWEST

        async def bounded() -> Any:
            return await asyncio.wait_for(getattr(filesystem, method)(*arguments, **options), seconds)

        return sync(filesystem.loop, bounded)

    def _filesystem(self) -> Any:
        environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        with _OPENING:
            return _open_filesystem(self._policy, os.getpid(), environment)


@functools.lru_cache(maxsize=4)
def _open_filesystem(policy: RetryPolicy, process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """fsspec's S3 without its caches, and without its own retries: `RetryPolicy` is the only one that counts.

    One a process and environment: opening takes a tenth of a second, and its connections are shared.
    """
    import s3fs

    filesystem = s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        default_cache_type="none",
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": policy.connect_timeout_s,
            "read_timeout": policy.read_timeout_s,
            "max_pool_connections": _CONNECTIONS,
            # Several S3-compatible servers get AWS's newer checksums wrong; our own digests verify what is read.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    filesystem.retries = 1
    return filesystem


def _is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed: a server's 5xx, 408 or 429, a timeout, a broken or short answer."""
    from aiohttp import ClientError as BrokenConnection
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from botocore.parsers import ResponseParserError

    chain = _chain(error)
    for each in chain:
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = response.get("Error", {}).get("Code")
            return status >= 500 or status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    broken = (ConnectionError, TimeoutError, ShortRead, BrokenConnection, HTTPClientError, IncompleteReadError)
    return any(isinstance(each, (*broken, ResponseParserError)) for each in chain)


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in found:
        found.append(step)
        step = step.__cause__ or step.__context__
    return found


def _in_words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return redacted(f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__)
