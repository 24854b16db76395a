"""Trained weights as files that other programs open: a diffusers folder, or one file in SDXL's original layout.

Owns what those programs need beside the weights (scheduler config, `v_pred` and `ztsnr`, ModelSpec, A1111's sidecar) and the
commit: written under a temporary name, read back bit for bit, synced, renamed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sumizome.models.sdxl import SDXLModel

__all__ = ["ExportDtype", "ModelCard", "write_diffusers_folder", "write_single_file"]

ExportDtype = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class ModelCard:
    """What ModelSpec metadata says of the model beside its architecture."""

    title: str = "Sumizome model"
    author: str = ""
    description: str = ""
    resolution: tuple[int, int] = (1024, 1024)
    """(height, width) px that the model was trained for."""


def write_diffusers_folder(
    model: "SDXLModel", path: Path, *, dtype: ExportDtype = "fp32", overwrite: bool = False
) -> Path:
    """A folder that diffusers' StableDiffusionXLPipeline opens, with SDXL's tokenizers and the right scheduler. Returns `path`.

    Raises: ExportError if `path` exists and `overwrite` is off, if a weight overflows `dtype`, or if reading back differs.
    """
    raise NotImplementedError


def write_single_file(
    model: "SDXLModel",
    path: Path,
    *,
    dtype: ExportDtype = "fp32",
    card: ModelCard | None = None,
    overwrite: bool = False,
) -> Path:
    """`path`.safetensors in SDXL's original layout, and A1111's `path`.yaml beside it for a v-prediction model. Returns `path`.

    Raises: ExportError if `path` exists and `overwrite` is off, if a weight overflows `dtype`, or if reading back differs.
    """
    raise NotImplementedError
