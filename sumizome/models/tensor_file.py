"""A safetensors file as an untrusted input: everything that can be wrong with it is one ModelError.

Owns opening and reading tensor by tensor. It knows no layout. Nothing is unpickled: `.ckpt`, `.pt` and `.bin`
are refused.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sumizome.errors import ModelError
from sumizome.models.tensor_header import MAX_HEADER_BYTES, refuse_pickle

__all__ = ["TensorFile", "open_tensor_file"]


@dataclass(frozen=True)
class TensorFile:
    """The names, shapes and metadata of a file, and its tensors one at a time."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    _handle: Any = field(repr=False)

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype. It may map the file: copy it before the file changes.

        Raises: ModelError if it holds NaN or infinity.
        """
        tensor = self._handle.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(_comparable(tensor)).all():
            raise ModelError(
                f"{self.path}: tensor {name} holds NaN or infinity, so the model would answer with NaN. "
                "Use another copy of the model."
            )
        return tensor


def _comparable(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has no isfinite


def open_tensor_file(path: Path) -> TensorFile:
    """The safetensors file at `path`, its header checked.

    Raises: ModelError if it is missing, pickled, empty, truncated, or its header is damaged or absurdly large.
    """
    refuse_pickle(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    if size < 8 or header_bytes > size - 8:
        found = "is empty" if size == 0 else f"has {size} bytes, less than its header says"
        raise ModelError(f"{path} {found}: it is no safetensors file or was cut off. Download or copy it again.")
    if header_bytes > MAX_HEADER_BYTES:
        raise ModelError(
            f"{path}: its header has {header_bytes:,} bytes, more than {MAX_HEADER_BYTES:,}; SDXL's has 400,000. "
            "It is no model file of this family."
        )
    try:
        handle = safe_open(path, framework="pt", device="cpu")
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        metadata = dict(handle.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged or no safetensors file ({error}). Download or copy it again.") from error
    return TensorFile(path, shapes, metadata, handle)
