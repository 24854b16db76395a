"""What stands in and beside an exported file besides weights: ModelSpec's card, how it was trained, A1111's sidecar.

Owns those words. The marks that say what the U-Net predicts are `models.prediction_marks`'; the files are `export`'s.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sumizome import __version__
from sumizome.errors import ExportError
from sumizome.files import files_committed, write_atomically
from sumizome.models.architecture import unet_config
from sumizome.models.infer_config import LATENT_CHANNELS
from sumizome.models.prediction_marks import prediction_metadata, sidecar_of
from sumizome.models.sdxl import SDXLModel
from sumizome.models.tensor_writer import DATA_HASH

__all__ = [
    "ExportDtype",
    "ModelCard",
    "check_sidecar",
    "commit_with_sidecar",
    "model_metadata",
    "sidecar_path",
]

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
    """Where A1111 looks for the configuration of the single file `path`; None for a model that needs none, or that its
    configuration of an SDXL does not fit."""
    fits = _is_full_size(model) and model.unet.config["in_channels"] == LATENT_CHANNELS
    return path.with_suffix(".yaml") if fits and model.prediction_type == "v_prediction" else None


def check_sidecar(path: Path, sidecar: Path | None, prediction_type: str, overwrite: bool) -> None:
    """Refuses the single file `path` for what stands beside it, before anything is written.

    Raises: ExportError if the sidecar that it needs exists and may not be replaced; or if it needs none, and a .yaml
    that stands there says another prediction type.
    """
    if sidecar is not None and sidecar.exists() and not overwrite:
        raise ExportError(f"{sidecar} exists; ask to overwrite it, or choose another path.")
    if sidecar is None and sidecar_of(path)[1] not in (None, prediction_type):
        raise ExportError(f"{path.with_suffix('.yaml')} would make programs read {path.name} wrongly: remove it first.")


def commit_with_sidecar(path: Path, sidecar: Path | None, write: Callable[[Path], object]) -> None:
    """What `write` makes, at `path`; A1111's configuration of an SDXL that predicts v takes its place before it.

    A crash leaves a .yaml alone or both files, never the model without it, which A1111 would read as epsilon.
    Raises: ExportError for what the disk refuses; then what stood in both places still does.
    """
    if sidecar is None or (sidecar.is_file() and sidecar.read_bytes() == _SIDECAR.read_bytes()):
        write_atomically(path, write, failure=ExportError)
        return
    with files_committed(sidecar, path, failure=ExportError) as (beside, file):
        write(file)
        shutil.copyfile(_SIDECAR, beside)


def _is_full_size(model: SDXLModel) -> bool:
    widths: tuple[int, ...] = unet_config()["block_out_channels"]
    return tuple(model.unet.config["block_out_channels"]) == widths
