"""Classifier-free guidance: a denoiser that is pushed away from what it would draw without the prompt.

Wraps denoisers and is one. Guidance acts on the velocity, whatever the network predicts: v is c_skip·x − denoised up
to a factor that the formulas do not see (they are homogeneous), so nothing is divided by sigma and nothing fails at
infinity. Row order of the doubled batch: conditional first.
"""

import math
from dataclasses import dataclass

import torch

from sumizome.diffusion.denoiser import Denoise
from sumizome.errors import ConfigError
from sumizome.shapes import Latents

__all__ = ["GuidanceConfig", "GuidedDenoiser", "build_guided_denoiser", "denoise_with_unconditional", "guide"]


@dataclass(frozen=True)
class GuidanceConfig:
    """How strongly, and where along the trajectory, the prompt is enforced."""

    guidance_scale: float = 5.0
    """1 = off. The report finds 3.5 to 5 right for zero terminal SNR, where older models need 7.5."""

    guidance_rescale: float = 0.0
    """φ in 0 … 1, against burnt contrast: how far the guided velocity's spread is brought back to the conditional's.
    0 = off, the report's setting; other programs use 0.7 for such models."""

    skip_above_sigma: float | None = None
    """Above this sigma only the prompt is used, unguided: more varied compositions. None = never skip; 19 is usual."""

    scale_by_sigma: tuple[float, ...] = ()
    """Other scales below given sigmas, as pairs SIGMA SCALE: `20 5 1 3` is 5 below sigma 20 and 3 below sigma 1. At and
    above the largest of these sigmas `guidance_scale` holds."""

    def __post_init__(self) -> None:
        sigmas, scales = self.scale_by_sigma[::2], self.scale_by_sigma[1::2]
        complete = len(sigmas) == len(scales) == len(set(sigmas))
        # Comparisons that nan fails and that infinity does not pass either: it would reach every pixel as nan.
        possible = all(0 < sigma < math.inf for sigma in sigmas) and all(0 <= scale < math.inf for scale in scales)
        if not complete or not possible:
            raise ConfigError(
                "scale_by_sigma must be pairs of different sigmas above 0 and scales of 0 or more, finite numbers all, "
                f"found {' '.join(f'{value:g}' for value in self.scale_by_sigma)}"
            )
        if not 0 <= self.guidance_scale < math.inf:
            raise ConfigError(
                f"guidance_scale must be a finite number of 0 or more (1 = off), found {self.guidance_scale}"
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise ConfigError(f"guidance_rescale must lie in 0 … 1 (0 = off), found {self.guidance_rescale}")
        if self.skip_above_sigma is not None and not math.isfinite(self.skip_above_sigma):
            raise ConfigError(
                f"skip_above_sigma must be a finite sigma, found {self.skip_above_sigma}; leave it out to skip nothing"
            )

    def scale_at(self, sigma: float) -> float:
        """The scale that acts at `sigma`; 1 where guidance is skipped."""
        if self.skips(sigma):
            return 1.0
        pairs = zip(self.scale_by_sigma[::2], self.scale_by_sigma[1::2], strict=True)
        reached = [(level, scale) for level, scale in pairs if sigma < level]
        return min(reached)[1] if reached else self.guidance_scale

    def skips(self, sigma: float) -> bool:
        """Whether only the prompt is used at `sigma`."""
        return self.skip_above_sigma is not None and sigma > self.skip_above_sigma


@dataclass(frozen=True)
class GuidedDenoiser:
    """D guided by `config`, one batch a call: doubled where guidance acts, single where it does not."""

    config: GuidanceConfig
    conditional: Denoise
    """Denoises b rows under their prompts."""
    paired: Denoise
    """Denoises 2b rows, the first b under the prompts and the last b under the negative (or empty) prompts."""

    def __call__(self, x: Latents, sigma: float) -> Latents:
        """The guided denoised [b c h w]; the negative prompt is not asked where the scale is 1."""
        if self.config.scale_at(sigma) == 1:
            return self.conditional(x, sigma)
        return self.with_unconditional(x, sigma)[0]

    def with_unconditional(self, x: Latents, sigma: float) -> tuple[Latents, Latents]:
        """The guided denoised and the negative prompt's, as CFG++ needs both at any scale.

        Where guidance is skipped the prompt's own stands for both.
        """
        if self.config.skips(sigma):
            cond = self.conditional(x, sigma)
            return cond, cond
        cond, uncond = self.paired(torch.cat([x, x]), sigma).chunk(2)
        scale = self.config.scale_at(sigma)
        if scale == 1:
            return cond, uncond
        if self.config.guidance_rescale == 0:
            # On the velocity it is the same line: the skip term falls out.
            return guide(cond, uncond, scale), uncond
        skip = _skip_term(x, sigma)
        return skip - guide(skip - cond, skip - uncond, scale, self.config.guidance_rescale), uncond


def build_guided_denoiser(config: GuidanceConfig, conditional: Denoise, paired: Denoise) -> GuidedDenoiser:
    """D guided by `config`: see GuidedDenoiser for the two denoisers.

    Source: Ho & Salimans 2207.12598; report §6.
    """
    return GuidedDenoiser(config, conditional, paired)


def denoise_with_unconditional(denoise: Denoise, x: Latents, sigma: float) -> tuple[Latents, Latents]:
    """(denoised, denoised without the prompt); a denoiser that knows no guidance answers the same for both."""
    if isinstance(denoise, GuidedDenoiser):
        return denoise.with_unconditional(x, sigma)
    denoised = denoise(x, sigma)
    return denoised, denoised


def guide(
    cond_velocity: Latents, uncond_velocity: Latents, guidance_scale: float, guidance_rescale: float = 0.0
) -> Latents:
    """v_u + s·(v_c − v_u), then blended by φ with itself at the standard deviation of v_c, sample by sample.

    Source: Lin et al. 2305.08891, eqs. 15 and 16.
    """
    guided = torch.lerp(uncond_velocity, cond_velocity, guidance_scale)
    if guidance_rescale == 0:
        return guided
    deviation = guided.std(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(guided.dtype).tiny)
    ratio = cond_velocity.std(dim=(1, 2, 3), keepdim=True) / deviation
    return guided * (guidance_rescale * ratio + (1 - guidance_rescale))


def _skip_term(x: Latents, sigma: float) -> Latents:
    """c_skip·x = x/(sigma²+1), which vanishes at infinity."""
    return x * (1 / (1 + sigma * sigma))
