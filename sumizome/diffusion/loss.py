"""The training loss of each sample, weighted by how noisy its timestep is.

Owns the SNR weights, in all three parameterisations, and the floor under the terminal step. It does not average over
the batch, and the tag weight comes from `data/tags.py`. The invariant: every weight is a function of the SNR of the
schedule that is trained on, so it is read after the rescale.

Notation: γ = `gamma`; weights multiply the squared error of the network's own output.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from sumizome.diffusion.prediction import PredictionType, check_prediction_type
from sumizome.diffusion.schedule import NoiseSchedule
from sumizome.errors import ConfigError
from sumizome.shapes import Latents, PerSample, Table, Timesteps

__all__ = [
    "LossConfig",
    "LossPerSample",
    "WeightedLoss",
    "Weighting",
    "build_loss",
    "build_loss_weights",
    "min_snr_weight",
    "snr_loss_weight",
    "soft_min_snr_weight",
]

Weighting: TypeAlias = Literal["min_snr", "soft_min_snr", "uniform"]

Snr: TypeAlias = Float[Tensor, " n"]
"""Signal-to-noise ratios, of a table or of samples; 0 is pure noise."""


@dataclass(frozen=True)
class LossConfig:
    """Which noise levels the gradient comes from."""

    weighting: Weighting = "min_snr"
    """min_snr: the report's · soft_min_snr: the same without the corner at snr = gamma · uniform: 1 everywhere."""

    gamma: float = 5.0
    """The SNR above which min_snr stops raising the weight. 5 is the report's."""

    terminal_floor: float = 0.1
    """Least weight where noise outweighs signal (snr < 1), so that the step from pure noise is trained.
    0 = the plain weighting, 0 at pure noise."""
    # Why 0.1: docs/studies/min-snr.md. Plain MinSNR leaves t >= 900 with 0.03 % of the weight on SDXL's rescaled
    # schedule, and the first prediction of black misses it by 0.86 of its size, as soft MinSNR's does (0.87); with
    # floors of 0.03, 0.1 and 0.3 by 0.70, 0.46 and 0.39 (no weighting: 0.38). 0.1 is the least that is not told apart
    # from the best floor, and it alone lowers the loss below t = 900, too.

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ConfigError(f"gamma must be above 0 (the report uses 5), found {self.gamma}")
        if not 0 <= self.terminal_floor <= 1:
            raise ConfigError(f"terminal_floor must lie in 0 … 1 (0 = none), found {self.terminal_floor}")


class LossPerSample(NamedTuple):
    """What one micro-batch cost."""

    weighted: PerSample
    """[b], with gradient: the trainer's to average."""

    unweighted: PerSample
    """[b], detached: the mean squared error to log by timestep, which no weighting hides."""


@dataclass(frozen=True, eq=False)
class WeightedLoss:
    """`loss(model_output, target, timesteps, loss_weight)` → `LossPerSample`."""

    weights: Table
    """[T] float64: the weight of each timestep."""

    def __call__(
        self,
        model_output: Latents,
        target: Latents,
        timesteps: Timesteps,
        loss_weight: PerSample | None = None,
    ) -> LossPerSample:
        """Mean squared error a sample in float32 or more; weighted by timestep and by `loss_weight` (the tag weight).

        A NaN stays a NaN whatever its weight, so that the trainer can stop and name the sample.
        """
        dtype = torch.promote_types(model_output.dtype, torch.float32)
        error = (model_output.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
        weight = self.weights[timesteps.cpu()].to(error, non_blocking=True)
        if loss_weight is not None:
            weight = weight * loss_weight.to(error, non_blocking=True)
        return LossPerSample(weight * error, error.detach())


def build_loss(config: LossConfig, schedule: NoiseSchedule, prediction_type: PredictionType) -> WeightedLoss:
    """The loss that `config` describes on this schedule.

    Raises:
        ConfigError: epsilon on a zero-terminal-SNR schedule.
    """
    return WeightedLoss(build_loss_weights(config, schedule, prediction_type))


def build_loss_weights(config: LossConfig, schedule: NoiseSchedule, prediction_type: PredictionType) -> Table:
    """The weight of each timestep, [T] float64.

    Raises:
        ConfigError: epsilon on a zero-terminal-SNR schedule.
    """
    check_prediction_type(prediction_type, schedule)
    return snr_loss_weight(config, schedule.snr, prediction_type)


def snr_loss_weight(config: LossConfig, snr: Snr, prediction_type: PredictionType) -> Snr:
    """The weight at each SNR: the chosen weighting, and at least `terminal_floor` where noise outweighs signal."""
    match config.weighting:
        case "min_snr":
            weight = min_snr_weight(snr, config.gamma, prediction_type)
        case "soft_min_snr":
            weight = soft_min_snr_weight(snr, config.gamma, prediction_type)
        case "uniform":
            weight = torch.ones_like(snr)
        case _:
            assert_never(config.weighting)
    return torch.where(snr < 1, weight.clamp(min=config.terminal_floor), weight)


def min_snr_weight(snr: Snr, gamma: float, prediction_type: PredictionType) -> Snr:
    """min(snr, γ) on x₀; /snr on epsilon, where snr = 0 takes its limit 1; /(snr + 1) on velocity, where it gives 0.

    Source: report §2.4; Hang et al. 2303.09556, §3.4.
    """
    match prediction_type:
        case "sample":
            return snr.clamp(max=gamma)
        case "epsilon":
            return (gamma / snr).clamp(max=1)
        case "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        case _:
            assert_never(prediction_type)


def soft_min_snr_weight(snr: Snr, gamma: float, prediction_type: PredictionType) -> Snr:
    """γ·snr/(γ + snr) on x₀, with MinSNR's limits on both sides; /snr on epsilon; /(snr + 1) on velocity.

    Source: Crowson et al. 2401.11605, §4 (there with γ = 4, on x₀).
    """
    match prediction_type:
        case "sample":
            return gamma * snr / (gamma + snr)
        case "epsilon":
            return gamma / (gamma + snr)
        case "v_prediction":
            return gamma * snr / ((gamma + snr) * (snr + 1))
        case _:
            assert_never(prediction_type)
