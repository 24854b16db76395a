"""How a run draws timesteps: ways of drawing, and the shift that larger canvases want.

All are uniform over many steps; randomness is a function of the sample's seed or of (run seed, step, position).
Knows no network, so that settings may name the ways without one.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sumizome.data.loader import TrainBatch
from sumizome.diffusion.schedule import NoiseSchedule
from sumizome.seeds import derive_seed
from sumizome.shapes import Timesteps

__all__ = ["DrawTimesteps", "TimestepSampling", "build_timestep_draw", "draw_timesteps", "shifted_timesteps"]

TimestepSampling = Literal["stratified", "uniform"]

DrawTimesteps: TypeAlias = Callable[[TrainBatch, int, Float[Tensor, " b"]], Timesteps]
"""(batch, step, positions of its samples in the global batch, in [0, 1)) → a timestep for each sample, on the CPU."""


def build_timestep_draw(
    sampling: TimestepSampling, schedule: NoiseSchedule, run_seed: int, shift_from: int = 0
) -> DrawTimesteps:
    """How a run draws timesteps; `shift_from` is the side in px of the canvas that the schedule suits, 0 = any."""

    def draw(batch: TrainBatch, step: int, positions: Float[Tensor, " b"]) -> Timesteps:
        return draw_timesteps(sampling, schedule.num_timesteps, batch.seeds, run_seed, step, positions)

    def draw_shifted(batch: TrainBatch, step: int, positions: Float[Tensor, " b"]) -> Timesteps:
        height, width = batch.time_ids[0, 4:].tolist()  # the bucket, px
        return shifted_timesteps(schedule, math.sqrt(height * width) / shift_from)[draw(batch, step, positions)]

    return draw_shifted if shift_from else draw


def draw_timesteps(
    sampling: TimestepSampling,
    num_timesteps: int,
    seeds: Int[Tensor, " b"],
    run_seed: int,
    step: int,
    positions: Float[Tensor, " b"],
) -> Timesteps:
    """A timestep in [0, num_timesteps) for each sample; both ways are uniform over many steps.

    "uniform" draws from the sample's own seed. "stratified" cuts the schedule into one stratum a sample of the global
    batch and shifts them all by one random offset a step, so that each step sees the whole schedule, and the terminal
    step is never missed for long: the loss is less noisy at no cost.
    `positions`: where each sample stands in the global batch, in [0, 1).
    """
    if sampling == "uniform":
        draws = [derive_seed(seed, "timestep") % num_timesteps for seed in seeds.tolist()]
        return torch.tensor(draws, dtype=torch.int64)
    offset = derive_seed(run_seed, "timesteps", step) / 2**63
    return ((positions.double() + offset) % 1.0 * num_timesteps).floor().long().clamp(max=num_timesteps - 1)


@lru_cache(maxsize=256)
def shifted_timesteps(schedule: NoiseSchedule, sigma_factor: float) -> Timesteps:
    """For each timestep [T] the one whose sigma is nearest to `sigma_factor` times its own.

    Drawn uniformly and then read through this table, timesteps are those of a schedule shifted by
    snr / sigma_factor²; the network still sees each timestep at its own noise level. For a canvas of side d and one of
    side d₀ at which the schedule hides a picture equally well, the factor is d / d₀: averaging down by it divides
    the noise. The terminal step keeps its place.
    Source: report §2.3; Hoogeboom et al. 2301.11093 (simple diffusion), eq. 4.
    """
    shifted = schedule.timestep_of(schedule.log_sigmas.exp() * sigma_factor)
    shifted[-1] = schedule.num_timesteps - 1
    return shifted
