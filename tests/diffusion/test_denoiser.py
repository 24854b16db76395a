"""The denoiser against k-diffusion, the report's preconditioner, and networks that are right by construction."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sumizome.diffusion.denoiser import Denoiser
from sumizome.diffusion.prediction import PredictionType, output_from_denoised, training_target
from sumizome.diffusion.schedule import (
    COMFYUI_TERMINAL_ALPHA_CUMPROD,
    TERMINAL_SIGMA,
    NoiseSchedule,
    ScheduleConfig,
    build_noise_schedule,
)
from sumizome.errors import ConfigError

ZERO, PLAIN = (build_noise_schedule(ScheduleConfig(zero_terminal_snr=zero)) for zero in (True, False))


def _noise(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _some_network(noised_latents: Tensor, timesteps: Tensor) -> Tensor:
    """An arbitrary smooth function of both inputs."""
    return torch.tanh(noised_latents * 1.5 + timesteps.view(-1, 1, 1, 1) / 700)


def test_velocity_denoiser_equals_k_diffusion(schedule: NoiseSchedule, k_diffusion) -> None:  # type: ignore[no-untyped-def]
    finite = schedule.with_terminal_alpha_cumprod(COMFYUI_TERMINAL_ALPHA_CUMPROD)

    class Reference(k_diffusion.external.DiscreteVDDPMDenoiser):  # type: ignore[misc, name-defined]
        def get_v(self, x: Tensor, t: Tensor) -> Tensor:
            return _some_network(x, t)

    reference = Reference(None, finite.alphas_cumprod, quantize=True)
    denoise = Denoiser(schedule, "v_prediction", _some_network, torch.float64)
    for sigma in (0.03, 0.7, 14.6, 56.178, 1000, 4518.7637, 20000):
        x = _noise(0, torch.float64) * sigma
        expected = reference(x, torch.full((2,), sigma, dtype=torch.float64))
        torch.testing.assert_close(denoise(x, float(sigma)), expected, rtol=1e-9, atol=1e-9)


def test_epsilon_denoiser_equals_k_diffusion(plain_schedule: NoiseSchedule, k_diffusion) -> None:  # type: ignore[no-untyped-def]
    reference = k_diffusion.external.DiscreteEpsDDPMDenoiser(
        _some_network, plain_schedule.alphas_cumprod, quantize=True
    )
    denoise = Denoiser(plain_schedule, "epsilon", _some_network, torch.float64)
    for sigma in (0.03, 0.7, 14.6):
        x = _noise(1, torch.float64) * sigma
        expected = reference(x, torch.full((2,), sigma, dtype=torch.float64))
        torch.testing.assert_close(denoise(x, sigma), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(
    log_sigma=st.floats(math.log(0.03), math.log(1e8)),
    case=st.sampled_from([("v_prediction", ZERO), ("sample", ZERO), ("v_prediction", PLAIN), ("epsilon", PLAIN)]),
)
def test_exact_output_gives_the_exact_picture(log_sigma: float, case: tuple[PredictionType, NoiseSchedule]) -> None:
    """Whatever the network is asked to predict, the right answer must denoise to the latents, up to any sigma."""
    prediction_type, table = case
    sigma = math.exp(log_sigma)
    latents, noise = _noise(2, torch.float64), _noise(3, torch.float64)
    alphas_cumprod = torch.tensor(1 / (1 + sigma**2), dtype=torch.float64).expand(2)
    target = training_target(prediction_type, latents, noise, alphas_cumprod)
    denoise = Denoiser(table, prediction_type, lambda noised_latents, timesteps: target)
    torch.testing.assert_close(denoise(latents + sigma * noise, sigma), latents, rtol=0, atol=1e-7)


def test_at_infinity_the_answer_is_the_networks_alone(schedule: NoiseSchedule) -> None:
    """Report, App. A.1: c_skip = 0, c_out = −1, and c_in·x is the unit noise."""
    seen: list[Tensor] = []

    def predict(noised_latents: Tensor, timesteps: Tensor) -> Tensor:
        seen.extend((noised_latents, timesteps))
        return _some_network(noised_latents, timesteps)

    noise = _noise(4)
    denoised = Denoiser(schedule, "v_prediction", predict)(noise, math.inf)
    assert torch.equal(seen[0], noise)
    assert seen[1].tolist() == [999, 999]
    assert torch.equal(denoised, -_some_network(*seen))


def test_practical_infinity_is_the_limit(schedule: NoiseSchedule) -> None:
    denoise = Denoiser(schedule, "v_prediction", _some_network)
    noise = _noise(5)
    at_infinity = denoise(noise, math.inf)
    torch.testing.assert_close(denoise(noise * TERMINAL_SIGMA, TERMINAL_SIGMA), at_infinity, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state_of_a_half_precision_network_stays_float32(schedule: NoiseSchedule, dtype: torch.dtype) -> None:
    """At 20000, float16 overflows where |noise| > 3.28."""
    seen: list[torch.dtype] = []

    def predict(noised_latents: Tensor, timesteps: Tensor) -> Tensor:
        seen.append(noised_latents.dtype)
        return -noised_latents

    noise = torch.linspace(-6, 6, 256).reshape(1, 4, 8, 8)
    assert (noise * TERMINAL_SIGMA).half().isinf().any(), "the trap that this guards against"
    denoised = Denoiser(schedule, "v_prediction", predict, dtype)(noise * TERMINAL_SIGMA, TERMINAL_SIGMA)
    assert seen == [dtype]
    assert denoised.dtype == torch.float32
    # D = −F = c_in·x here, so the noise comes back with the rounding of the network's dtype, once.
    torch.testing.assert_close(denoised, noise.to(dtype).float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_whatever_is_predicted_in_half_precision_comes_back_in_float32(
    schedule: NoiseSchedule, prediction_type: PredictionType
) -> None:
    denoise = Denoiser(schedule, prediction_type, _some_network, torch.bfloat16)
    assert denoise(_noise(6), 1.0).dtype == torch.float32


def test_each_row_may_have_its_own_sigma(schedule: NoiseSchedule) -> None:
    denoise = Denoiser(schedule, "v_prediction", _some_network)
    x = _noise(6) * 3
    together = denoise(x, torch.tensor([0.5, 200.0]))
    apart = torch.cat([denoise(x[:1], 0.5), denoise(x[1:], 200.0)])
    torch.testing.assert_close(together, apart)


def test_gaussian_data_is_denoised_as_the_closed_form_says(
    schedule: NoiseSchedule, gaussian_denoiser: Callable[[float, float], Callable[[Tensor, float], Tensor]]
) -> None:
    """A network that holds E[v | noised_latents] of N(μ, s²), exactly at the table's own sigmas."""
    exact = gaussian_denoiser(0.7, 0.4)

    def predict(noised_latents: Tensor, timesteps: Tensor) -> Tensor:
        sigma = float(schedule.sigma_of(timesteps)[0])
        alphas_cumprod = schedule.alphas_cumprod_of(timesteps)
        denoised = exact(noised_latents * math.sqrt(1 + sigma**2), sigma)
        return output_from_denoised("v_prediction", denoised, noised_latents, alphas_cumprod)

    denoise = Denoiser(schedule, "v_prediction", predict, torch.float64)
    for timestep in (0, 300, 700, 998):
        sigma = float(schedule.sigmas[timestep])
        x = 0.7 + _noise(7, torch.float64) * math.sqrt(0.4**2 + sigma**2)
        torch.testing.assert_close(denoise(x, sigma), exact(x, sigma), rtol=0, atol=1e-9)


def test_epsilon_at_zero_terminal_snr_is_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ConfigError, match="0/0"):
        Denoiser(schedule, "epsilon", _some_network)
