"""Every weight of a file read once: NaN, infinity, what float16 cannot hold, and the hash of the data. No torch.

Owns the bit patterns of the floating formats that numpy does not know (bfloat16, float8). Memory stays at one piece
of 64 MB, whatever the file's size.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sumizome.errors import ModelError
from sumizome.models.tensor_header import DTYPE_BYTES, TensorEntry, TensorHeader

__all__ = ["FLOAT16_LIMIT", "WeightScan", "scan_weights"]

FLOAT16_LIMIT = 65520.0
"""The least magnitude that rounds to infinity in float16, whose largest number is 65504."""
_PIECE_BYTES = 64_000_000


@dataclass(frozen=True)
class WeightScan:
    """What reading every weight showed."""

    not_finite: dict[str, int]
    """NaN and infinite numbers by tensor, where there are any; of several files "network/tensor"."""
    too_large: dict[str, float]
    """The largest magnitude of each tensor that overflows float16."""
    all_zero: tuple[str, ...]
    """Matrices and convolutions that hold nothing but zeros."""
    data_sha256: dict[str, str]
    """SHA-256 hex of each file's data, the header excluded, as ModelSpec's hash_sha256 has it; by file name, of several
    "network/file"."""
    bytes_read: int


def scan_weights(headers: Iterable[TensorHeader]) -> WeightScan:
    """Reads all files from first to last byte.

    Raises: ModelError if a file cannot be read or has become shorter since its header was read.
    """
    not_finite: dict[str, int] = {}
    too_large: dict[str, float] = {}
    all_zero, digests, total = [], {}, 0
    headers = list(headers)
    for header in headers:
        digest = hashlib.sha256()
        # A folder's networks share names, of tensors and of files.
        part = f"{header.path.parent.name}/" if len(headers) > 1 else ""
        for key, entry, pieces in _tensors(header):
            name = part + key
            bad, largest = 0, 0.0
            for piece in pieces:
                digest.update(piece)
                found_bad, found_largest = _READERS.get(entry.dtype, _integers)(piece)
                bad, largest = bad + found_bad, max(largest, found_largest)
            total += entry.stop - entry.start
            if bad:
                not_finite[name] = bad
            if largest >= FLOAT16_LIMIT and entry.dtype in _READERS:
                too_large[name] = largest
            if not largest and not bad and len(entry.shape) > 1 and entry.elements:
                all_zero.append(name)
        digests[part + header.path.name] = digest.hexdigest()
    return WeightScan(not_finite, too_large, tuple(all_zero), digests, total)


def _tensors(header: TensorHeader) -> Iterator[tuple[str, TensorEntry, Iterator[bytes]]]:
    """Each tensor with its bytes in pieces, in the order of the file; every piece must be taken."""
    try:
        with header.path.open("rb") as file:
            file.seek(header.data_start)
            for name, entry in header.tensors.items():
                yield name, entry, _pieces(header, file.read, entry.stop - entry.start)
    except OSError as error:
        raise ModelError(f"{header.path} cannot be read: {error.strerror}.") from error


def _pieces(header: TensorHeader, read: Callable[[int], bytes], remaining: int) -> Iterator[bytes]:
    while remaining:
        piece = read(wanted := min(remaining, _PIECE_BYTES))
        if len(piece) < wanted:
            raise ModelError(f"{header.path} ended while it was read. Is something still writing it?")
        remaining -= len(piece)
        yield piece


# --- (numbers that are not finite, largest finite magnitude) of a piece, by dtype ------------------------------------


def _native_floats(dtype: str) -> Callable[[bytes], tuple[int, float]]:
    def read(piece: bytes) -> tuple[int, float]:
        numbers = np.abs(np.frombuffer(piece, dtype))
        finite = np.isfinite(numbers)
        bad = int(numbers.size - np.count_nonzero(finite))
        return bad, float(numbers.max(initial=0, where=finite))

    return read


def _bfloat16(piece: bytes) -> tuple[int, float]:
    codes: NDArray[np.uint16] = np.frombuffer(piece, "<u2") & np.uint16(0x7FFF)
    finite = codes < 0x7F80  # magnitudes sort as their codes do; from here on infinity and NaN
    largest = np.array([codes.max(initial=0, where=finite)], np.uint32) << 16
    return int(codes.size - np.count_nonzero(finite)), float(largest.view(np.float32)[0])


def _float8(first_bad: int, mantissa_bits: int, bias: int) -> Callable[[bytes], tuple[int, float]]:
    def value(code: int) -> float:
        exponent, mantissa = code >> mantissa_bits, (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        return (1 + mantissa) * 2.0 ** (exponent - bias) if exponent else mantissa * 2.0 ** (1 - bias)

    def read(piece: bytes) -> tuple[int, float]:
        codes: NDArray[np.uint8] = np.frombuffer(piece, np.uint8) & np.uint8(0x7F)
        finite = codes < first_bad
        return int(codes.size - np.count_nonzero(finite)), value(int(codes.max(initial=0, where=finite)))

    return read


def _integers(piece: bytes) -> tuple[int, float]:
    return 0, float(any(piece))


_READERS: dict[str, Callable[[bytes], tuple[int, float]]] = {
    "F64": _native_floats("<f8"),
    "F32": _native_floats("<f4"),
    "F16": _native_floats("<f2"),
    "BF16": _bfloat16,
    "F8_E4M3": _float8(first_bad=0x7F, mantissa_bits=3, bias=7),
    "F8_E5M2": _float8(first_bad=0x7C, mantissa_bits=2, bias=15),
}
assert set(_READERS) <= set(DTYPE_BYTES)
