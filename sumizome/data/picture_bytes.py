"""A picture's bytes, from a file or a stretch of a tar: read once, whole, and the ones that are expected.

Owns the system's errors as reasons, the limit of size and the digests. Knows nothing of what the bytes show. Invariant:
the bytes that are hashed are the bytes that are returned; pipes, devices and files that change meanwhile are refused.
"""

import errno
import hashlib
import os
import stat
from pathlib import Path

from sumizome.data.byte_range import ByteRange
from sumizome.data.image_rejected import ImageRejected

__all__ = ["MAX_FILE_BYTES", "read_bytes"]

MAX_FILE_BYTES = 128 * 2**20


def read_bytes(path: Path | ByteRange, *, sha256: str | None = None, md5: str | None = None) -> tuple[bytes, str]:
    """(the file's bytes, their SHA-256 in hex), of the file that is expected.

    Raises: ImageRejected.
    """
    data = _read_file(path)
    digest = hashlib.sha256(data).hexdigest()
    if md5 is not None and (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != md5:
        raise ImageRejected("md5_mismatch", f"expected the file that its record describes (md5 {md5}), found {found}.")
    if sha256 is not None and digest != sha256:
        raise ImageRejected(
            "changed",
            f"expected {path} as it was ingested (sha256 {sha256[:16]}…), found {digest[:16]}…: "
            "run `sumizome ingest` again.",
        )
    return data, digest


_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""A pipe without a writer would hold a blocking open for ever."""

_ERRNO_REASONS = {
    errno.ENOENT: "missing",
    errno.EACCES: "no_permission",
    errno.EPERM: "no_permission",
    errno.EIO: "read_error",
}


def _read_file(path: Path | ByteRange) -> bytes:
    if isinstance(path, ByteRange):
        return _read_range(path)
    try:
        _check_file(path.stat())  # before it is opened: opening a device can have effects
        descriptor = os.open(path, _OPEN_FLAGS)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            _check_file(status)
            data = file.read(status.st_size + 1)  # one more shows a file that grows, and is all that it costs
    except OSError as error:
        reason = _ERRNO_REASONS.get(error.errno or 0, "unreadable")
        raise ImageRejected(reason, f"expected a readable file, found {error.strerror}.") from error
    except ValueError as error:  # a NUL in the name
        raise ImageRejected("unreadable", f"expected a readable file, found {error}.") from error
    if len(data) != status.st_size:
        raise ImageRejected(
            "unstable", f"expected a file at rest, found {status.st_size} bytes, then more or fewer: try again later."
        )
    return data


def _check_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageRejected("not_a_file", "expected a regular file, found a folder, a pipe or a device.")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageRejected(
            "file_too_large", f"expected at most {MAX_FILE_BYTES >> 20} MB, found {status.st_size >> 20} MB."
        )


def _read_range(place: ByteRange) -> bytes:
    if place.size > MAX_FILE_BYTES:
        raise ImageRejected(
            "file_too_large", f"expected at most {MAX_FILE_BYTES >> 20} MB, found {place.size >> 20} MB."
        )
    try:
        data = place.read()
    except OSError as error:
        reason = _ERRNO_REASONS.get(error.errno or 0, "unreadable")
        raise ImageRejected(reason, f"expected a readable file, found {error.strerror}.") from error
    if len(data) < place.size:
        raise ImageRejected(
            "changed", f"expected {place} as it was ingested, found the archive shorter: run `sumizome ingest` again."
        )
    return data
