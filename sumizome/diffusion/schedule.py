"""The noise schedule: one table of ᾱ, SDXL's own or rescaled to zero terminal SNR, and its readings.

Owns the maps between timestep, sigma and SNR, and the forward process. It does not decide which timesteps are drawn
(the trainer) or visited (`sigmas.py`). Tables are float64 on the CPU; what touches latents is computed in float64 and
cast once, to at least float32, because ᾱ ≈ 2e-9 underflows in half precision.

Notation: ᾱ = `alphas_cumprod`, sigma = √((1−ᾱ)/ᾱ), snr = ᾱ/(1−ᾱ) = 1/sigma², T = `num_timesteps`, t in 0 … T−1.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from sumizome.errors import ConfigError
from sumizome.shapes import Latents, PerSample, Table, Timesteps

__all__ = [
    "COMFYUI_TERMINAL_ALPHA_CUMPROD",
    "COMFYUI_TERMINAL_SIGMA",
    "DIFFUSERS_TERMINAL_ALPHA_CUMPROD",
    "TERMINAL_SIGMA",
    "NoiseSchedule",
    "ScheduleConfig",
    "build_noise_schedule",
    "rescale_to_zero_terminal_snr",
    "signal_and_noise_rates",
]

TERMINAL_SIGMA = 20000.0
"""Infinity for samplers, whose state is on the sigma scale. Source: report, App. A.2 ("practical infinity")."""

COMFYUI_TERMINAL_ALPHA_CUMPROD = 4.8973451890853435e-08
"""ᾱ at t = T−1 in ComfyUI, Forge and A1111, which need it above 0."""

COMFYUI_TERMINAL_SIGMA = math.sqrt((1 - COMFYUI_TERMINAL_ALPHA_CUMPROD) / COMFYUI_TERMINAL_ALPHA_CUMPROD)
"""4518.76: the infinity of those programs. The network cannot tell it from 20000: both are t = T−1."""

DIFFUSERS_TERMINAL_ALPHA_CUMPROD = 2.0**-24
"""ᾱ at t = T−1 in diffusers' Euler and DPM++ schedulers: sigma 4096, which float16 can still hold."""


@dataclass(frozen=True)
class ScheduleConfig:
    """SDXL's scaled-linear betas, ended at pure noise or left as they were."""

    zero_terminal_snr: bool = True
    """Rescale so that the last timestep is pure noise.
    Off is SDXL's own schedule: it stops at sigma 14.6, where the picture's mean brightness can still be read."""

    beta_start: float = 0.00085
    """First beta. SDXL's value."""

    beta_end: float = 0.012
    """Last beta, before rescaling. SDXL's value."""

    num_timesteps: int = 1000
    """Length of the table. SDXL's time embedding was trained on 0 … 999."""

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"betas must satisfy 0 < beta_start <= beta_end < 1, found {self.beta_start} and {self.beta_end}; "
                "SDXL uses 0.00085 and 0.012"
            )
        if self.num_timesteps < 3:
            raise ConfigError(f"num_timesteps must be at least 3, found {self.num_timesteps}; SDXL uses 1000")


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """The table and everything that is read off it.

    Raises:
        ConfigError: the table is not float64, or not strictly decreasing within 1 > ᾱ >= 0.
    """

    alphas_cumprod: Table
    """[T] float64, strictly decreasing from near 1; the last entry is exactly 0 at zero terminal SNR."""

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.dtype != torch.float64 or len(table) < 3:
            raise ConfigError(
                f"alphas_cumprod must be float64 with 3 entries or more, found {table.dtype} {len(table)}"
            )
        if not (table[0] < 1 and table[-1] >= 0 and bool((table.diff() < 0).all())):
            raise ConfigError("alphas_cumprod must fall strictly from below 1 to 0 or above; check the betas")

    def __repr__(self) -> str:
        return f"NoiseSchedule({self.num_timesteps} timesteps, sigma {self.sigmas[0]:.4g} … {self.sigmas[-1]:.6g})"

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise: ᾱ = 0 exactly."""
        return bool(self.alphas_cumprod[-1] == 0)

    @cached_property
    def sigmas(self) -> Table:
        """[T], increasing; the last is inf at zero terminal SNR."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @cached_property
    def snr(self) -> Table:
        """[T], decreasing; the last is 0 at zero terminal SNR."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def log_sigmas(self) -> Table:
        """[T], increasing and finite: a terminal infinity is replaced by the geometric continuation of the table.

        On SDXL's rescaled table that is log 4518.765, within 3e-7 of ComfyUI's own constant. So whatever a program
        uses for infinity (4096, 4518.76, 20000) is nearest to the terminal timestep.
        """
        log_sigmas = self.sigmas.log()
        if self.zero_terminal_snr:
            log_sigmas[-1] = 2 * log_sigmas[-2] - log_sigmas[-3]
        return log_sigmas

    @property
    def betas(self) -> Table:
        """[T]: β_t = 1 − ᾱ_t/ᾱ_{t−1}, the form in which diffusers' configs carry a schedule (`trained_betas`)."""
        previous = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / previous

    def with_terminal_alpha_cumprod(self, alpha_cumprod: float) -> "NoiseSchedule":
        """The same table with another last entry, for programs that need ᾱ > 0 there."""
        last = self.alphas_cumprod.new_tensor([alpha_cumprod])
        return NoiseSchedule(torch.cat([self.alphas_cumprod[:-1], last]))

    def alphas_cumprod_of(self, timesteps: Timesteps) -> PerSample:
        """ᾱ of each sample, float64 on the CPU."""
        return self.alphas_cumprod[timesteps.cpu()]

    def sigma_of(self, timesteps: Timesteps | PerSample) -> PerSample:
        """Sigma of each timestep, float64 on the CPU; between table entries, log sigma is interpolated.

        Inverse of `fractional_timestep_of` on 0 … T−1, the terminal infinity included.
        """
        timesteps = timesteps.cpu().double()
        low = timesteps.floor().long()
        high = timesteps.ceil().long()
        between = torch.lerp(self.log_sigmas[low], self.log_sigmas[high], timesteps - low).exp()
        return torch.where(low == high, self.sigmas[low], between)

    def timestep_of(self, sigma: PerSample) -> Timesteps:
        """The timestep nearest in log sigma, int64 on the CPU; inf gives T−1, 0 gives 0.

        Source: k-diffusion's quantised denoiser and ComfyUI, which agree: 1000 → 997, 200 → 988, 56 → 962.
        """
        midpoints = (self.log_sigmas[1:] + self.log_sigmas[:-1]) / 2
        return torch.bucketize(sigma.cpu().double().log(), midpoints)

    def fractional_timestep_of(self, sigma: PerSample) -> PerSample:
        """The timestep at which interpolated log sigma equals the given one, float64, clamped to 0 … T−1."""
        log_sigma = sigma.cpu().double().log().clamp(self.log_sigmas[0], self.log_sigmas[-1])
        high = torch.searchsorted(self.log_sigmas, log_sigma).clamp(1, self.num_timesteps - 1)
        below, above = self.log_sigmas[high - 1], self.log_sigmas[high]
        return high - 1 + (log_sigma - below) / (above - below)

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Timesteps) -> Latents:
        """√ᾱ·latents + √(1−ᾱ)·noise, at least float32: the U-Net's input, and pure noise where ᾱ = 0."""
        signal_rate, noise_rate = signal_and_noise_rates(self.alphas_cumprod_of(timesteps), latents)
        return signal_rate * latents + noise_rate * noise


def build_noise_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The schedule that `config` describes.

    Source: report §2.2; betas = linspace(√beta_start, √beta_end, T)², SDXL's "scaled linear".
    """
    start, end = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
    betas = torch.linspace(start, end, config.num_timesteps, dtype=torch.float64).square()
    alphas_cumprod = (1 - betas).cumprod(0)
    if config.zero_terminal_snr:
        alphas_cumprod = rescale_to_zero_terminal_snr(alphas_cumprod)
    return NoiseSchedule(alphas_cumprod)


def rescale_to_zero_terminal_snr(alphas_cumprod: Table) -> Table:
    """The table shifted and scaled in √ᾱ so that the first entry stays and the last is exactly 0.

    SNR and loss weights must be read from the result, never from the table before: at t = 980 the SNR before is 76
    times too large.
    Source: Lin et al. 2305.08891, Algorithm 1.
    """
    rates = alphas_cumprod.sqrt()
    first, last = rates[0], rates[-1]
    return ((rates - last) * (first / (first - last))).square()


def signal_and_noise_rates(
    alphas_cumprod: PerSample, like: Latents
) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
    """√ᾱ and √(1−ᾱ), taken in the precision of `alphas_cumprod`, ready to multiply `like`: at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    rates = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    signal_rate, noise_rate = (rate.to(like.device, dtype).view(-1, 1, 1, 1) for rate in rates)
    return signal_rate, noise_rate
