"""What a mended copy says beside its weights, and what is told of it: metadata carried over, and what changed.

Owns those words. The marks and ModelSpec's card are `models.prediction_marks`' and `export_metadata`'s.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from sumizome.export_metadata import ModelCard, model_metadata
from sumizome.inference import native_canvas
from sumizome.inspection import Findings
from sumizome.mend_decision import MendConfig
from sumizome.models.key_map import NETWORK_PREFIXES
from sumizome.models.prediction_marks import MARKS
from sumizome.models.sdxl import SDXLModel
from sumizome.models.tensor_writer import TensorJob, safetensors_name
from sumizome.models.unseen_settings import SETTINGS_KEY

__all__ = ["changes_of", "copied_metadata"]

_SHORT = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.predict_key", SETTINGS_KEY)
"""Metadata of the source that is no longer true of a copy, or that the copy says in another place."""


def copied_metadata(
    metadata: Mapping[str, str], model: SDXLModel, jobs: list[TensorJob], config: MendConfig, out: Path
) -> dict[str, str]:
    """The `metadata` of its source for the copy at `out`, with everything that programs go by put right."""
    kept = {key: value for key, value in metadata.items() if key not in _STALE}
    if "ss_zero_terminal_snr" in kept:
        kept["ss_zero_terminal_snr"] = str(model.schedule_config.zero_terminal_snr)
    title = config.title or kept.get("modelspec.title") or out.stem
    networks = [job for job in jobs if "." in job.name]
    dtype = _SHORT[safetensors_name(networks[0].dtype)]
    canvas = native_canvas(model) if "vae" in model.networks else ModelCard.resolution
    ours = model_metadata(model, ModelCard(title=title, resolution=canvas), dtype)  # type: ignore[arg-type]
    for key in ("modelspec.resolution", "modelspec.date"):
        ours[key] = kept.get(key, ours[key])
    vae = [job for job in jobs if job.name.startswith(NETWORK_PREFIXES["vae"])]
    if vae:
        ours["modelspec.vae_dtype"] = _SHORT[safetensors_name(vae[0].dtype)]
    return kept | ours


def changes_of(
    findings: Findings, model: SDXLModel, jobs: list[TensorJob], config: MendConfig, marks: set[str] | None
) -> Iterator[str]:
    """What differs from the source in a copy with these jobs and marks, a phrase each; a folder has no marks: None."""
    schedule = "zero terminal SNR" if model.schedule_config.zero_terminal_snr else "SDXL's own schedule"
    said = (model.prediction_type, model.schedule_config.zero_terminal_snr)
    was = (findings.prediction_type, findings.zero_terminal_snr)
    yield f"says {model.prediction_type}, {schedule}{'' if said == was else ' (the source was read otherwise)'}"
    before = {name for header in findings.headers for name in header.tensors}
    if marks is not None and marks - before:
        yield f"adds {', '.join(sorted(marks - before))}"
    if config.dtype:
        yield f"weights in {config.dtype}, none overflows"
    if config.vae:
        yield f"VAE of {config.vae}"
    foreign = [name for part in findings.components for name in part.foreign]
    known = {*MARKS, "alphas_cumprod"}
    left = [*foreign, *(name for name in findings.ignored if name not in known)]
    if left:
        yield f"leaves out what is no part of SDXL: {len(left):,} tensors, {left[0]} for one"
    gone = sorted(known.intersection(findings.ignored) - (marks or set()))
    if marks is not None and gone:
        yield f"leaves out {', '.join(gone)}"
