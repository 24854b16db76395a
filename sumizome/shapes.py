"""The tensors of the system by name, so that a signature says what flows through it.

Notation: `b` batch, `c` channels, `h w` the latent grid, `H W` pixels (H = 8·h for SDXL's VAE), `n` prompt tokens
(77 a chunk). (height, width) everywhere; (width, height) only at Pillow's boundary.
"""

from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

Latents: TypeAlias = Float[Tensor, "b c h w"]
"""A latent batch: clean and normalised unless the name says otherwise (`noised_latents`, `x`)."""

Pixels: TypeAlias = Float[Tensor, "b 3 H W"]
"""An RGB batch in [-1, 1]."""

PerSample: TypeAlias = Float[Tensor, " b"]
"""One number a sample: a loss, a weight, a sigma."""

Timesteps: TypeAlias = Int[Tensor, " b"]
"""int64, 0 = least noise."""

Table: TypeAlias = Float[Tensor, " timesteps"]
"""One number a timestep, float64."""

PromptEmbeds: TypeAlias = Float[Tensor, "b n d"]
"""Penultimate states of both text encoders side by side: d = 768 + 1280 = 2048 for SDXL, n = 77·chunks."""

PooledPromptEmbeds: TypeAlias = Float[Tensor, "b p"]
"""The second text encoder's projected pooled state: p = 1280 for SDXL."""

TimeIds: TypeAlias = Float[Tensor, "b 6"]
"""SDXL's micro-conditioning in pixels: original (h, w), crop (top, left), target (h, w)."""
