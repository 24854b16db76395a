"""Samplers that look back over several steps: LMS, DPM-Solver++(3M) of the SDE, UniPC. One evaluation a step.

What all samplers share is in `sampler_steps`; the two-step solvers of the first path are in `samplers`.

Notation: x = latents + sigma·noise; s, s' = sigma of this step and the next; λ = −log sigma; h = log(s/s').
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from sumizome.diffusion.denoiser import Denoise
from sumizome.diffusion.sampler_steps import NoiseSource, SamplerState, contract, fresh_noise, walk
from sumizome.diffusion.sigmas import Sigmas
from sumizome.shapes import Latents

__all__ = ["dpmpp_3m_sde", "lms", "unipc"]

_LMS_ORDER = 4
_UNIPC_ORDER = 2
"""Of the predictor; the corrector raises it by one. Two is what UniPC's authors advise with guidance."""


def lms(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource | None = None) -> Iterator[SamplerState]:
    """Linear multistep of order 4 over sigma, deterministic (`noise` is not used).

    The slopes (x − D)/s of up to four steps lie on a polynomial, whose integral over the step is Σ cᵢ·slopeᵢ. As
    Σ cᵢ = s' − s, that is the Euler step plus the older slopes' differences from this one.
    Source: Adams and Bashforth's method for uneven steps, as k-diffusion has it.
    """
    slopes: deque[tuple[Tensor, float]] = deque(maxlen=_LMS_ORDER)
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        slopes.appendleft((slope, sigma))
        x = contract(x, denoised, sigma_next / sigma)
        coefficients = _adams_coefficients([level for _, level in slopes], sigma_next)
        for coefficient, (older, _) in list(zip(coefficients, slopes, strict=True))[1:]:
            x = x + coefficient * (older - slope)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def _adams_coefficients(levels: Sequence[float], sigma_next: float) -> list[float]:
    """Integral from levels[0] to sigma_next of each Lagrange polynomial over `levels`, exact by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(_LMS_ORDER)
    half = (sigma_next - levels[0]) / 2
    points = levels[0] + half * (nodes + 1)
    coefficients = []
    for index, level in enumerate(levels):
        others = [other for place, other in enumerate(levels) if place != index]
        factors = [(points - other) / (level - other) for other in others]
        coefficients.append(half * float(weights @ np.prod([np.ones_like(points), *factors], axis=0)))
    return coefficients


def dpmpp_3m_sde(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource) -> Iterator[SamplerState]:
    """Three-step solver of the reverse SDE: one evaluation and one noise a step. Noise keys: the step.

    `denoised` is a parabola in λ through this evaluation and the last two, weighted by the exact φ functions of 2h.
    Source: DPM-Solver++ 2211.01095, App. (multistep), η = 1; third order as k-diffusion has it.
    """
    earlier: deque[tuple[Tensor, float]] = deque(maxlen=2)
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h = math.log(sigma / sigma_next)
            x = contract(x, denoised, (sigma_next / sigma) ** 2)
            phi_2 = math.expm1(-2 * h) / (2 * h) + 1
            slope, bend = _differences(denoised, sigma, earlier)
            if slope is not None:
                x = x + phi_2 * h * slope
            if bend is not None:
                x = x - (phi_2 / (2 * h) - 0.5) * h * h * bend
            x = x + fresh_noise(sigma, sigma_next) * noise(step)
        earlier.appendleft((denoised, sigma))
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def _differences(
    denoised: Tensor, sigma: float, earlier: Sequence[tuple[Tensor, float]]
) -> tuple[Tensor | None, Tensor | None]:
    """First and second derivative of `denoised` in λ at `sigma`, by divided differences; None where history is short.

    The second is half of the parabola's, the factor that the φ₃ term above was written for.
    """
    if not earlier:
        return None, None
    last, last_sigma = earlier[0]
    h_1 = math.log(last_sigma / sigma)
    slope = (denoised - last) / h_1
    if len(earlier) < 2:
        return slope, None
    before, before_sigma = earlier[1]
    h_2 = math.log(before_sigma / last_sigma)
    bend = (slope - (last - before) / h_2) / (h_1 + h_2)
    return slope + bend * h_1, bend


def unipc(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource | None = None) -> Iterator[SamplerState]:
    """UniPC, B(h) = e^h − 1, predictor of order 2, deterministic (`noise` is not used).

    An evaluation first corrects the state that it was made at, then predicts the next. The first step and the step to 0
    are of first order.
    Source: Zhao et al. 2302.04867, Algorithms 5 to 8 (data prediction); held against diffusers'.
    """
    history: deque[tuple[Tensor, float]] = deque(maxlen=_UNIPC_ORDER)
    before = x
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        if history:
            x = _unipc_update(before, history, sigma, corrected_with=denoised)
        history.appendleft((denoised, sigma))
        before = x
        x = denoised if sigma_next == 0 else _unipc_update(before, history, sigma_next)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def _unipc_update(
    x: Tensor, history: Sequence[tuple[Tensor, float]], sigma_next: float, corrected_with: Tensor | None = None
) -> Tensor:
    """`x` carried from history[0]'s level to `sigma_next`; `corrected_with` is D at the end of that step."""
    denoised, sigma = history[0]
    h = math.log(sigma / sigma_next)
    places = [math.log(sigma / level) / h for _, level in list(history)[1:]]
    changes = [(older - denoised) / place for (older, _), place in zip(list(history)[1:], places, strict=True)]
    if corrected_with is not None:
        places, changes = [*places, 1.0], [*changes, corrected_with - denoised]
    target = denoised
    for weight, change in zip(_unipc_weights(places, h), changes, strict=True):
        target = target + weight * change
    # x·s'/s + (1 − s'/s)·target, around the smaller of the two.
    return contract(x, denoised, sigma_next / sigma) - math.expm1(-h) * (target - denoised)


def _unipc_weights(places: Sequence[float], h: float) -> list[float]:
    """Weights of the divided differences at `places` (in units of h, 0 = this step's start)."""
    if len(places) < 2:
        return [0.5] * len(places)  # the limit of small h, which B(h) = e^h − 1 permits
    scale = math.expm1(-h)
    phi, factorial, moments = scale / -h - 1, 1, []
    for order in range(1, len(places) + 1):
        moments.append(phi * factorial / scale)
        factorial *= order + 1
        phi = phi / -h - 1 / factorial
    powers = np.vander(np.asarray(places), increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, np.asarray(moments))]
