"""A network and its schedule as D(x, sigma) → denoised, the one contract that guidance and samplers speak.

Owns the preconditioning and its precision: the state x stays float32 (at sigma 20000 it overflows float16) and only
c_in·x is cast to the network's dtype. Conditioning is the caller's: `predict` closes over it.

Notation: x = latents + sigma·noise; c_in = 1/√(sigma²+1) = √ᾱ, so c_in·x is the VP-scaled input of training.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from sumizome.diffusion.prediction import PredictionType, check_prediction_type, denoised_at_rates, denoised_from_output
from sumizome.diffusion.schedule import NoiseSchedule, signal_and_noise_rates
from sumizome.shapes import Latents, PerSample

__all__ = ["Denoise", "Denoiser", "Predict"]

Predict: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(noised_latents [b c h w] in the network's dtype, timesteps int64 [b]) → model_output [b c h w]."""

Denoise: TypeAlias = Callable[[Tensor, float], Tensor]
"""(x [b c h w], sigma) → denoised [b c h w]: what a sampler calls."""


@dataclass(frozen=True)
class Denoiser:
    """D(x; sigma) = c_skip·x + c_out·F(c_in·x; t) for any prediction type, finite for sigma up to and including inf.

    For velocity c_skip = 1/(sigma²+1) and c_out = −sigma/√(sigma²+1): at infinity D = −F, the network's answer alone.
    The coefficients are those of the exact sigma; the network sees the nearest timestep of the table.

    Raises:
        ConfigError: epsilon on a zero-terminal-SNR schedule.
    Source: report, App. A.1, with sigma_data = 1; Karras et al. 2206.00364, eq. 7.
    """

    schedule: NoiseSchedule
    prediction_type: PredictionType
    predict: Predict
    network_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type, self.schedule)

    def __call__(self, x: Latents, sigma: float | PerSample) -> Latents:
        """The clean latents expected behind `x`, in x's dtype (float32 or more).

        At sigma = inf, x = latents + sigma·noise does not exist: there, and only there, `x` is the unit noise itself,
        which is the limit of c_in·x. Samplers start at TERMINAL_SIGMA instead and never meet this case.
        """
        if isinstance(sigma, float | int) and math.isfinite(sigma):
            return self._at(x, float(sigma))
        sigmas = torch.as_tensor(sigma, dtype=torch.float64, device="cpu").expand(len(x))
        alphas_cumprod = 1 / (1 + sigmas.square())
        c_in, _ = signal_and_noise_rates(torch.where(sigmas.isinf(), 1.0, alphas_cumprod), x)
        noised_latents = c_in * x
        timesteps = self.schedule.timestep_of(sigmas).to(x.device)
        model_output = self.predict(noised_latents.to(self.network_dtype), timesteps).to(noised_latents.dtype)
        return denoised_from_output(self.prediction_type, model_output, noised_latents, alphas_cumprod)

    def _at(self, x: Latents, sigma: float) -> Latents:
        """The same for one finite sigma, in numbers: what a sampler does at every step, without small tensors."""
        signal_rate = 1 / math.sqrt(1 + sigma * sigma)
        noise_rate = sigma * signal_rate
        dtype = x.dtype if x.dtype is torch.float32 else torch.promote_types(x.dtype, torch.float32)
        noised_latents = _cast(x, dtype) * signal_rate
        timestep = bisect.bisect_left(self._boundaries, math.log(sigma)) if sigma > 0 else 0
        timesteps = _timestep_rows(self.schedule.num_timesteps, len(x), x.device)[timestep]
        model_output = _cast(self.predict(_cast(noised_latents, self.network_dtype), timesteps), dtype)
        return denoised_at_rates(self.prediction_type, model_output, noised_latents, signal_rate, noise_rate)

    @cached_property
    def _boundaries(self) -> list[float]:
        """Log sigmas halfway between neighbouring timesteps, as `NoiseSchedule.timestep_of` divides them."""
        log_sigmas = self.schedule.log_sigmas
        boundaries: list[float] = ((log_sigmas[1:] + log_sigmas[:-1]) / 2).tolist()
        return boundaries


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; one that is in it already is not touched, which `to` takes ten times as long to find."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


@lru_cache(maxsize=16)
def _timestep_rows(num_timesteps: int, rows: int, device: torch.device) -> Tensor:
    """int64 [T, rows], row t all t, in the memory of T numbers: a step takes its row instead of filling a tensor."""
    return torch.arange(num_timesteps, device=device)[:, None].expand(-1, rows)
