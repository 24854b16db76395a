"""A safetensors file written tensor by tensor, and read back: memory is one tensor, whatever the file's size.

Owns the order of the data (wider dtypes first, so that every tensor is aligned), the header, the hash of the data and
the check of what reached the disk. It writes to the path that it is given; whoever calls it makes that one temporary.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sumizome.errors import ExportError, ModelError
from sumizome.models.tensor_file import open_tensor_file
from sumizome.models.tensor_header import read_header

__all__ = ["DATA_HASH", "FORMAT_DTYPES", "TensorJob", "job_of", "safetensors_name", "tensor_bytes", "write_tensors"]

DATA_HASH = "modelspec.hash_sha256"
"""The metadata key that gets SHA-256 of the data: ModelSpec's."""

FORMAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes that are written, by their names in the format."""
_NAMES = {dtype: name for name, dtype in FORMAT_DTYPES.items()}


@dataclass(frozen=True)
class TensorJob:
    """One tensor to write: what the header says of it, and how to make it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def job_of(name: str, tensor: Tensor) -> TensorJob:
    """The job of a tensor that is there already."""
    return TensorJob(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def safetensors_name(dtype: torch.dtype) -> str:
    """The format's name of a dtype. Raises: ExportError for one that is not written here."""
    if dtype not in _NAMES:
        raise ExportError(f"weights of {dtype} are not written here: give a dtype of fp32, fp16 or bf16.")
    return _NAMES[dtype]


def tensor_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes as they stand in a file."""
    return tensor.contiguous().flatten().view(torch.uint8)


def write_tensors(path: Path, jobs: Iterable[TensorJob], metadata: Mapping[str, str]) -> dict[str, str]:
    """Writes the file at `path` and reads it back; returns the metadata as written.

    The format wants the header first, so shapes are known before any tensor is made; a `DATA_HASH` among the metadata
    is filled in at the end, in its own place, because a hash is always of the same length.

    Raises: ExportError unless header, metadata and every byte read back as they were written.
    """
    jobs = sorted(jobs, key=lambda job: -job.dtype.itemsize)
    # A file's name may have got into it, and those need not be UTF-8, as a header must.
    metadata = {key: value.encode(errors="replace").decode() for key, value in metadata.items()}
    metadata |= {DATA_HASH: f"0x{0:064x}"} if DATA_HASH in metadata else {}
    digests, whole = {}, hashlib.sha256()
    with path.open("wb") as file:
        file.write(_header(jobs, metadata))
        for job in jobs:
            data = tensor_bytes(_made(job)).numpy().data
            file.write(data)
            whole.update(data)
            digests[job.name] = hashlib.sha256(data).digest()
        if DATA_HASH in metadata:
            metadata[DATA_HASH] = f"0x{whole.hexdigest()}"
            file.seek(0)
            file.write(_header(jobs, metadata))
    try:
        _verify(path, jobs, metadata, digests)
    except ModelError as error:
        raise ExportError(f"what was written did not read back: {error}") from error
    return metadata


def _made(job: TensorJob) -> Tensor:
    tensor = job.make()
    if (tensor.dtype, tuple(tensor.shape)) != (job.dtype, job.shape):
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ExportError(f"{job.name} is {found}, expected {job.dtype} {job.shape}: the source is damaged.")
    return tensor


def _header(jobs: list[TensorJob], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    reached = 0
    for job in jobs:
        stop = reached + job.dtype.itemsize * math.prod(job.shape)
        dtype = safetensors_name(job.dtype)
        header[job.name] = {"dtype": dtype, "shape": list(job.shape), "data_offsets": [reached, stop]}
        reached = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data begins on a multiple of eight bytes
    return len(raw).to_bytes(8, "little") + raw


def _verify(path: Path, jobs: list[TensorJob], metadata: Mapping[str, str], digests: Mapping[str, bytes]) -> None:
    header, file = read_header(path), open_tensor_file(path)
    found = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    if found != {job.name: (safetensors_name(job.dtype), job.shape) for job in jobs} or header.metadata != metadata:
        raise ExportError(f"{path}: the header did not read back as it was written.")
    for name, digest in digests.items():
        if hashlib.sha256(tensor_bytes(file.read(name)).numpy().data).digest() != digest:
            raise ExportError(f"{path}: {name} did not read back bit for bit. Check the disk and try again.")
