"""Decoding in overlapping tiles, for canvases whose whole decode does not fit into memory.

The VAE's attention and group statistics see a tile instead of the picture, so tiles differ a little in tone; they are
blended over their overlap. Notation: sides in pixels, f = the VAE's factor.
"""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from sumizome.errors import ConfigError
from sumizome.models.vae import decode_latents, vae_factor
from sumizome.shapes import Latents, Pixels

__all__ = ["decode_in_tiles"]

_OVERLAP = 4
"""A tile shares a quarter of its side with its neighbour."""
_SMALLEST = 16
"""Latents along a tile's side."""


def decode_in_tiles(vae: AutoencoderKL, latents: Latents, tile: int = 0) -> Pixels:
    """`vae.decode_latents`, at most `tile`×`tile` pixels at a time; 0 = whole, as are pictures that fit into a tile.

    Raises: ConfigError for tiles of less than 16 latents a side.
    """
    factor = vae_factor(vae)
    if tile == 0 or max(latents.shape[-2:]) * factor <= tile:
        return decode_latents(vae, latents)
    side = tile // factor
    if side < _SMALLEST:
        raise ConfigError(f"decode_tile must be {_SMALLEST * factor} pixels or more (0 = whole), found {tile}")
    height, width = (size * factor for size in latents.shape[-2:])
    pixels = torch.zeros(len(latents), 3, height, width)
    weights = torch.zeros(1, 1, height, width)
    for top in _starts(latents.shape[-2], side):
        for left in _starts(latents.shape[-1], side):
            part = decode_latents(vae, latents[..., top : top + side, left : left + side]).cpu()
            ramp = _ramp(part.shape[-2])[:, None] * _ramp(part.shape[-1])[None, :]
            place = (..., slice(top * factor, (top + side) * factor), slice(left * factor, (left + side) * factor))
            pixels[place] += part * ramp
            weights[place] += ramp
    return pixels / weights


def _starts(length: int, side: int) -> Iterator[int]:
    """First latents of tiles that cover `length`, evenly spread."""
    if length <= side:
        yield 0
        return
    count = -(-(length - side) // (side - side // _OVERLAP)) + 1
    yield from (round(index * (length - side) / (count - 1)) for index in range(count))


def _ramp(length: int) -> Float[Tensor, " length"]:
    """Weights of a tile's pixels along one side: rising over the overlap from near 0 to 1."""
    overlap = length // _OVERLAP
    places = torch.arange(length) + 0.5
    return (torch.minimum(places, length - places) / overlap).clamp(max=1)
