"""The grids against the report's and interop.md's numbers, diffusers and k-diffusion."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from sumizome.diffusion.schedule import (
    COMFYUI_TERMINAL_ALPHA_CUMPROD,
    COMFYUI_TERMINAL_SIGMA,
    TERMINAL_SIGMA,
    NoiseSchedule,
    ScheduleConfig,
    build_noise_schedule,
)
from sumizome.diffusion.sigmas import (
    REMAINDER_SIGMA_MAX,
    Grid,
    SigmaMax,
    build_sigmas,
    scaled_sigma_max,
    starting_sigma,
)
from sumizome.errors import ConfigError

GRIDS: tuple[Grid, ...] = get_args(Grid)
SCHEDULES = [build_noise_schedule(ScheduleConfig(zero_terminal_snr=zero)) for zero in (True, False)]

# fmt: off
NATIVE_28 = [
    20000, 56.1782, 25.8996, 15.9601, 11.0937, 8.2472, 6.4033, 5.1264, 4.1991, 3.5009, 2.9599, 2.5307, 2.183, 1.8964,
    1.6563, 1.4522, 1.2763, 1.1227, 0.9869, 0.8653, 0.7552, 0.654, 0.5598, 0.4703, 0.3832, 0.295, 0.1976, 0.0292, 0,
]
# fmt: on


def test_native_grid_is_the_reports(schedule: NoiseSchedule) -> None:
    """Report §6, interop.md §7."""
    assert build_sigmas("native", 28, schedule).tolist() == pytest.approx(NATIVE_28, abs=6e-5, rel=5e-6)


@pytest.mark.parametrize(
    ("sigma_max", "expected"),
    [(14.6, [14.6, 10.7, 8.3, 6.6, 5.4]), (29.0, [29.0, 17.8, 12.4, 9.2, 7.2])],
)
def test_finite_starts_are_the_reports(schedule: NoiseSchedule, sigma_max: float, expected: list[float]) -> None:
    """Report §2.3: the compared runs of 28 steps."""
    assert build_sigmas("native", 28, schedule, sigma_max)[:5].tolist() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("steps", [1, 2, 5, 28, 50, 999])
def test_native_grid_equals_k_diffusions(schedule: NoiseSchedule, k_diffusion, steps: int) -> None:  # type: ignore[no-untyped-def]
    finite = schedule.with_terminal_alpha_cumprod(COMFYUI_TERMINAL_ALPHA_CUMPROD)
    expected = k_diffusion.external.DiscreteSchedule(finite.sigmas, quantize=True).get_sigmas(steps)
    # The reference holds timesteps in float32.
    torch.testing.assert_close(
        build_sigmas("native", steps, schedule, COMFYUI_TERMINAL_SIGMA), expected.double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("steps", [1, 7, 24, 28, 50, 1000])
def test_trailing_grid_equals_diffusers(schedule: NoiseSchedule, steps: int) -> None:
    reference = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    reference.set_timesteps(steps)
    sigmas = build_sigmas("trailing", steps, schedule)
    assert torch.equal(schedule.timestep_of(sigmas[:-1]), reference.timesteps.long())
    # Its table is a float32 product, off by 1e-3 where ᾱ is about 1e-7; its infinity is 4096.
    torch.testing.assert_close(sigmas[1:], reference.sigmas[1:].double(), rtol=2e-3, atol=0)


def test_karras_and_exponential_equal_k_diffusions_below_a_finite_start(schedule: NoiseSchedule, k_diffusion) -> None:  # type: ignore[no-untyped-def]
    smallest = float(schedule.sigmas[0])
    karras = k_diffusion.sampling.get_sigmas_karras(20, smallest, 14.6)
    torch.testing.assert_close(build_sigmas("karras", 20, schedule, 14.6).float(), karras, rtol=1e-5, atol=0)
    exponential = k_diffusion.sampling.get_sigmas_exponential(20, smallest, 14.6)
    torch.testing.assert_close(build_sigmas("exponential", 20, schedule, 14.6).float(), exponential, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", ["karras", "exponential"])
def test_karras_and_exponential_spend_one_step_on_pure_noise(schedule: NoiseSchedule, grid: Grid) -> None:
    """Spaced from 20000 itself, 16 of karras' 28 steps would lie above 200 (interop.md §5)."""
    sigmas = build_sigmas(grid, 28, schedule)
    assert sigmas[:2].tolist() == pytest.approx([TERMINAL_SIGMA, REMAINDER_SIGMA_MAX])
    torch.testing.assert_close(sigmas[1:], build_sigmas(grid, 27, schedule, REMAINDER_SIGMA_MAX))


def test_remainder_starts_at_the_reports_second_sigma(schedule: NoiseSchedule) -> None:
    assert pytest.approx(float(schedule.sigmas[962]), rel=1e-7) == REMAINDER_SIGMA_MAX


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("infinity", [4096.0, COMFYUI_TERMINAL_SIGMA])
def test_another_programs_infinity_changes_the_first_level_only(
    schedule: NoiseSchedule, grid: Grid, infinity: float
) -> None:
    sigmas, pure = build_sigmas(grid, 28, schedule, infinity), build_sigmas(grid, 28, schedule)
    assert float(sigmas[0]) == infinity
    assert torch.equal(sigmas[1:], pure[1:])


@settings(max_examples=150)
@given(
    grid=st.sampled_from(GRIDS),
    steps=st.integers(1, 60),
    table=st.sampled_from(SCHEDULES),
    sigma_max=st.one_of(st.just("pure"), st.floats(0.3, 14.6), st.floats(14.6, 30000)),
)
def test_every_grid_falls_strictly_from_its_start_to_zero(
    grid: Grid, steps: int, table: NoiseSchedule, sigma_max: SigmaMax
) -> None:
    if sigma_max != "pure" and float(sigma_max) > float(table.sigmas[-1]):
        with pytest.raises(ConfigError, match="zero_terminal_snr"):
            build_sigmas(grid, steps, table, sigma_max)
        return
    try:
        sigmas = build_sigmas(grid, steps, table, sigma_max)
    except ConfigError as error:  # grids of whole timesteps, where a low start leaves too few of them
        assert grid in ("trailing", "simple", "beta") and sigma_max != "pure" and "take fewer" in str(error)
        return
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == steps + 1
    assert float(sigmas[0]) == starting_sigma(sigma_max, table)
    assert sigmas.isfinite().all()
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0


def test_more_native_steps_than_timesteps_stay_strictly_decreasing(schedule: NoiseSchedule) -> None:
    assert (build_sigmas("native", 3000, schedule).diff() < 0).all()


def test_pure_noise_starts_at_practical_infinity_or_at_the_schedules_own_end(
    schedule: NoiseSchedule, plain_schedule: NoiseSchedule
) -> None:
    assert starting_sigma("pure", schedule) == TERMINAL_SIGMA
    assert starting_sigma("pure", plain_schedule) == pytest.approx(14.6146, rel=1e-5)


def test_sigma_max_doubles_with_the_canvas_length() -> None:
    """Report §2.3."""
    assert scaled_sigma_max(14.6, (1024, 1024), (512, 512)) == pytest.approx(29.2)
    assert scaled_sigma_max(14.6, (832, 1216), (512, 512)) == pytest.approx(14.6 * math.sqrt(832 * 1216) / 512)
    assert scaled_sigma_max(14.6, (16, 16), (128, 128)) == pytest.approx(1.83, abs=0.01)


def test_canvas_decides_the_start(schedule: NoiseSchedule) -> None:
    assert starting_sigma("canvas", schedule, (512, 512)) == pytest.approx(14.6146, rel=1e-5)
    assert starting_sigma("canvas", schedule, (1024, 1024)) == pytest.approx(29.229, rel=1e-4)
    with pytest.raises(ConfigError, match="canvas"):
        starting_sigma("canvas", schedule)


@pytest.mark.parametrize("sigma_max", [math.inf, math.nan, 0.0, -1.0, 0.029])
def test_impossible_starts_are_refused(schedule: NoiseSchedule, sigma_max: float) -> None:
    with pytest.raises(ConfigError, match="sigma_max"):
        build_sigmas("native", 28, schedule, sigma_max)


def test_impossible_step_counts_are_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ConfigError, match="found 0"):
        build_sigmas("native", 0, schedule)
    with pytest.raises(ConfigError, match="1001"):
        build_sigmas("trailing", 1001, schedule)


# The first sigmas that ComfyUI's own schedulers give for 28 steps, to the digits that were noted.
@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("native", [4518.76, 56.178, 25.900, 15.960, 11.094, 8.247]),
        ("sgm_uniform", [4518.76, 58.436, 27.013, 16.689]),
        ("simple", [4518.76, 59.653, 27.170, 16.696]),
        ("beta", [4518.76, 317.7, 93.2, 46.5, 27.2]),
        ("kl_optimal", [4518.76, 17.43, 8.70, 5.77]),
    ],
)
def test_grids_are_comfyuis(schedule: NoiseSchedule, grid: Grid, expected: list[float]) -> None:
    assert build_sigmas(grid, 28, schedule, "ui")[: len(expected)].tolist() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 5, 28, 50, 100])
def test_beta_grid_stands_at_scipys_quantiles(plain_schedule: NoiseSchedule, steps: int) -> None:
    quantiles = beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6)
    sigmas = build_sigmas("beta", steps, plain_schedule)
    assert plain_schedule.timestep_of(sigmas[:-1]).tolist() == np.rint(quantiles * 999).tolist()


def test_polyexponential_equals_k_diffusions(schedule: NoiseSchedule, k_diffusion) -> None:  # type: ignore[no-untyped-def]
    expected = k_diffusion.sampling.get_sigmas_polyexponential(20, float(schedule.sigmas[0]), 14.6)
    torch.testing.assert_close(build_sigmas("polyexponential", 20, schedule, 14.6).float(), expected, rtol=1e-5, atol=0)


def test_ui_is_the_infinity_of_other_programs_and_the_canvas_counts_from_its_base(
    schedule: NoiseSchedule, plain_schedule: NoiseSchedule
) -> None:
    assert starting_sigma("ui", schedule) == pytest.approx(4518.7637, abs=1e-3)
    assert starting_sigma("ui", plain_schedule) == float(plain_schedule.sigmas[-1])
    assert starting_sigma("canvas", schedule, (1024, 2048), 10.0) == pytest.approx(10 * math.sqrt(8))
