"""Samplers: from noise to latents, one generator function each.

`sampler(denoise, x, sigmas, noise)` yields a `SamplerState` after each step, so that progress, previews and
cancellation belong to the caller; the last state's x is the result. Coefficients are Python floats (float64), the
state keeps the dtype of x (float32), and every update is written around `denoised`, never as a difference of numbers
of the size of sigma: so a step from 20000 loses nothing. Gradients are the caller's to switch off.

Notation: x = latents + sigma·noise; s, s' = sigma of this step and the next; λ = −log sigma; h = λ' − λ = log(s/s').
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from sumizome.diffusion.denoiser import Denoise
from sumizome.diffusion.sigmas import Sigmas
from sumizome.errors import ConfigError
from sumizome.shapes import Latents

__all__ = [
    "SAMPLERS",
    "NoiseSource",
    "Sampler",
    "SamplerName",
    "SamplerState",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "heun",
]

NoiseSource: TypeAlias = Callable[[int], Tensor]
"""key → unit Gaussian noise like x. A sampler asks for each key once. Give it a pure function of the key and of each
row's own seed, and a picture is the same alone and in a batch."""

HEUN_SIGMA_MAX = 1000.0
"""Heun's correction multiplies a change of `denoised` by (s − s')/2s', which is 177 from 20000 to 56: a trapezoid over
sigma does not fit a step from infinity. Above this sigma the Euler step stands, whose error is of order 1/s'²."""


@dataclass(frozen=True, slots=True)
class SamplerState:
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


def euler(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource | None = None) -> Iterator[SamplerState]:
    """First order, deterministic (`noise` is not used): equal to DDIM.

    Source: Karras et al. 2206.00364, Algorithm 1 without its correction; report §6.
    """
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = denoise(x, sigma)
        x = _contract(x, denoised, sigma_next / sigma)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def euler_ancestral(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource) -> Iterator[SamplerState]:
    """First order, stochastic: each step goes down to s'²/s, then adds noise back up to s'.

    Noise keys: the step. The textbook √(s'² − up²) for the lower level cancels to 0 in float32 from 20000;
    s'²/s is the same number without the difference.
    Source: DDPM's ancestral sampling (Ho et al. 2006.11239, eq. 7) on the sigma scale; report §6.
    """
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = denoise(x, sigma)
        x = _contract(x, denoised, (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            x = x + _fresh_noise(sigma, sigma_next) * noise(step)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def heun(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource | None = None) -> Iterator[SamplerState]:
    """Second order, deterministic (`noise` is not used), two evaluations a step but for the first from pure noise
    (see HEUN_SIGMA_MAX) and the last.

    With d = (x − D)/s and x' the Euler step, ½(s' − s)(d' − d) is ½(s − s')/s' · (D' − D).
    Source: Karras et al. 2206.00364, Algorithm 1.
    """
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = denoise(x, sigma)
        x = _contract(x, denoised, sigma_next / sigma)
        if sigma_next > 0 and sigma <= HEUN_SIGMA_MAX:
            x = x + (sigma - sigma_next) / (2 * sigma_next) * (denoise(x, sigma_next) - denoised)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def dpmpp_2m(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource | None = None) -> Iterator[SamplerState]:
    """Second order, deterministic (`noise` is not used), one evaluation a step: `denoised` is extrapolated in λ.

    Source: DPM-Solver++ 2211.01095, Algorithm 2 (2M).
    """
    extrapolate = _MidpointExtrapolation()
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = denoise(x, sigma)
        x = _contract(x, extrapolate(denoised, sigma, sigma_next), sigma_next / sigma)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def dpmpp_2m_sde(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource) -> Iterator[SamplerState]:
    """`dpmpp_2m` for the reverse SDE: one evaluation and one noise a step. Noise keys: the step.

    Both want even steps in λ. The native grid's last ones grow, so the line is drawn too far: 28 steps end N(0, 1) with
    a deviation 15 % too large (2M: 4 %), here as in k-diffusion; on the karras grid 3 % (1 %), exponential 1 % (0.5 %).
    Source: SDE-DPM-Solver++ 2211.01095, App. (2M, midpoint), η = 1.
    """
    extrapolate = _MidpointExtrapolation()
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = denoise(x, sigma)
        x = _contract(x, extrapolate(denoised, sigma, sigma_next), (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            x = x + _fresh_noise(sigma, sigma_next) * noise(step)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def dpmpp_sde(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource) -> Iterator[SamplerState]:
    """Single-step solver of the reverse SDE with a midpoint in λ: two evaluations and two noises a step.

    Noise keys: 2·step to the midpoint, 2·step + 1 from there on. Both parts lie on one Brownian path: the noise of the
    whole step is that of its first half, carried on, plus that of its second. Independent noises would halve the order.
    Source: SDE-DPM-Solver++ 2211.01095, App. (2S), η = 1, r = ½.
    """
    for step, sigma, sigma_next in _steps(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            middle = math.sqrt(sigma * sigma_next)
            first_half = _fresh_noise(sigma, middle) * noise(2 * step)
            second_half = _fresh_noise(middle, sigma_next) * noise(2 * step + 1)
            x_middle = _contract(x, denoised, (middle / sigma) ** 2) + first_half
            x = _contract(x, denoise(x_middle, middle), (sigma_next / sigma) ** 2)
            x = x + (sigma_next / middle) ** 2 * first_half + second_half
        yield SamplerState(step, sigma, sigma_next, x, denoised)


SamplerName: TypeAlias = Literal["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde"]

Sampler: TypeAlias = Callable[[Denoise, Tensor, Tensor, NoiseSource], Iterator[SamplerState]]

SAMPLERS: dict[SamplerName, Sampler] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_sde": dpmpp_sde,
}
"""Every sampler by its name; the deterministic ones accept a noise source and leave it alone."""


def _steps(sigmas: Sigmas) -> Iterator[tuple[int, float, float]]:
    """(step, s, s') of each step, as float64."""
    levels: list[float] = sigmas.double().tolist()
    pairs = list(itertools.pairwise(levels))
    if not pairs or not math.isfinite(levels[0]) or any(not s > s_next >= 0 for s, s_next in pairs):
        raise ConfigError(
            f"sigmas must be finite, strictly decreasing and not negative, found {levels}; infinity is TERMINAL_SIGMA"
        )
    return ((step, sigma, sigma_next) for step, (sigma, sigma_next) in enumerate(pairs))


def _contract(x: Latents, towards: Latents, ratio: float) -> Latents:
    """x with its distance from `towards` multiplied by `ratio`.

    ratio = s'/s solves the probability flow exactly for a constant denoised, (s'/s)² the mean of the reverse SDE.
    """
    return towards + ratio * (x - towards)


def _fresh_noise(sigma: float, sigma_next: float) -> float:
    """Standard deviation of the noise that the reverse SDE adds between two levels: s'·√(1 − (s'/s)²)."""
    return sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)


class _MidpointExtrapolation:
    """`denoised` at the middle of a step in λ, on the line through this evaluation and the last."""

    def __init__(self) -> None:
        self._previous: tuple[Tensor, float] | None = None

    def __call__(self, denoised: Latents, sigma: float, sigma_next: float) -> Latents:
        previous, self._previous = self._previous, (denoised, sigma)
        if previous is None or sigma_next == 0:
            # The first step has no line yet; the last is infinitely long in λ, and what it reaches is `denoised`.
            return denoised
        previous_denoised, previous_sigma = previous
        slope = math.log(sigma / sigma_next) / math.log(previous_sigma / sigma)
        return denoised + slope / 2 * (denoised - previous_denoised)
