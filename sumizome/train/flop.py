"""FLOP of training on one image, on any canvas and under any caption, without running it.

Counted as everywhere: a multiplication and an addition are two, the backward pass takes twice the forward pass, and
what checkpointing computes again counts for nothing. Notation: A area of the latents in units of 8 × 8, T tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sumizome.train.meta_pass import GpuKernels, apply_on_meta

__all__ = ["ImageFlop", "UNetFlop", "forward_flop", "image_flop", "unet_flop"]

_UNIT = 8
"""Side in latents that every U-Net of SDXL's kind halves evenly; its square is A = 1."""


@torch.no_grad()
def forward_flop(unet: nn.Module, *, canvas: tuple[int, int], vae_factor: int = 8, tokens: int = 231) -> float:
    """FLOP of one image's forward pass through a U-Net on the meta device, counted operation by operation."""
    kernels = GpuKernels(None)
    with FlopCounterMode(display=False) as counter, kernels:
        apply_on_meta(unet, canvas=canvas, vae_factor=vae_factor, tokens=tokens)
    return float(counter.get_total_flops()) + kernels.attention_flop


@dataclass(frozen=True)
class UNetFlop:
    """A U-Net's forward pass: constant + by_area·A + by_area_squared·A² + by_token·T + by_area_and_token·A·T.

    Exact where the U-Net halves the sides evenly: convolutions and projections are linear in the area, self-attention
    is quadratic, cross-attention projects T tokens and compares them with the area, and time and size are constant.
    """

    constant: float
    by_area: float
    by_area_squared: float
    by_token: float
    by_area_and_token: float
    vae_factor: int

    def __call__(self, canvas: tuple[int, int], tokens: int) -> float:
        """Of one image; `canvas` is (height, width) px, `tokens` the rows of the text condition."""
        area = canvas[0] * canvas[1] / (_UNIT * self.vae_factor) ** 2
        linear = self.constant + self.by_area * area + self.by_token * tokens
        return linear + self.by_area_squared * area**2 + self.by_area_and_token * area * tokens


def unet_flop(unet: nn.Module, vae_factor: int) -> UNetFlop:
    """The closed form of a U-Net on the meta device: five small forward passes determine its five numbers."""
    side = _UNIT * vae_factor

    def measured(area: int, tokens: int) -> float:
        return forward_flop(unet, canvas=(side, area * side), vae_factor=vae_factor, tokens=tokens)

    base, twice, thrice = (measured(area, 1) for area in (1, 2, 3))
    longer, both = measured(1, 2), measured(2, 2)
    by_area_squared = (thrice - 2 * twice + base) / 2
    by_both = both - twice - longer + base
    by_area = twice - base - 3 * by_area_squared - by_both
    by_token = longer - base - by_both
    constant = base - by_area - by_area_squared - by_token - by_both
    return UNetFlop(constant, by_area, by_area_squared, by_token, by_both, vae_factor)


@dataclass(frozen=True)
class ImageFlop:
    """One image's training: forward and backward through the U-Net, and through the text encoders as they are used."""

    unet: UNetFlop
    text: float
    """Of one token."""

    def __call__(self, canvas: tuple[int, int], tokens: int) -> float:
        """`canvas` is (height, width) px, `tokens` the rows of the text condition."""
        return 3 * self.unet(canvas, tokens) + self.text * tokens


def image_flop(
    unet: nn.Module, text_encoders: Iterable[nn.Module], *, vae_factor: int, text_is_trained: bool
) -> ImageFlop:
    """The closed form of a model; its U-Net is on the meta device. Text encoders take 2 FLOP a weight and token."""
    return ImageFlop(unet_flop(unet, vae_factor), 2.0 * _multiplied(text_encoders) * (3 if text_is_trained else 1))


def _multiplied(text_encoders: Iterable[Any]) -> int:
    """Weights that every token is multiplied with: all but those of the embedding, which is a table."""
    return sum(
        sum(parameter.numel() for parameter in encoder.parameters()) - encoder.get_input_embeddings().weight.numel()
        for encoder in text_encoders
    )
