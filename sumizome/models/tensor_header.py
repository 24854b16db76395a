"""The header of a safetensors file, read and checked without torch and without touching the data.

Owns the format's rules: every tensor has a known dtype, the bytes that its shape needs, and its own place; the places
fill the file without holes. A gigabyte model is checked in milliseconds. `tensor_file` reads the tensors themselves.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sumizome.errors import ModelError

__all__ = ["DTYPE_BYTES", "MAX_HEADER_BYTES", "TensorEntry", "TensorHeader", "read_header", "refuse_pickle"]

MAX_HEADER_BYTES = 10_000_000
"""SDXL's header is 0.4 MB. The format allows 100 MB, which a file of that size makes a parser chew for long."""
_PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
}
"""Bytes of one element, by the format's names of dtypes."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's row in the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    stop: int

    @property
    def elements(self) -> int:
        """Numbers in the tensor; 0 for the empty tensors that serve as marks."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of itself before its data begins."""

    path: Path
    file_bytes: int
    data_start: int
    """Offset of the first tensor in the file."""
    tensors: dict[str, TensorEntry]
    """In the order of their places in the file."""
    metadata: dict[str, str]


def read_header(path: Path) -> TensorHeader:
    """The header of the file at `path`, every entry checked.

    Raises: ModelError for a file that is missing, pickled, empty, truncated, or whose header is damaged, absurdly
    large, of an unknown dtype, or gives tensors places that overlap, leave holes or do not fit their shapes.
    """
    refuse_pickle(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _check_length(path, size, length, start)
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    header = _parsed(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: its __metadata__ is no table of strings, so it is damaged. Download it again.")
    entries = {name: _entry(path, name, found) for name, found in header.items()}
    tensors = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_places(path, tensors, size - 8 - length)
    return TensorHeader(path, size, 8 + length, tensors, metadata)


def refuse_pickle(path: Path) -> None:
    """Raises: ModelError if `path` is named like a pickled checkpoint, which can run code when it is opened."""
    if path.suffix.lower() in _PICKLED:
        raise ModelError(f"{path} is a pickled checkpoint: {_NEVER}")


_NEVER = "it can run code when opened and is never read here. Use the model's .safetensors version."
_NO_MODELS = (
    ((b"PK\x03\x04",), f"is a zip archive, as pickled checkpoints are: {_NEVER}"),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), f"is a pickled checkpoint under another name: {_NEVER}"),
    (
        (b"<",),
        "is a web page, most likely the error page of a download. Download the model again, logged in if need be.",
    ),
    ((b"version ",), "is a Git LFS pointer, not the model itself: run `git lfs pull` in its folder."),
    ((b"GGUF",), "is a GGUF file, whose quantised weights are not read here. Use the model's .safetensors version."),
)


def _check_length(path: Path, size: int, length: int, start: bytes) -> None:
    too_long = length > size - 8 or length > MAX_HEADER_BYTES
    for signs, words in _NO_MODELS:
        if too_long and start.startswith(signs):
            raise ModelError(f"{path} {words}")
    if size < 8 or length > size - 8:
        found = "is empty" if size == 0 else f"has {size:,} bytes, less than its header says"
        raise ModelError(f"{path} {found}: it is no safetensors file or was cut off. Download or copy it again.")
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{path}: its header has {length:,} bytes, more than {MAX_HEADER_BYTES:,}; SDXL's has 400,000. "
            "It is no model file of this family."
        )


def _parsed(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ModelError(
            f"{path}: its header is nested deeper than any model's: damaged, or made to mislead. Download it again."
        ) from None
    except ValueError as error:
        raise ModelError(
            f"{path} is damaged or no safetensors file (header: {error}). Download or copy it again."
        ) from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} is no safetensors file: its header is no JSON object. Download or copy it again.")
    return header


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands in it twice")
        found[name] = value
    return found


def _entry(path: Path, name: str, found: Any) -> TensorEntry:
    try:
        dtype, shape, (start, stop) = found["dtype"], tuple(found["shape"]), found["data_offsets"]
        well_formed = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
        # A dtype may be any JSON here, and names are printed: control characters would drive the terminal.
        well_formed = well_formed and isinstance(dtype, str) and name.isprintable()
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise ModelError(f"{path}: the header's entry for {name!r} is malformed. Download or copy it again.")
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"{path}: {name} has dtype {dtype!r}, which safetensors does not know. Download it again.")
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if stop - start != needed:
        raise ModelError(
            f"{path}: {name} is {dtype} {list(shape)}, which takes {needed:,} bytes, but the header gives it "
            f"{stop - start:,}: wrong dtype or shape. Download or copy it again."
        )
    return TensorEntry(dtype, shape, start, stop)


def _check_places(path: Path, tensors: dict[str, TensorEntry], data_bytes: int) -> None:
    """Raises: ModelError unless the tensors, in order, fill the data from its first byte to its last."""
    reached = 0
    for name, entry in tensors.items():
        if entry.start != reached:
            how = "overlaps the tensor before it" if entry.start < reached else "leaves a hole before it"
            raise ModelError(
                f"{path}: {name} {how} (starts at byte {entry.start:,}, expected {reached:,}). "
                "The file is damaged or made to mislead: download it again."
            )
        reached = entry.stop
    if reached != data_bytes:
        what = "was cut off" if reached > data_bytes else "has bytes that belong to no tensor"
        raise ModelError(
            f"{path} {what}: its header describes {reached:,} bytes of data, the file has {data_bytes:,}. "
            "Download or copy it again."
        )
