"""What stands in and beside an exported file besides weights: ModelSpec's card, how it was trained, A1111's sidecar.

Owns those words. The marks that say what the U-Net predicts are `models.prediction_marks`'; the files are `export`'s.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sumizome import __version__
from sumizome.errors import ExportError
from sumizome.files import write_atomically
from sumizome.models.architecture import unet_config
from sumizome.models.prediction_marks import prediction_metadata, sidecar_of
from sumizome.models.sdxl import SDXLModel
from sumizome.models.tensor_writer import DATA_HASH

__all__ = ["ExportDtype", "ModelCard", "model_metadata", "refuse_false_sidecar", "sidecar_path", "write_sidecar"]

ExportDtype = Literal["fp32", "fp16", "bf16"]

_SIDECAR = Path(__file__).parent / "models" / "assets" / "a1111_sdxl_v.yaml"


@dataclass(frozen=True)
class ModelCard:
    """What ModelSpec metadata says of the model beside its architecture."""

    title: str = "Sumizome model"
    author: str = ""
    description: str = ""
    resolution: tuple[int, int] = (1024, 1024)
    """(height, width) px that the model was trained for."""
    training: Mapping[str, str] = field(default_factory=dict)
    """How it was trained, as metadata keys and values (`train.summary`)."""


def model_metadata(model: SDXLModel, card: ModelCard, dtype: ExportDtype) -> dict[str, str]:
    """ModelSpec 1.0.1, `format`, who wrote it and how it was trained. `write_tensors` fills in the hash."""
    stated = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base" if _is_full_size(model) else "sumizome-tiny",
        "implementation": "sgm",
        "title": card.title,
        "author": card.author,
        "description": card.description,
        "resolution": f"{card.resolution[1]}x{card.resolution[0]}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "unet_dtype": dtype,
        "vae_dtype": dtype,
    }
    return {
        **{f"modelspec.{key}": value for key, value in stated.items() if value},
        **prediction_metadata(model.prediction_type, model.schedule_config),
        **card.training,
        DATA_HASH: "",
        "format": "pt",
        "software": f"Sumizome {__version__}",
    }


def sidecar_path(model: SDXLModel, path: Path) -> Path | None:
    """Where A1111 looks for the configuration of the single file `path`; None for a model that needs none."""
    needed = model.prediction_type == "v_prediction" and _is_full_size(model)
    return path.with_suffix(".yaml") if needed else None


def refuse_false_sidecar(path: Path, prediction_type: str) -> None:
    """Raises: ExportError if a .yaml that stands where that of the file `path` would says another prediction type."""
    if sidecar_of(path)[1] not in (None, prediction_type):
        raise ExportError(f"{path.with_suffix('.yaml')} would make programs read {path.name} wrongly: remove it first.")


def write_sidecar(path: Path) -> None:
    """A1111's configuration of an SDXL that predicts v. Raises: ExportError for what the disk refuses."""
    write_atomically(path, lambda file: shutil.copyfile(_SIDECAR, file), failure=ExportError)


def _is_full_size(model: SDXLModel) -> bool:
    return tuple(model.unet.config["block_out_channels"]) == unet_config()["block_out_channels"]
