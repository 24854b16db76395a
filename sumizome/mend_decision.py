"""What a corrected copy has to say, and what cannot be mended: decided before a single weight is read.

Owns the settings of `mend` and `merge`, the refusals where nothing tells what only a flag can decide, and the rule that
a source is never written to. The copy itself is `mending`'s.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sumizome.components import SCALES
from sumizome.diffusion.prediction import PredictionType
from sumizome.errors import ConfigError, ExportError, ModelError
from sumizome.export_metadata import ExportDtype
from sumizome.inspection import Findings
from sumizome.models.architecture import Config
from sumizome.models.key_map import NETWORK_PREFIXES
from sumizome.models.scheduler_config import read_scheduler_config

__all__ = ["MendConfig", "betas_of", "check_apart", "check_kept", "check_place", "check_source", "decide", "is_file"]


@dataclass(frozen=True)
class MendConfig:
    """What to put right. None: as the source says."""

    prediction: Literal["v", "epsilon"] | None = None
    """What the U-Net was trained to predict."""
    zero_terminal_snr: bool | None = None
    """Whether it was trained to pure noise."""
    dtype: ExportDtype | None = None
    """Of all weights in the copy; None keeps each tensor's own."""
    vae: Path | None = None
    """A model or a VAE whose VAE the copy gets."""
    noise_table: bool = True
    """Write the rescaled `alphas_cumprod` into a single file, the only way to pure noise in stable-diffusion.cpp."""
    title: str | None = None
    """Of the copy, in its metadata; None keeps the source's."""
    verify_step: bool = True
    """Make the copy denoise one step and compare it with the source's, beside comparing every bit."""


def is_file(out: Path) -> bool:
    """Whether `out` names a single file; any other name is a diffusers folder's."""
    return out.suffix == ".safetensors"


def check_source(findings: Findings, config: MendConfig, as_file: bool) -> None:
    path = findings.path
    if findings.layout is None:
        raise ModelError(f"{path} cannot be mended: {findings.kind}.")
    if findings.layout == "unet" and not as_file:
        raise ModelError(f"{path} is a U-Net alone, and a diffusers folder needs every network: use --out FILE.")
    if findings.layout == "unet" and config.vae is not None:
        raise ConfigError(f"{path} is a U-Net alone: a VAE in the same file would not be found. Leave --vae out.")
    for part in findings.components:
        if part.name == "vae" and config.vae is not None:
            continue
        scale = next((name for name in part.foreign if SCALES.fullmatch(name)), None)
        if scale is not None:
            raise ModelError(
                f"{path}: {part.name} has quantised weights that mean nothing without their scales ({scale} for one), "
                "which are not read here. Use the version in fp16, bf16 or fp32."
            )
        wrong = part.missing or part.misshapen
        if wrong:
            raise ModelError(
                f"{path}: {part.name} lacks {len(part.missing)} tensors and {len(part.misshapen)} have another shape "
                f"({wrong[0]} for one); weights cannot be invented. Use another copy of the model."
            )
    if findings.layout != "unet":
        held = {part.name for part in findings.components} | ({"vae"} if config.vae else set())
        lost = [name for name in NETWORK_PREFIXES if name not in held]
        if lost:
            advice = "give one with --vae" if lost == ["vae"] else "use the full model"
            raise ModelError(f"{path} has no {' and no '.join(lost)}: {advice}.")


def check_kept(source: Path, out: Path) -> None:
    """Raises: ExportError if replacing `out` would take the source away: it is that, or lies in that folder."""
    if out.exists() and source.exists() and out.samefile(source):
        raise ExportError(f"{out} is the source itself: the new model needs a path of its own.")
    if out.is_dir() and source.resolve().is_relative_to(out.resolve()):
        raise ExportError(f"{source} lies inside {out}, which would be replaced whole: choose another path.")


def check_apart(source: Path, out: Path) -> None:
    """Raises: ExportError as `check_kept`, and if `out` lies inside the source."""
    check_kept(source, out)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ExportError(f"{out} lies inside the source: the new model needs a path of its own.")


def check_place(source: Path, out: Path, overwrite: bool) -> None:
    """Raises: ExportError if writing `out` would change the source, or it exists and may not be replaced."""
    check_apart(source, out)
    if out.suffix in (".ckpt", ".pt", ".pth", ".bin", ".sft", ".gguf"):
        raise ExportError(f"{out}: a single file must end in .safetensors; any other name makes a diffusers folder.")
    for path in [out, out.with_suffix(".yaml")] if is_file(out) else [out]:
        if path.exists() and not overwrite:
            raise ExportError(f"{path} exists: choose another path, or give --overwrite.")
    if not is_file(out) and out.exists() and not (out / "model_index.json").is_file():
        raise ExportError(f"{out} holds no diffusers model, so it is not replaced. Choose another path.")


def decide(findings: Findings, config: MendConfig) -> tuple[PredictionType, bool]:
    """(prediction type, terminal SNR): the flags, else what the source says if all of it agrees.

    Raises: ConfigError naming the flag that decides what the source does not.
    """
    prediction_type = _decide_prediction(findings, config)
    zero_terminal_snr = _decide_schedule(findings, config, prediction_type)
    if zero_terminal_snr and prediction_type != "v_prediction":
        raise ConfigError(
            f"zero terminal SNR needs v-prediction, and {findings.path} is taken for {prediction_type}: at pure noise "
            "an epsilon model has nothing to predict. Add --prediction v, or --no-zero-terminal-snr."
        )
    return prediction_type, zero_terminal_snr


def _decide_prediction(findings: Findings, config: MendConfig) -> PredictionType:
    if config.prediction is not None:
        return "v_prediction" if config.prediction == "v" else "epsilon"
    told = [evidence for evidence in findings.evidence if evidence.prediction_type]
    spoken = [evidence for evidence in told if not evidence.source.startswith("nothing")]
    against = [evidence.source for evidence in spoken if evidence.prediction_type != findings.prediction_type]
    if not spoken:
        raise ConfigError(
            f"nothing in {findings.path} says what its U-Net predicts: give --prediction v or --prediction epsilon."
        )
    found = findings.prediction_type
    if found is None or found == "EDM":
        raise ConfigError(
            f"{findings.path} is marked as an EDM model, which SDXL is not: --prediction v or --prediction epsilon "
            "says what it is and removes the marks."
        )
    if against:
        raise ConfigError(
            f"{findings.path} is read as {found}, and {against[0]} contradicts that: give --prediction v or "
            "--prediction epsilon."
        )
    return found


def _decide_schedule(findings: Findings, config: MendConfig, prediction_type: PredictionType) -> bool:
    if config.zero_terminal_snr is not None:
        return config.zero_terminal_snr
    if prediction_type == "epsilon":
        return False
    spoken = [evidence for evidence in findings.evidence if evidence.zero_terminal_snr is not None]
    spoken = [evidence for evidence in spoken if evidence.prediction_type in (None, prediction_type)]
    said = {bool(evidence.zero_terminal_snr) for evidence in spoken if not evidence.source.startswith("nothing")}
    if findings.layout == "folder" and not said:
        said = {False}  # a scheduler config without the flag is a statement; a file without a mark is none
    if said and prediction_type == findings.prediction_type:
        # A mark that is missing says nothing, but most programs, and our loader, go by it.
        said.add(bool(findings.zero_terminal_snr))
    if len(said) != 1:
        why = "contradicts itself about" if said else "does not say"
        raise ConfigError(
            f"{findings.path} {why} whether it was trained to pure noise: give --zero-terminal-snr (most v-prediction "
            "SDXL models were) or --no-zero-terminal-snr."
        )
    return said.pop()


def betas_of(findings: Findings) -> Config:
    """The betas that a folder states; SDXL's for a file, which has no place for others."""
    if findings.layout != "folder":
        return {}
    stated = read_scheduler_config(findings.path)
    return {
        "beta_start": stated.beta_start,
        "beta_end": stated.beta_end,
        "num_timesteps": stated.num_timesteps,
    }
