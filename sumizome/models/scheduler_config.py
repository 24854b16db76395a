"""What a diffusers folder's scheduler_config.json says the U-Net was trained for. No torch.

Owns which of its keys are believed, in which order: `rescale_betas_zero_snr`, else `trained_betas` that end at pure
noise. The loader, `inspect` and `mend` all ask here, so that they cannot come to different answers.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sumizome.errors import ModelError
from sumizome.models.folder_files import read_json

__all__ = ["PURE_NOISE_SIGMA", "StatedSchedule", "read_scheduler_config", "table_sigmas"]

PURE_NOISE_SIGMA = 1000.0
"""A schedule that ends above this sigma counts as zero terminal SNR: programs write 4096 or 4519, SDXL ends at 14.6."""

_DEFAULTS = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
_MOST = 100_000
"""Of timesteps: a table of more would fill the memory."""


@dataclass(frozen=True)
class StatedSchedule:
    """A scheduler's configuration, read."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    says_prediction: bool
    """Whether the key is there; diffusers takes its absence for epsilon."""
    rescales: bool
    """`rescale_betas_zero_snr`."""
    trained_betas: tuple[float, ...] | None
    beta_start: float
    beta_end: float
    num_timesteps: int
    timestep_spacing: str

    @property
    def last_sigma(self) -> float | None:
        """Where `trained_betas` end; None without them."""
        return table_sigmas(self.trained_betas)[-1] if self.trained_betas else None

    @property
    def betas_reach_zero_snr(self) -> bool:
        """Whether `trained_betas` end at pure noise, which serves schedulers that do not know the flag."""
        return self.last_sigma is not None and self.last_sigma > PURE_NOISE_SIGMA

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether sampling from this folder starts at pure noise."""
        return self.rescales or self.betas_reach_zero_snr


def read_scheduler_config(folder: Path) -> StatedSchedule:
    """What scheduler/scheduler_config.json in `folder` says.

    Raises: ModelError if it is missing, or states what SDXL's family does not have.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path, "it says what the U-Net predicts")
    scheduler = str(config.get("_class_name", ""))
    if scheduler.startswith(("EDM", "FlowMatch")):
        raise ModelError(f"{path}: it is a model for {scheduler[:60]}, whose noise levels are not SDXL's.")
    stated = config.get("prediction_type", "epsilon")
    if stated not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{path}: unknown prediction_type {str(stated)[:40]!r}; expected epsilon or v_prediction.")
    kind = config.get("beta_schedule", "scaled_linear")
    if kind != "scaled_linear":
        raise ModelError(f"{path}: beta_schedule {str(kind)[:40]!r}, expected scaled_linear.")
    numbers = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    if not all(type(number) in (int, float) and 0 < number <= _MOST for number in numbers.values()):
        found = list(numbers.values())
        raise ModelError(f"{path}: {', '.join(_DEFAULTS)} must be above 0 and up to {_MOST:,}, found {found}.")
    return StatedSchedule(
        prediction_type=stated,
        says_prediction="prediction_type" in config,
        rescales=bool(config.get("rescale_betas_zero_snr", False)),
        trained_betas=_betas(config.get("trained_betas"), path),
        beta_start=float(numbers["beta_start"]),
        beta_end=float(numbers["beta_end"]),
        num_timesteps=int(numbers["num_train_timesteps"]),
        timestep_spacing=str(config.get("timestep_spacing", "linspace")),
    )


def _betas(found: Any, path: Path) -> tuple[float, ...] | None:
    if found is None:
        return None
    well_formed = isinstance(found, list) and found and all(type(beta) in (int, float) for beta in found)
    if not well_formed or not all(0 < beta <= 1 for beta in found):
        raise ModelError(f"{path}: trained_betas is no list of numbers above 0 and up to 1. Copy the folder again.")
    return tuple(map(float, found))


def table_sigmas(betas: tuple[float, ...]) -> list[float]:
    """Sigma √((1−ᾱ)/ᾱ) at each timestep of a table of betas; inf where ᾱ is 0."""
    sigmas, alpha_cumprod = [], 1.0
    for beta in betas:
        alpha_cumprod *= 1 - beta
        sigmas.append(math.sqrt((1 - alpha_cumprod) / alpha_cumprod) if alpha_cumprod > 0 else math.inf)
    return sigmas
