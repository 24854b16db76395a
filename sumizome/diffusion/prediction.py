"""What the network predicts: the target it is trained on, and how its output becomes a clean image.

The three parameterisations say the same thing in other coordinates, so each conversion goes through `denoised`, the
predicted clean latents. All arithmetic is at least float32. The invariant: the output that equals the target
denoises to the latents.

Notation: x_t = √ᾱ·x₀ + √(1−ᾱ)·ε with x₀ = `latents`, ε = `noise`, x_t = `noised_latents`.
"""

from typing import Literal, TypeAlias, assert_never

import torch
from torch import Tensor

from sumizome.diffusion.schedule import NoiseSchedule, signal_and_noise_rates
from sumizome.errors import ConfigError
from sumizome.shapes import Latents, PerSample

__all__ = [
    "PredictionType",
    "check_prediction_type",
    "denoised_at_rates",
    "denoised_from_output",
    "output_from_denoised",
    "training_target",
]

PredictionType: TypeAlias = Literal["epsilon", "v_prediction", "sample"]
"""epsilon: the noise ε (SDXL as released) · v_prediction: √ᾱ·ε − √(1−ᾱ)·x₀ (the report) · sample: x₀ itself."""


def training_target(
    prediction_type: PredictionType, latents: Latents, noise: Latents, alphas_cumprod: PerSample
) -> Latents:
    """What the network should answer. At ᾱ = 0 the velocity is −latents, so pure noise has something to teach;
    epsilon there is the input itself.

    Source: report §2.1; Salimans & Ho 2202.00512, App. D.
    """
    match prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            signal_rate, noise_rate = signal_and_noise_rates(alphas_cumprod, latents)
            return signal_rate * noise - noise_rate * latents
        case "sample":
            return latents
        case _:
            assert_never(prediction_type)


def denoised_from_output(
    prediction_type: PredictionType, model_output: Latents, noised_latents: Latents, alphas_cumprod: PerSample
) -> Latents:
    """The clean latents that `model_output` stands for. Epsilon divides by √ᾱ: see `check_prediction_type`."""
    rates = signal_and_noise_rates(alphas_cumprod, noised_latents)
    return denoised_at_rates(prediction_type, model_output, noised_latents, *rates)


def denoised_at_rates(
    prediction_type: PredictionType,
    model_output: Latents,
    noised_latents: Latents,
    signal_rate: Tensor | float,
    noise_rate: Tensor | float,
) -> Latents:
    """`denoised_from_output` where √ᾱ and √(1−ᾱ) are known: tensors [b 1 1 1], or numbers for the whole batch."""
    match prediction_type:
        case "epsilon":
            return (noised_latents - noise_rate * model_output) / signal_rate
        case "v_prediction" if isinstance(noise_rate, float):  # a sampler's step: one operation less
            return torch.sub(signal_rate * noised_latents, model_output, alpha=noise_rate)
        case "v_prediction":
            return signal_rate * noised_latents - noise_rate * model_output
        case "sample":
            return model_output
        case _:
            assert_never(prediction_type)


def output_from_denoised(
    prediction_type: PredictionType, denoised: Latents, noised_latents: Latents, alphas_cumprod: PerSample
) -> Latents:
    """The output that stands for `denoised`: inverse of `denoised_from_output`, finite at ᾱ = 0 for every type."""
    signal_rate, noise_rate = signal_and_noise_rates(alphas_cumprod, noised_latents)
    match prediction_type:
        case "epsilon":
            return (noised_latents - signal_rate * denoised) / noise_rate
        case "v_prediction":
            return (signal_rate * noised_latents - denoised) / noise_rate
        case "sample":
            return denoised
        case _:
            assert_never(prediction_type)


def check_prediction_type(prediction_type: PredictionType, schedule: NoiseSchedule) -> None:
    """Refuse what has no answer: at zero SNR an epsilon model returns its input, and the image is 0/0.

    Raises:
        ConfigError: epsilon on a zero-terminal-SNR schedule.
    """
    if prediction_type == "epsilon" and schedule.zero_terminal_snr:
        raise ConfigError(
            "epsilon prediction cannot reach pure noise (its image is 0/0 at zero SNR): "
            "set prediction_type to v_prediction, or zero_terminal_snr to false"
        )
