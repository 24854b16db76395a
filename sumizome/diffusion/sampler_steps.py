"""What every sampler shares: the state that it yields, its walk over the grid, and its two elementary moves.

Owns no solver. Coefficients are Python floats (float64); the state keeps its own dtype (float32). The invariant: an
update is written around `denoised`, never as a difference of numbers of the size of sigma, so a step from 20000 loses
nothing.

Notation: x = latents + sigma·noise; s, s' = sigma of this step and the next.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sumizome.diffusion.sigmas import Sigmas
from sumizome.errors import ConfigError
from sumizome.shapes import Latents

__all__ = ["HEUN_SIGMA_MAX", "NoiseSource", "SamplerState", "contract", "fresh_noise", "walk"]

NoiseSource: TypeAlias = Callable[[int], Tensor]
"""key → unit Gaussian noise like x. A sampler asks for each key once. Give it a pure function of the key and of each
row's own seed, and a picture is the same alone and in a batch."""

HEUN_SIGMA_MAX = 1000.0
"""Heun's correction multiplies a change of `denoised` by (s − s')/2s', which is 177 from 20000 to 56: a trapezoid over
sigma does not fit a step from infinity. Above this sigma the Euler step stands, whose error is of order 1/s'²."""


class SamplerState(NamedTuple):
    """Where a sampler is after a step."""

    step: int
    """0 for the first."""

    sigma: float
    """The level that the step left, at which `denoised` was predicted."""

    sigma_next: float
    """The level that the step reached: that of `x`. 0 after the last."""

    x: Latents
    """latents + sigma_next·noise; the sampled latents when sigma_next is 0."""

    denoised: Latents
    """D(x; sigma): the picture as foreseen in this step, for previews."""


def walk(sigmas: Sigmas) -> Iterator[tuple[int, float, float]]:
    """(step, s, s') of each step, as float64."""
    levels: list[float] = sigmas.double().tolist()
    pairs = list(itertools.pairwise(levels))
    if not pairs or not math.isfinite(levels[0]) or any(not s > s_next >= 0 for s, s_next in pairs):
        raise ConfigError(
            f"sigmas must be finite, strictly decreasing and not negative, found {levels}; infinity is TERMINAL_SIGMA"
        )
    return ((step, sigma, sigma_next) for step, (sigma, sigma_next) in enumerate(pairs))


def contract(x: Latents, towards: Latents, ratio: float) -> Latents:
    """x with its distance from `towards` multiplied by `ratio`.

    ratio = s'/s solves the probability flow exactly for a constant denoised, (s'/s)² the mean of the reverse SDE.
    """
    return torch.lerp(towards, x, ratio)


def fresh_noise(sigma: float, sigma_next: float) -> float:
    """Standard deviation of the noise that the reverse SDE adds between two levels: s'·√(1 − (s'/s)²)."""
    return sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
