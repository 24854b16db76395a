"""The table against the report, interop.md, diffusers and k-diffusion; its maps against their own inverses."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sumizome.diffusion.schedule import (
    COMFYUI_TERMINAL_ALPHA_CUMPROD,
    COMFYUI_TERMINAL_SIGMA,
    DIFFUSERS_TERMINAL_ALPHA_CUMPROD,
    TERMINAL_SIGMA,
    NoiseSchedule,
    ScheduleConfig,
    build_noise_schedule,
    rescale_to_zero_terminal_snr,
)
from sumizome.errors import ConfigError

SCHEDULES = [build_noise_schedule(ScheduleConfig(zero_terminal_snr=zero)) for zero in (True, False)]
SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# fmt: off
SIGMAS_980_TO_998 = [
    113.9, 120.5, 127.88, 136.17, 145.58, 156.33, 168.74, 183.22, 200.33, 220.86, 245.95, 277.33, 317.67, 371.45,
    446.76, 559.72, 748.00, 1124.55, 2254.24,
]
# fmt: on


def test_rescaled_sigmas_are_the_reports(schedule: NoiseSchedule) -> None:
    for timestep, sigma in {0: 0.0291672, 900: 18.35, 962: 56.18, 990: 245.95, 997: 1124.6, 998: 2254.24}.items():
        assert float(schedule.sigmas[timestep]) == pytest.approx(sigma, rel=3e-4)
    assert schedule.sigmas[980:999].tolist() == pytest.approx(SIGMAS_980_TO_998, rel=1e-4)


def test_last_step_is_exactly_pure_noise(schedule: NoiseSchedule) -> None:
    assert schedule.zero_terminal_snr
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.snr[-1] == 0
    assert schedule.sigmas[-1] == math.inf
    assert schedule.log_sigmas.isfinite().all()


def test_unrescaled_sigmas_are_sdxls(plain_schedule: NoiseSchedule) -> None:
    assert not plain_schedule.zero_terminal_snr
    assert float(plain_schedule.sigmas[0]) == pytest.approx(0.0291672, rel=1e-5)
    assert float(plain_schedule.sigmas[-1]) == pytest.approx(14.6146, rel=1e-5)


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
def test_table_equals_diffusers(zero_terminal_snr: bool) -> None:
    ours = build_noise_schedule(ScheduleConfig(zero_terminal_snr=zero_terminal_snr))
    theirs = DDPMScheduler(**SDXL_BETAS, rescale_betas_zero_snr=zero_terminal_snr).alphas_cumprod
    # diffusers multiplies a thousand float32 betas; 3e-6 is what that costs it.
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs, rtol=0, atol=3e-6)


def test_snr_is_read_after_the_rescale(schedule: NoiseSchedule, plain_schedule: NoiseSchedule) -> None:
    """peers.md, trap 1: the table from before is 4.8×, 14× and 76× too large."""
    ratio = plain_schedule.snr / schedule.snr
    assert float(ratio[900]) == pytest.approx(4.8, rel=0.02)
    assert float(ratio[950]) == pytest.approx(14, rel=0.02)
    assert float(ratio[980]) == pytest.approx(76, rel=0.02)


def test_rescaling_keeps_the_first_entry_and_can_be_repeated(plain_schedule: NoiseSchedule) -> None:
    once = rescale_to_zero_terminal_snr(plain_schedule.alphas_cumprod)
    assert float(once[0]) == pytest.approx(float(plain_schedule.alphas_cumprod[0]), rel=1e-15)
    torch.testing.assert_close(rescale_to_zero_terminal_snr(once), once)


def test_terminal_constants_of_other_programs() -> None:
    assert pytest.approx(4518.7637, rel=1e-7) == COMFYUI_TERMINAL_SIGMA
    assert pytest.approx(4096, rel=1e-7) == (1 / DIFFUSERS_TERMINAL_ALPHA_CUMPROD - 1) ** 0.5


def test_geometric_continuation_of_the_table_is_comfyuis_constant(schedule: NoiseSchedule) -> None:
    assert float(schedule.log_sigmas[-1].exp()) == pytest.approx(COMFYUI_TERMINAL_SIGMA, rel=1e-6)


def test_nearest_timesteps_are_comfyuis(schedule: NoiseSchedule) -> None:
    sigmas = torch.tensor([math.inf, TERMINAL_SIGMA, COMFYUI_TERMINAL_SIGMA, 4096, 1000, 200, 56, 0])
    assert schedule.timestep_of(sigmas).tolist() == [999, 999, 999, 999, 997, 988, 962, 0]


def test_timesteps_equal_k_diffusions(schedule: NoiseSchedule, k_diffusion) -> None:  # type: ignore[no-untyped-def]
    finite = schedule.with_terminal_alpha_cumprod(COMFYUI_TERMINAL_ALPHA_CUMPROD)
    theirs = k_diffusion.external.DiscreteSchedule(finite.sigmas, quantize=True)
    sigmas = torch.logspace(math.log10(0.03), math.log10(2200), 1999, dtype=torch.float64)
    assert torch.equal(schedule.timestep_of(sigmas), theirs.sigma_to_t(sigmas))
    fractional = theirs.sigma_to_t(sigmas, quantize=False)
    torch.testing.assert_close(schedule.fractional_timestep_of(sigmas), fractional, rtol=0, atol=1e-4)
    between = schedule.sigma_of(fractional)
    torch.testing.assert_close(between, theirs.t_to_sigma(fractional), rtol=1e-4, atol=0)


@given(timestep=st.floats(0, 999), table=st.sampled_from(SCHEDULES))
def test_timestep_to_sigma_and_back(timestep: float, table: NoiseSchedule) -> None:
    there = table.sigma_of(torch.tensor([timestep], dtype=torch.float64))
    assert float(table.fractional_timestep_of(there)) == pytest.approx(timestep, abs=1e-7)


@pytest.mark.parametrize("table", SCHEDULES)
def test_every_entry_is_its_own_nearest(table: NoiseSchedule) -> None:
    timesteps = torch.arange(1000)
    assert torch.equal(table.sigma_of(timesteps), table.sigmas)
    assert torch.equal(table.timestep_of(table.sigmas), timesteps)


def test_sigma_and_snr_say_the_same(schedule: NoiseSchedule) -> None:
    torch.testing.assert_close(schedule.snr[:-1], schedule.sigmas[:-1] ** -2)


def test_betas_rebuild_the_table(schedule: NoiseSchedule) -> None:
    exported = schedule.with_terminal_alpha_cumprod(DIFFUSERS_TERMINAL_ALPHA_CUMPROD)
    torch.testing.assert_close((1 - exported.betas).cumprod(0), exported.alphas_cumprod)
    trained = EulerDiscreteScheduler(trained_betas=exported.betas.tolist())
    assert float(trained.sigmas[0]) == pytest.approx(4096, rel=1e-3)


def test_noised_latents_equal_diffusers(schedule: NoiseSchedule) -> None:
    latents, noise = torch.randn(2, 5, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 139, 500, 962, 999])
    reference = DDPMScheduler(**SDXL_BETAS, rescale_betas_zero_snr=True)
    noised_latents = schedule.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noised_latents, reference.add_noise(latents, noise, timesteps), rtol=1e-4, atol=1e-4)
    assert torch.equal(noised_latents[-1], noise[-1]), "t = 999 must be the noise itself, bit for bit"


def test_half_precision_latents_are_noised_in_float32(schedule: NoiseSchedule) -> None:
    latents, noise = torch.ones(1, 4, 1, 1, dtype=torch.float16), torch.zeros(1, 4, 1, 1, dtype=torch.float16)
    noised_latents = schedule.add_noise(latents, noise, torch.tensor([998]))
    assert noised_latents.dtype == torch.float32
    assert float(noised_latents[0, 0]) == pytest.approx(1 / 2254.24, rel=1e-5)


@settings(max_examples=50)
@given(
    start=st.floats(1e-5, 0.01),
    stretch=st.floats(1.0, 10.0),
    num_timesteps=st.integers(3, 300),
    zero_terminal_snr=st.booleans(),
)
def test_any_schedule_falls_strictly(start: float, stretch: float, num_timesteps: int, zero_terminal_snr: bool) -> None:
    table = build_noise_schedule(ScheduleConfig(zero_terminal_snr, start, start * stretch, num_timesteps))
    assert table.num_timesteps == num_timesteps
    assert table.zero_terminal_snr == zero_terminal_snr
    assert (table.sigmas.diff() > 0).all()
    assert (table.log_sigmas.diff() > 0).all()


@pytest.mark.parametrize(
    ("settings_", "found"),
    [({"beta_start": 0.5, "beta_end": 0.1}, "0.5"), ({"beta_end": 1.0}, "1.0"), ({"num_timesteps": 2}, "2")],
)
def test_impossible_settings_are_named(settings_: dict[str, float], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        ScheduleConfig(**settings_)  # type: ignore[arg-type]


def test_a_table_that_rises_is_refused() -> None:
    with pytest.raises(ConfigError, match="fall strictly"):
        NoiseSchedule(torch.tensor([0.9, 0.5, 0.6], dtype=torch.float64))
    with pytest.raises(ConfigError, match="float32"):
        NoiseSchedule(torch.tensor([0.9, 0.5, 0.4]))
