"""What a single file says its U-Net was trained to predict: marker tensors, metadata, the .yaml beside it; both ways.

Owns the order in which these are believed, for the loader, `inspect` and `mend` alike, and the marks that are written.
Importing it takes no torch.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sumizome.errors import ExportError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from sumizome.diffusion.prediction import PredictionType
    from sumizome.diffusion.schedule import ScheduleConfig

__all__ = [
    "MARKS",
    "STATEMENTS",
    "prediction_markers",
    "prediction_metadata",
    "prediction_of",
    "sidecar_of",
]

MARKS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max")
"""Empty or tiny tensors that tell programs what kind of model a file is."""
STATEMENTS = ("modelspec.prediction_type", "prediction_type", "modelspec.predict_key")
"""Metadata keys that state the prediction type, in the order of belief; the last is what ComfyUI writes."""


def prediction_of(
    names: Iterable[str], metadata: Mapping[str, str], sidecar: "PredictionType | None" = None
) -> "tuple[PredictionType, bool]":
    """(prediction type, zero terminal SNR) of an original file, from the first in this order that says anything.

    Mark `v_pred`, with `ztsnr`; metadata `modelspec.prediction_type`, then `prediction_type`, then ComfyUI's
    `modelspec.predict_key`, with kohya's `ss_zero_terminal_snr`; the .yaml beside the file; SDXL's own: epsilon.
    `ztsnr` says nothing without `v_pred`, as in ComfyUI. Marks win because most programs read only them.

    Raises: ModelError for the markers of EDM models, whose noise levels are not SDXL's.
    """
    markers = set(MARKS).intersection(names)
    foreign = {marker for marker in markers if marker.startswith("edm")}
    if foreign:
        raise ModelError(
            f"it is marked as an EDM model ({', '.join(sorted(foreign))}), whose noise levels are not SDXL's."
        )
    if "v_pred" in markers:
        return "v_prediction", "ztsnr" in markers
    stated = next((metadata[key] for key in STATEMENTS if metadata.get(key)), None)
    if stated in ("v", "v-zsnr", "v_prediction"):
        return "v_prediction", "zsnr" in stated or metadata.get("ss_zero_terminal_snr") == "True"
    if stated is None and sidecar is not None:
        return sidecar, False
    return "epsilon", False


_MOST_SIDECAR_BYTES = 1_000_000


def sidecar_of(path: Path) -> "tuple[Path | None, PredictionType | None]":
    """The .yaml beside a file, if there is one, and what it says of the prediction.

    It is looked through for the two words that A1111 and Forge go by, not parsed.
    """
    sidecar = path.with_suffix(".yaml")
    if not sidecar.is_file() or sidecar.stat().st_size > _MOST_SIDECAR_BYTES:
        return None, None
    text = re.sub(r"#.*", "", sidecar.read_text(encoding="utf-8", errors="replace"))
    if re.search(r"\.VScaling\b", text) or re.search(r"parameterization:\s*[\"']?v\b", text):
        return sidecar, "v_prediction"
    return sidecar, "epsilon" if "target:" in text else None


def prediction_markers(prediction_type: "PredictionType", schedule_config: "ScheduleConfig") -> "dict[str, Tensor]":
    """The marker tensors of a file with such a U-Net; `prediction_of` reads them back.

    Raises: ExportError for what the layout has no mark for.
    """
    import torch

    from sumizome.diffusion.schedule import COMFYUI_TERMINAL_ALPHA_CUMPROD, ScheduleConfig, build_noise_schedule

    if prediction_type == "sample":
        raise ExportError("the single-file layout has no mark for prediction type sample: export a diffusers folder.")
    if schedule_config.zero_terminal_snr and prediction_type != "v_prediction":
        raise ExportError("the single-file layout marks zero terminal SNR only for v_prediction (ztsnr needs v_pred).")
    if schedule_config != ScheduleConfig(zero_terminal_snr=schedule_config.zero_terminal_snr):
        raise ExportError("the single-file layout cannot hold betas other than SDXL's: export a diffusers folder.")
    markers = {}
    if prediction_type == "v_prediction":
        markers["v_pred"] = torch.tensor([])
    if schedule_config.zero_terminal_snr:
        markers["ztsnr"] = torch.tensor([])
        # stable-diffusion.cpp reads this table instead of the mark; all the others ignore it.
        schedule = build_noise_schedule(schedule_config)
        table = schedule.with_terminal_alpha_cumprod(COMFYUI_TERMINAL_ALPHA_CUMPROD).alphas_cumprod
        markers["alphas_cumprod"] = table.float()
    return markers


def prediction_metadata(prediction_type: "PredictionType", schedule_config: "ScheduleConfig") -> dict[str, str]:
    """The same as metadata: ModelSpec's key, which SwarmUI reads, and the bare one, which qDiffusion reads.

    `v-zsnr` is no value of the specification; given plain "v", SwarmUI switches zero terminal SNR off.
    """
    if prediction_type != "v_prediction":
        return {"modelspec.prediction_type": "epsilon", "prediction_type": "epsilon"}
    stated = "v-zsnr" if schedule_config.zero_terminal_snr else "v"
    return {"modelspec.prediction_type": stated, "prediction_type": "v"}
