"""Pictures drawn over others: where sampling starts, and what a mask keeps.

Owns the way from a picture and a mask to latents and back. The invariant: where the mask is black, the finished picture
has the given one's pixels. Mask 1 = drawn anew; the latents outside are held by the denoiser, which knows them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.images import WHITE, Colour, open_image
from sumizome.diffusion.denoiser import Denoise
from sumizome.diffusion.guidance import GuidedDenoiser
from sumizome.errors import DataError
from sumizome.models.vae import encode_pixels, latent_statistics, normalise
from sumizome.picture_request import RedrawConfig
from sumizome.shapes import Latents

__all__ = ["Start", "enlarge", "keep_known", "keep_outside_mask", "load_start"]

_BLACK: Colour = (0, 0, 0)


@dataclass(frozen=True)
class Start:
    """What sampling begins with."""

    latents: Latents
    """Normalised; one row for all of a batch, or one each."""
    mask: Float[Tensor, "m 1 h w"] | None
    """1 = drawn anew, 0 = kept; None = everything is drawn anew."""


def load_start(vae: AutoencoderKL, config: RedrawConfig, canvas: tuple[int, int]) -> Start | None:
    """The picture's latents and the mask at their size; None where `config` names no picture.

    Raises: DataError for a file that is no picture.
    """
    if config.image is None:
        return None
    height, width = canvas
    array = np.asarray(_open(config.image, WHITE).resize((width, height), Image.Resampling.LANCZOS))
    pixels = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = normalise(encode_pixels(vae, pixels), latent_statistics(vae)).cpu()
    if config.mask is None:
        return Start(latents, None)
    mask = torch.from_numpy(np.asarray(_open_mask(config.mask).resize((width, height)), dtype=np.float32) / 255)
    # A latent that touches the white of the mask is drawn anew: what it draws outside is replaced by pixels.
    return Start(latents, functional.adaptive_max_pool2d(mask[None, None], latents.shape[-2:]))


def _open(path: Path, background: Colour) -> Image.Image:
    """The picture as the data's are read: upright, opaque, sRGB."""
    try:
        return open_image(path, background)
    except ImageRejected as error:
        raise DataError(f"{path}: cannot be drawn over: {error}") from error


def _open_mask(path: Path) -> Image.Image:
    """White strokes on nothing are a mask too: what is transparent stays."""
    return _open(path, _BLACK).convert("L")


def keep_known(denoise: Denoise, start: Start) -> Denoise:
    """`denoise` that answers the known latents where the mask is 0, so that every sampler ends there in them."""
    if start.mask is None:
        return denoise
    mask = start.mask

    def blended(x: Latents, denoised: Latents) -> Latents:
        kept = mask.to(x)
        return kept * denoised + (1 - kept) * start.latents.to(x)

    if isinstance(denoise, GuidedDenoiser):
        conditional, paired = denoise.conditional, denoise.paired
        return GuidedDenoiser(
            denoise.config,
            lambda x, sigma: blended(x, conditional(x, sigma)),
            lambda x, sigma: torch.cat([blended(x[: len(x) // 2], half) for half in paired(x, sigma).chunk(2)]),
        )
    return lambda x, sigma: blended(x, denoise(x, sigma))


def enlarge(latents: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """Latents (or a mask) at another (height, width), bicubic; a mask keeps to 0 … 1."""
    larger = functional.interpolate(latents.float(), size=size, mode="bicubic", antialias=True)
    return larger.clamp(0, 1) if latents.shape[1] == 1 else larger


def keep_outside_mask(image: Image.Image, config: RedrawConfig) -> Image.Image:
    """The finished picture with the given one's pixels where the mask is black, blended where it is grey."""
    if config.image is None or config.mask is None:
        return image
    original = _open(config.image, WHITE).resize(image.size, Image.Resampling.LANCZOS)
    return Image.composite(image, original, _open_mask(config.mask).resize(image.size))
