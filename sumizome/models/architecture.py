"""The shape of the SDXL family: the configurations of its four networks.

Owns every number that names the architecture, as plain dictionaries that diffusers and transformers accept. It builds
no modules and reads no files. Some numbers cannot be seen in tensor shapes and follow a rule here, so that a model of
any size can be read from shapes alone: the width of a head, the groups of GroupNorm, the features of a time id, and
the canvas that the model was made for.
"""

from typing import Any

from sumizome.errors import ModelError

__all__ = [
    "SDXL_SCALE",
    "Config",
    "LatentScale",
    "clip_config",
    "head_width",
    "latent_canvas",
    "latent_scale",
    "native_side",
    "norm_groups",
    "time_id_dim",
    "unet_config",
    "vae_config",
]

Config = dict[str, Any]

SDXL_SCALING_FACTOR = 0.13025
"""Latents are raw VAE latents times this: SDXL's one number for all four channels (2307.01952)."""

LatentScale = tuple[float, tuple[float, ...], tuple[float, ...]]
"""(factor, means, deviations) of latents; no means and deviations where one factor is all."""
SDXL_SCALE: LatentScale = (SDXL_SCALING_FACTOR, (), ())


def latent_scale(vae: Config) -> LatentScale:
    """What a VAE's configuration says of its latents: two that differ here do not fit one U-Net.

    Where no factor stands, diffusers takes Stable Diffusion 1's.
    Raises: ModelError where something else than numbers stands, or numbers that latents cannot be scaled by.
    """
    factor = vae.get("scaling_factor", 0.18215)
    mean, std = (vae.get(name) or () for name in ("latents_mean", "latents_std"))
    if not all(isinstance(each, list | tuple) for each in (mean, std)):
        raise ModelError(_NO_SCALE)
    if not all(_is_number(scale, 1 / _MOST_SCALE) for scale in [factor, *std]):
        raise ModelError(_NO_SCALE)
    if not all(_is_number(each, -_MOST_SCALE) for each in mean):
        raise ModelError(_NO_SCALE)
    return float(factor), *((tuple(map(float, mean)), tuple(map(float, std))) if mean and std else ((), ()))


_NO_SCALE = (
    "the VAE's scaling_factor, latents_mean or latents_std is not made of numbers that latents can be scaled by "
    "(finite, the factor and deviations above 0); its config.json is damaged: copy the model again"
)
_MOST_SCALE = 1e6


def _is_number(value: object, least: float) -> bool:
    # Compared, not converted: a whole number may be larger than any float. NaN is in no range.
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= _MOST_SCALE


def head_width(channels: int) -> int:
    """Channels of one attention head: 64 as in SDXL, 32 in a small model."""
    return 64 if channels >= 320 else 32


def norm_groups(narrowest: int) -> int:
    """GroupNorm groups: 32 as in SDXL, 8 in a small model.

    With one channel a group, the norm before the last convolution would take each channel's mean away, and with it the
    brightness of the canvas.
    """
    return 32 if narrowest >= 128 else 8


def time_id_dim(channels: int) -> int:
    """Sinusoidal features of each of the six time ids: 256 as in SDXL, 32 in a small model."""
    return 256 if channels >= 320 else 32


def native_side(channels: int) -> int:
    """Side of the latents that a model was made for, diffusers' default canvas: 128 for SDXL, 16 if small."""
    return 128 if channels >= 320 else 16


MOST_LATENT_SIDE = 512
"""Of the canvas that a configuration may ask for: 4096 px with SDXL's VAE. It is drawn where no other is asked for."""


def latent_canvas(unet: Config) -> tuple[int, int]:
    """The (height, width) in latents that a U-Net was made for: its `sample_size`, one side or both.

    Where none stands, as diffusers allows, it is what the rule gives. Raises: ModelError for anything else.
    """
    stated = unet.get("sample_size")
    if stated is None:
        stated = native_side(max(unet["block_out_channels"]))
    sides = tuple(stated) if isinstance(stated, list | tuple) else (stated, stated)
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MOST_LATENT_SIDE for side in sides):
        raise ModelError(
            f"the U-Net's sample_size is {str(stated)[:40]!r}, which is no canvas: a side in latents, or height and "
            f"width, from 1 to {MOST_LATENT_SIDE}. Correct it in unet/config.json, or use another copy."
        )
    return sides[0], sides[1]


def unet_config(
    *,
    block_out_channels: tuple[int, ...] = (320, 640, 1280),
    transformer_layers: tuple[int, ...] = (0, 2, 10),
    layers_per_block: int = 2,
    cross_attention_dim: int = 2048,
    pooled_dim: int = 1280,
) -> Config:
    """UNet2DConditionModel's arguments; the defaults are SDXL's. `transformer_layers` 0: a level without attention."""
    attends = [depth > 0 for depth in transformer_layers]
    widest = max(block_out_channels)
    features = time_id_dim(widest)
    return {
        "sample_size": native_side(widest),
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "block_out_channels": block_out_channels,
        "layers_per_block": layers_per_block,
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in transformer_layers),
        # diffusers calls the number of heads `attention_head_dim`.
        "attention_head_dim": tuple(channels // head_width(max(block_out_channels)) for channels in block_out_channels),
        "norm_num_groups": norm_groups(min(block_out_channels)),
        "cross_attention_dim": cross_attention_dim,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": features,
        "projection_class_embeddings_input_dim": pooled_dim + 6 * features,
    }


def vae_config(
    *,
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
    layers_per_block: int = 2,
    latent_channels: int = 4,
    scaling_factor: float = SDXL_SCALING_FACTOR,
) -> Config:
    """AutoencoderKL's arguments; the defaults are SDXL's. Each level but the last halves the side."""
    levels = len(block_out_channels)
    factor = 2 ** (levels - 1)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": block_out_channels,
        "layers_per_block": layers_per_block,
        "latent_channels": latent_channels,
        "norm_num_groups": norm_groups(min(block_out_channels)),
        "sample_size": factor * native_side(max(block_out_channels)),
        "scaling_factor": scaling_factor,
    }


def clip_config(
    *,
    width: int = 768,
    layers: int = 12,
    intermediate: int = 3072,
    activation: str = "quick_gelu",
    projection_dim: int = 768,
) -> Config:
    """CLIPTextConfig's arguments; the defaults are SDXL's first encoder (CLIP-L)."""
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head_width(width),
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": projection_dim,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
