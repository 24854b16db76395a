"""Pixels to latents and back through an AutoencoderKL, and the numbers that make latents unit-sized.

Owns encoding (the posterior's mean, float32, no sampling), decoding and normalisation. It loads nothing. The invariant:
`normalise` and `denormalise` are each other's inverse, and normalised latents are what the U-Net sees.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sumizome.errors import ConfigError
from sumizome.models.architecture import SDXL_SCALING_FACTOR, latent_scale
from sumizome.models.key_map import native_name
from sumizome.shapes import Latents, Pixels

__all__ = [
    "LatentStatistics",
    "apply_latent_statistics",
    "decode_latents",
    "denormalise",
    "encode_pixels",
    "fold_latent_statistics",
    "latent_statistics",
    "model_digest",
    "normalise",
    "tensors_digest",
    "vae_digest",
    "vae_factor",
]


@dataclass(frozen=True)
class LatentStatistics:
    """normalised = (raw − mean) / std, per latent channel.

    SDXL's single scaling factor is mean 0, std 1/0.13025 in every channel; the report's appendix B gives each
    channel its own.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


def latent_statistics(vae: AutoencoderKL) -> LatentStatistics:
    """The statistics in a VAE's config: `scaling_factor`, and `latents_mean` and `latents_std` where it has both.

    One of them alone counts for nothing, as in diffusers. Raises: ConfigError unless there is one for every channel.
    """
    channels = vae.config["latent_channels"]
    factor, mean, std = latent_scale(dict(vae.config))
    mean, std = mean or (0.0,) * channels, std or (1.0,) * channels
    if not len(mean) == len(std) == channels:
        raise ConfigError(f"the VAE's config has {len(mean)} means and {len(std)} deviations for {channels} channels")
    return LatentStatistics(tuple(map(float, mean)), tuple(float(s) / factor for s in std))


def normalise(raw: Latents, statistics: LatentStatistics) -> Latents:
    """Raw VAE latents as the U-Net sees them: (raw − mean) / std, float32."""
    mean, std = _columns(statistics, raw)
    return (raw.float() - mean) / std


def denormalise(latents: Latents, statistics: LatentStatistics) -> Latents:
    """The inverse of `normalise`, float32."""
    mean, std = _columns(statistics, latents)
    return latents.float() * std + mean


def _columns(statistics: LatentStatistics, like: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(statistics.mean, dtype=torch.float32, device=like.device)
    std = torch.tensor(statistics.std, dtype=torch.float32, device=like.device)
    return mean[None, :, None, None], std[None, :, None, None]


def vae_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent along one side: 8 for SDXL, 4 for the tiny model."""
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Pixels) -> Latents:
    """Raw latents [b, 4, H/f, W/f] float32: the posterior's mean, so that a picture always gives the same latents.

    Raises: ValueError if a side is no multiple of the VAE's factor f.
    """
    factor = vae_factor(vae)
    if pixels.shape[-2] % factor or pixels.shape[-1] % factor:
        raise ValueError(f"pixels of {tuple(pixels.shape[-2:])} are no multiple of the VAE's factor {factor}")
    mode: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return mode.float()


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Latents) -> Pixels:
    """Pixels [b, 3, f·h, f·w] in [-1, 1], float32, of normalised latents."""
    raw = denormalise(latents, latent_statistics(vae)).to(vae.device, vae.dtype)
    pixels: Tensor = vae.decode(raw).sample
    return pixels.float().clamp(-1, 1)


def apply_latent_statistics(vae: AutoencoderKL, mean: Sequence[float], std: Sequence[float]) -> AutoencoderKL:
    """`vae`, its config changed in place so that `latent_statistics` gives these: what decodes then inverts them.

    Raises: ConfigError unless there is one of each for every channel.
    """
    channels = vae.config["latent_channels"]
    if not len(mean) == len(std) == channels:
        raise ConfigError(f"latent_statistics has {len(mean)} means and {len(std)} deviations for {channels} channels")
    if not any(mean) and all(math.isclose(s * SDXL_SCALING_FACTOR, 1.0, rel_tol=1e-12) for s in std):
        vae.register_to_config(scaling_factor=SDXL_SCALING_FACTOR, latents_mean=None, latents_std=None)
    else:
        vae.register_to_config(scaling_factor=1.0, latents_mean=list(mean), latents_std=list(std))
    return vae


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, mean: list[float], std: list[float]) -> AutoencoderKL:
    """`vae` changed in place so that its raw latents, times its scaling factor, are (old raw − mean) / std.

    The affine goes into the two 1×1 convolutions around the latents, so that programs which know nothing but
    the scaling factor see per-channel unit latents. `mean` and `std` are measured on the old raw latents
    (report.md §7); any `latents_mean` and `latents_std` in the config are cleared.
    """
    factor = vae.config["scaling_factor"]
    mean_column = torch.tensor(mean, dtype=torch.float64)
    scale = factor * torch.tensor(std, dtype=torch.float64)
    channels = len(mean)

    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight.double(), quant.bias.double()
    weight[:channels] /= scale[:, None, None, None]
    bias[:channels] = (bias[:channels] - mean_column) / scale
    bias[channels:] -= 2 * scale.log()  # the log-variance follows its mean
    quant.weight.copy_(weight)
    quant.bias.copy_(bias)

    post_weight = post.weight.double()
    post.bias.copy_(post.bias.double() + post_weight[:, :, 0, 0] @ mean_column)
    post.weight.copy_(post_weight * scale[None, :, None, None])
    vae.register_to_config(latents_mean=None, latents_std=None)
    return vae


def vae_digest(vae: AutoencoderKL, statistics: LatentStatistics | None = None) -> str:
    """What latents depend on, as SHA-256 hex: weights and statistics (the VAE's own, or others). Caches carry it."""
    return hashlib.sha256(f"{model_digest(vae)} {statistics or latent_statistics(vae)}".encode()).hexdigest()


def model_digest(module: nn.Module) -> str:
    """SHA-256 hex over the native names, dtypes, shapes and bytes of a module's state, in the order of names.

    Native names, so that the digest of a text encoder is the same with transformers 4 and 5.
    """
    return tensors_digest(sorted((native_name(name), tensor) for name, tensor in module.state_dict().items()))


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 hex over names, dtypes, shapes and bytes of tensors, in the order given, one at a time."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
