"""Samplers: from noise to latents, one generator function each.

`sampler(denoise, x, sigmas, noise)` yields a `SamplerState` after each step, so that progress, previews and
cancellation belong to the caller; the last state's x is the result. Coefficients are Python floats (float64), the
state keeps the dtype of x (float32), and every update is written around `denoised`, never as a difference of numbers
of the size of sigma: so a step from 20000 loses nothing. Gradients are the caller's to switch off.

Notation: x = latents + sigma·noise; s, s' = sigma of this step and the next; λ = −log sigma; h = λ' − λ = log(s/s').
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from torch import Tensor

from sumizome.diffusion.denoiser import Denoise
from sumizome.diffusion.guidance import denoise_with_unconditional
from sumizome.diffusion.sampler_steps import HEUN_SIGMA_MAX, NoiseSource, SamplerState, contract, fresh_noise, walk
from sumizome.diffusion.samplers_ancestral import dpm2_ancestral, dpmpp_2s_ancestral
from sumizome.diffusion.samplers_multistep import dpmpp_3m_sde, lms, unipc
from sumizome.diffusion.sigmas import Sigmas
from sumizome.shapes import Latents

__all__ = [
    "HEUN_SIGMA_MAX",
    "SAMPLERS",
    "NoiseSource",
    "Sampler",
    "SamplerName",
    "SamplerState",
    "dpm2",
    "dpm2_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "euler_cfg_pp",
    "heun",
    "lms",
    "unipc",
]


def euler(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource | None = None) -> Iterator[SamplerState]:
    """First order, deterministic (`noise` is not used): equal to DDIM.

    Source: Karras et al. 2206.00364, Algorithm 1 without its correction; report §6.
    """
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        x = contract(x, denoised, sigma_next / sigma)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def euler_ancestral(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource) -> Iterator[SamplerState]:
    """First order, stochastic: each step goes down to s'²/s, then adds noise back up to s'.

    Noise keys: the step. The textbook √(s'² − up²) for the lower level cancels to 0 in float32 from 20000;
    s'²/s is the same number without the difference.
    Source: DDPM's ancestral sampling (Ho et al. 2006.11239, eq. 7) on the sigma scale; report §6.
    """
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        x = contract(x, denoised, (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            x = x + fresh_noise(sigma, sigma_next) * noise(step)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def heun(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource | None = None) -> Iterator[SamplerState]:
    """Second order, deterministic (`noise` is not used), two evaluations a step but for the first from pure noise
    (see HEUN_SIGMA_MAX) and the last.

    With d = (x − D)/s and x' the Euler step, ½(s' − s)(d' − d) is ½(s − s')/s' · (D' − D).
    Source: Karras et al. 2206.00364, Algorithm 1.
    """
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        x = contract(x, denoised, sigma_next / sigma)
        if sigma_next > 0 and sigma <= HEUN_SIGMA_MAX:
            x = x + (sigma - sigma_next) / (2 * sigma_next) * (denoise(x, sigma_next) - denoised)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def dpm2(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource | None = None) -> Iterator[SamplerState]:
    """Second order, deterministic (`noise` is not used): the slope is taken at the middle m = √(s·s') of the step.

    Two evaluations a step but for the first from pure noise (see HEUN_SIGMA_MAX) and the last. The step
    x + (s' − s)(x_m − D_m)/m is Euler's plus (s − s')/m · (D_m − D).
    Source: Karras et al. 2206.00364, Algorithm 2 without its noise; the middle in log sigma is k-diffusion's.
    """
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        euler_step = contract(x, denoised, sigma_next / sigma)
        if sigma_next > 0 and sigma <= HEUN_SIGMA_MAX:
            middle = math.sqrt(sigma * sigma_next)
            change = denoise(contract(x, denoised, middle / sigma), middle) - denoised
            euler_step = euler_step + (sigma - sigma_next) / middle * change
        x = euler_step
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def euler_cfg_pp(
    denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource | None = None
) -> Iterator[SamplerState]:
    """Euler with CFG++ (`noise` is not used): the guided picture, renoised with the unguided noise.

    Guidance moves the picture and no longer the noise, so small scales suffice: 1 to 2.5, as in ComfyUI, whose scale
    this is. A denoiser without guidance makes it `euler`.
    Source: Chung et al. 2406.08070, Algorithm 2.
    """
    for step, sigma, sigma_next in walk(sigmas):
        denoised, unconditional = denoise_with_unconditional(denoise, x, sigma)
        x = denoised + sigma_next / sigma * (x - unconditional)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def dpmpp_2m(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource | None = None) -> Iterator[SamplerState]:
    """Second order, deterministic (`noise` is not used), one evaluation a step: `denoised` is extrapolated in λ.

    Source: DPM-Solver++ 2211.01095, Algorithm 2 (2M).
    """
    extrapolate = _MidpointExtrapolation()
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        x = contract(x, extrapolate(denoised, sigma, sigma_next), sigma_next / sigma)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def dpmpp_2m_sde(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource) -> Iterator[SamplerState]:
    """`dpmpp_2m` for the reverse SDE: one evaluation and one noise a step. Noise keys: the step.

    Both want even steps in λ. The native grid's last ones grow, so the line is drawn too far: 28 steps end N(0, 1) with
    a deviation 15 % too large (2M: 4 %), here as in k-diffusion; on the karras grid 3 % (1 %), exponential 1 % (0.5 %).
    Source: SDE-DPM-Solver++ 2211.01095, App. (2M, midpoint), η = 1.
    """
    extrapolate = _MidpointExtrapolation()
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        x = contract(x, extrapolate(denoised, sigma, sigma_next), (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            x = x + fresh_noise(sigma, sigma_next) * noise(step)
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def dpmpp_sde(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource) -> Iterator[SamplerState]:
    """Single-step solver of the reverse SDE with a midpoint in λ: two evaluations and two noises a step.

    Noise keys: 2·step to the midpoint, 2·step + 1 from there on. Both parts lie on one Brownian path: the noise of the
    whole step is that of its first half, carried on, plus that of its second. Independent noises would halve the order.
    Source: SDE-DPM-Solver++ 2211.01095, App. (2S), η = 1, r = ½.
    """
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            middle = math.sqrt(sigma * sigma_next)
            first_half = fresh_noise(sigma, middle) * noise(2 * step)
            second_half = fresh_noise(middle, sigma_next) * noise(2 * step + 1)
            x_middle = contract(x, denoised, (middle / sigma) ** 2) + first_half
            x = contract(x, denoise(x_middle, middle), (sigma_next / sigma) ** 2)
            x = x + (sigma_next / middle) ** 2 * first_half + second_half
        yield SamplerState(step, sigma, sigma_next, x, denoised)


SamplerName: TypeAlias = Literal[
    "euler",
    "euler_ancestral",
    "heun",
    "dpm2",
    "dpm2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "lms",
    "ddim",
    "unipc",
    "euler_cfg_pp",
]

Sampler: TypeAlias = Callable[[Denoise, Tensor, Tensor, NoiseSource], Iterator[SamplerState]]

SAMPLERS: dict[SamplerName, Sampler] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpmpp_sde": dpmpp_sde,
    "lms": lms,
    "ddim": euler,  # on this scale they are one: a test holds it against diffusers' DDIM
    "unipc": unipc,
    "euler_cfg_pp": euler_cfg_pp,
}
"""Every sampler by its name; the deterministic ones accept a noise source and leave it alone."""


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
