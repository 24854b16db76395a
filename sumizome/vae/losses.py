"""What a decoded crop is held to: its pixels, its structure, no grid of its own, and features where weights are given.

Each term is a number a sample, so that ranks and micro-batches change nothing. Source: report §4.4 says that a decoder
is finetuned, and why; the losses are ours (docs/decisions.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sumizome.errors import ConfigError
from sumizome.shapes import PerSample, Pixels
from sumizome.vae.blockiness import grid_steps
from sumizome.vae.perceptual import Lpips, load_lpips
from sumizome.vae.similarity import ms_ssim

__all__ = ["DecoderLossConfig", "build_perceptual", "pixel_error", "terms_of"]


@dataclass(frozen=True)
class DecoderLossConfig:
    """Weights of the terms; 0 = off."""

    l1: float = 1.0
    """Mean absolute error, by region."""
    l2: float = 1.0
    """Mean squared error, by region."""
    structure: float = 0.2
    """1 − MS-SSIM."""
    blocking: float = 0.2
    """Small steps on the 8 × 8 grid of JPEG, beyond those elsewhere."""
    lpips: float = 0.0
    """Distance in the features of a VGG16; needs `lpips_weights`."""
    lpips_weights: Path | None = None
    """Your LPIPS weights as safetensors; docs/guide/vae.md says how such a file is made."""

    def __post_init__(self) -> None:
        weights = (self.l1, self.l2, self.structure, self.blocking, self.lpips)
        if min(weights) < 0:
            raise ConfigError("losses: the weights of the terms cannot be negative")
        if not self.l1 + self.l2 > 0:
            raise ConfigError(
                "losses.l1 and losses.l2 are both 0; the other terms do not hold colours: give one of them"
            )
        if self.lpips and self.lpips_weights is None:
            raise ConfigError(
                "losses.lpips is set, but nothing is ever fetched: give your own weights with losses.lpips_weights "
                "(docs/guide/vae.md says how the file is made), or set losses.lpips to 0"
            )


def build_perceptual(config: DecoderLossConfig, device: torch.device) -> Lpips | None:
    """Raises: ModelError for a file that does not hold LPIPS weights."""
    if not config.lpips or config.lpips_weights is None:
        return None
    return load_lpips(config.lpips_weights).to(device)


def pixel_error(decoded: Pixels, pixels: Pixels) -> Pixels:
    """decoded − pixels; nothing where a pixel is fully black or white and the decoder goes beyond it.

    Pictures are clamped when they are written, so a target of ±1 stands for all beyond it.
    """
    error = decoded - pixels
    beyond = (pixels.abs() > 1 - 1 / 255) & (error * pixels > 0)
    return torch.where(beyond, torch.zeros_like(error), error)


def terms_of(
    decoded: Pixels, pixels: Pixels, region: Float[Tensor, "b 1 H W"], config: DecoderLossConfig, lpips: Lpips | None
) -> Mapping[str, PerSample]:
    """The terms that are on, before their weights, float32."""
    error = pixel_error(decoded, pixels)
    shown = pixels + error  # what is off beyond black and white is no error of structure either
    found = {
        "l1": (region * error.abs()).mean(dim=(1, 2, 3)),
        "l2": (region * error.square()).mean(dim=(1, 2, 3)),
    }
    if config.structure:
        found["structure"] = 1 - ms_ssim(shown, pixels)
    if config.blocking:
        found["blocking"] = grid_steps(shown)
    if lpips is not None:
        found["lpips"] = lpips(shown, pixels)
    return {name: term for name, term in found.items() if getattr(config, name)}
