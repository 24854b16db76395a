"""How timesteps and noise are drawn: uniform over many steps, a function of seed and position alone."""

import pytest
import torch

from sumizome.diffusion.schedule import ScheduleConfig, build_noise_schedule
from sumizome.train.step import draw_noise
from sumizome.train.timesteps import draw_timesteps, shifted_timesteps


def drawn(sampling: str, step: int, rows: int = 16, seed: int = 3) -> torch.Tensor:
    positions = torch.arange(rows) / rows
    seeds = torch.arange(rows) + 1000 * step
    return draw_timesteps(sampling, 1000, seeds, seed, step, positions)


def test_stratified_puts_one_sample_in_each_stratum() -> None:
    for step in range(50):
        timesteps = drawn("stratified", step).sort().values
        gaps = timesteps.diff()
        assert ((gaps == 62) | (gaps == 63)).all()  # 1000/16 = 62.5


def test_both_ways_are_uniform_and_reach_both_ends() -> None:
    for sampling in ("stratified", "uniform"):
        timesteps = torch.cat([drawn(sampling, step) for step in range(2000)])
        assert (int(timesteps.min()), int(timesteps.max())) == (0, 999)
        share = torch.histc(timesteps.double(), bins=10, min=0, max=1000) / len(timesteps)
        # 32 000 draws: the standard deviation of a tenth's share is 0.0017.
        torch.testing.assert_close(share, torch.full((10,), 0.1, dtype=torch.float64), rtol=0, atol=0.008)


def test_the_terminal_step_is_met_as_often_as_any_other() -> None:
    # One of 16 samples in one of 62.5 timesteps: 2000 steps meet t = 999 about 32 times.
    met = sum(int((drawn("stratified", step) == 999).sum()) for step in range(2000))
    assert 15 < met < 60


def test_stratified_depends_on_step_and_position_alone() -> None:
    whole = drawn("stratified", 5)
    positions = torch.arange(16) / 16
    half = draw_timesteps("stratified", 1000, torch.arange(8), 3, 5, positions[8:])
    assert torch.equal(half, whole[8:])  # the second half of the ranks sees its own strata
    assert not torch.equal(drawn("stratified", 6), whole)
    assert not torch.equal(drawn("stratified", 5, seed=4), whole)


def test_noise_is_the_samples_own_whatever_it_is_batched_with() -> None:
    noise = draw_noise(torch.tensor([7, 8, 9]), (4, 8, 8))
    assert noise.shape == (3, 4, 8, 8)
    assert torch.equal(draw_noise(torch.tensor([8]), (4, 8, 8))[0], noise[1])
    many = draw_noise(torch.arange(64), (4, 16, 16))
    assert abs(float(many.mean())) < 0.02  # 65 536 draws: standard deviation 0.004
    assert abs(float(many.std()) - 1) < 0.02


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_shifted_timesteps_are_uniform_ones_of_a_schedule_with_snr_divided(
    factor: float, zero_terminal_snr: bool
) -> None:
    schedule = build_noise_schedule(ScheduleConfig(zero_terminal_snr=zero_terminal_snr))
    drawn_uniformly = torch.cat([drawn("stratified", step, rows=100) for step in range(100)])
    shifted = shifted_timesteps(schedule, factor)[drawn_uniformly]
    assert int(shifted[drawn_uniformly == 999].min()) == 999
    for limit in (0.01, 0.1, 1.0, 10.0):
        # Simple diffusion's shift, by its definition: SNR′ = SNR / factor². Rounding moves a draw by half a step.
        expected = float((schedule.snr / factor**2 > limit).double().mean())
        found = float((schedule.snr[shifted] > limit).double().mean())
        assert abs(found - expected) < 0.003


def test_no_shift_is_no_shift() -> None:
    schedule = build_noise_schedule(ScheduleConfig())
    assert torch.equal(shifted_timesteps(schedule, 1.0), torch.arange(1000))


def test_offset_noise_moves_each_channel_as_a_whole() -> None:
    seeds = torch.arange(400)
    plain, moved = draw_noise(seeds, (4, 8, 8)), draw_noise(seeds, (4, 8, 8), 0.5)
    shift = moved - plain
    assert (shift - shift.mean((2, 3), keepdim=True)).abs().max() < 1e-6
    assert abs(float(shift[:, :, 0, 0].std()) - 0.5) < 0.03
    assert torch.equal(moved[7:8], draw_noise(torch.tensor([7]), (4, 8, 8), 0.5))  # a row's own seed decides
