"""A safetensors file as an untrusted input: everything that can be wrong with it is one ModelError.

Owns reading tensor by tensor; the header's rules are `tensor_header`'s. It knows no layout. Nothing is unpickled.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sumizome.errors import ModelError
from sumizome.models.tensor_header import read_header

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
        tensor: Tensor = self._handle.get_tensor(name)
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

    Raises: ModelError as `read_header` does, in one sentence for each kind of damage.
    """
    header = read_header(path)
    try:
        handle = _handle(path)
    except (SafetensorError, OSError, ValueError) as error:
        if not _is_utf8(path):
            raise ModelError(f"{path}: its name is not UTF-8, and cannot be opened here: rename it.") from error
        raise ModelError(f"{path} is damaged or no safetensors file ({error}). Download or copy it again.") from error
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    return TensorFile(path, shapes, header.metadata, handle)


_OPEN_FILES = "/proc/self/fd"
"""Where Linux shows the files that a process holds open, by number."""


def _handle(path: Path) -> Any:
    """safetensors' own. It takes names in UTF-8 alone; a file of another name is handed to it open, by its number."""
    if _is_utf8(path):
        return safe_open(path, framework="pt", device="cpu")
    with path.open("rb") as file:
        return safe_open(f"{_OPEN_FILES}/{file.fileno()}", framework="pt", device="cpu")


def _is_utf8(path: Path) -> bool:
    """Bytes that are none stand in a path as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in str(path))
