"""Second-order ancestral samplers: each step solves the probability flow down to s'²/s, then adds noise up to s'.

The lower level s'²/s has the same middle as the step itself is long: √(s · s'²/s) = s', so the second evaluation of a
step stands at s'. Noise keys: the step. What all samplers share is in `sampler_steps`.

Notation: x = latents + sigma·noise; s, s' = sigma of this step and the next.
"""

from collections.abc import Iterator

from sumizome.diffusion.denoiser import Denoise
from sumizome.diffusion.sampler_steps import HEUN_SIGMA_MAX, NoiseSource, SamplerState, contract, fresh_noise, walk
from sumizome.diffusion.sigmas import Sigmas
from sumizome.shapes import Latents

__all__ = ["dpm2_ancestral", "dpmpp_2s_ancestral"]


def dpm2_ancestral(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource) -> Iterator[SamplerState]:
    """`dpm2` down to s'²/s, then noise: two evaluations a step but for the first from pure noise and the last.

    Source: k-diffusion's DPM2 ancestral; the midpoint rule is Karras et al. 2206.00364, Algorithm 2.
    """
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        lower = sigma_next * (sigma_next / sigma)
        down = contract(x, denoised, lower / sigma)
        if sigma_next > 0:
            if sigma <= HEUN_SIGMA_MAX:
                change = denoise(contract(x, denoised, sigma_next / sigma), sigma_next) - denoised
                down = down + (sigma - lower) / sigma_next * change
            down = down + fresh_noise(sigma, sigma_next) * noise(step)
        x = down
        yield SamplerState(step, sigma, sigma_next, x, denoised)


def dpmpp_2s_ancestral(denoise: Denoise, x: Latents, sigmas: Sigmas, noise: NoiseSource) -> Iterator[SamplerState]:
    """DPM-Solver++(2S) down to s'²/s, then noise: two evaluations a step but for the last.

    Source: DPM-Solver++ 2211.01095, Algorithm 1 with r = ½.
    """
    for step, sigma, sigma_next in walk(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            at_middle = denoise(contract(x, denoised, sigma_next / sigma), sigma_next)
            x = contract(x, at_middle, (sigma_next / sigma) ** 2) + fresh_noise(sigma, sigma_next) * noise(step)
        yield SamplerState(step, sigma, sigma_next, x, denoised)
