"""Targets and conversions: against diffusers, against each other, and at the terminal step."""

from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from sumizome.diffusion.prediction import (
    PredictionType,
    check_prediction_type,
    denoised_from_output,
    output_from_denoised,
    training_target,
)
from sumizome.diffusion.schedule import NoiseSchedule, ScheduleConfig, build_noise_schedule
from sumizome.errors import ConfigError

TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
SCHEDULE = build_noise_schedule(ScheduleConfig())


def _sample(timestep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise, noised latents and ᾱ of two samples, in float64."""
    draws = torch.randn(2, 2, 4, 3, 5, generator=torch.Generator().manual_seed(timestep), dtype=torch.float64)
    timesteps = torch.tensor([timestep, timestep])
    latents, noise = draws
    return latents, noise, SCHEDULE.add_noise(latents, noise, timesteps), SCHEDULE.alphas_cumprod_of(timesteps)


def test_velocity_target_equals_diffusers(schedule: NoiseSchedule) -> None:
    latents, noise = torch.randn(2, 4, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([0, 500, 962, 999])
    reference = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    target = training_target("v_prediction", latents, noise, schedule.alphas_cumprod_of(timesteps))
    torch.testing.assert_close(target, reference.get_velocity(latents, noise, timesteps), rtol=1e-4, atol=1e-4)


def test_pure_noise_teaches_the_negated_picture(schedule: NoiseSchedule) -> None:
    """Report §2.1."""
    latents, noise, _, alphas_cumprod = _sample(999)
    assert torch.equal(training_target("v_prediction", latents, noise, alphas_cumprod), -latents)


def test_other_targets_are_the_noise_and_the_picture() -> None:
    latents, noise, _, alphas_cumprod = _sample(500)
    assert torch.equal(training_target("epsilon", latents, noise, alphas_cumprod), noise)
    assert torch.equal(training_target("sample", latents, noise, alphas_cumprod), latents)


@given(timestep=st.integers(0, 998), prediction_type=st.sampled_from(TYPES))
def test_the_target_denoises_to_the_latents(timestep: int, prediction_type: PredictionType) -> None:
    latents, noise, noised_latents, alphas_cumprod = _sample(timestep)
    target = training_target(prediction_type, latents, noise, alphas_cumprod)
    denoised = denoised_from_output(prediction_type, target, noised_latents, alphas_cumprod)
    torch.testing.assert_close(denoised, latents, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_at_the_terminal_step_the_target_still_denoises_to_the_latents(prediction_type: PredictionType) -> None:
    latents, noise, noised_latents, alphas_cumprod = _sample(999)
    target = training_target(prediction_type, latents, noise, alphas_cumprod)
    assert torch.equal(denoised_from_output(prediction_type, target, noised_latents, alphas_cumprod), latents)


@given(timestep=st.integers(0, 998), source=st.sampled_from(TYPES), destination=st.sampled_from(TYPES))
def test_one_target_converts_into_another(timestep: int, source: PredictionType, destination: PredictionType) -> None:
    latents, noise, noised_latents, alphas_cumprod = _sample(timestep)
    output = training_target(source, latents, noise, alphas_cumprod)
    denoised = denoised_from_output(source, output, noised_latents, alphas_cumprod)
    converted = output_from_denoised(destination, denoised, noised_latents, alphas_cumprod)
    expected = training_target(destination, latents, noise, alphas_cumprod)
    torch.testing.assert_close(converted, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_every_output_is_finite_at_the_terminal_step(prediction_type: PredictionType) -> None:
    latents, noise, noised_latents, alphas_cumprod = _sample(999)
    output = output_from_denoised(prediction_type, latents, noised_latents, alphas_cumprod)
    torch.testing.assert_close(output, training_target(prediction_type, latents, noise, alphas_cumprod))


def test_epsilon_is_refused_at_zero_terminal_snr(schedule: NoiseSchedule, plain_schedule: NoiseSchedule) -> None:
    with pytest.raises(ConfigError, match="v_prediction"):
        check_prediction_type("epsilon", schedule)
    check_prediction_type("epsilon", plain_schedule)
    check_prediction_type("v_prediction", schedule)
