"""The tiny model: SDXL's architecture at a size that two CPU cores train in minutes.

Owns its dimensions and its random start. Everything else about it is ordinary: it is saved, loaded, trained and
exported by the code that handles a real SDXL. Its VAE halves the side twice (f = 4), so 64 px are 16 latents.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.models.architecture import Config, clip_config, unet_config, vae_config
from sumizome.models.networks import build_network
from sumizome.models.sdxl import SDXLModel
from sumizome.models.tensor_file import open_tensor_file

__all__ = ["TinySize", "build_tiny_model", "tiny_unet_config", "tiny_vae_config"]

_VAE_WEIGHTS = Path(__file__).parent / "assets" / "tiny_vae.safetensors"


@dataclass(frozen=True)
class TinySize:
    """How tiny: widths are channels, each a multiple of 32 where there is attention (all but the U-Net's first)."""

    unet_widths: tuple[int, int, int] = (32, 64, 96)
    text_widths: tuple[int, int] = (64, 96)
    """Different on purpose: programs tell SDXL's two text encoders apart by their width."""


_SIZE = TinySize()


def build_tiny_model(seed: int = 0, size: TinySize = _SIZE) -> SDXLModel:
    """A tiny SDXL with random U-Net and text encoders, v-prediction, zero terminal SNR, float32, CPU.

    The VAE has the trained weights of `assets/tiny_vae.safetensors` where that file exists.
    """
    first_width, second_width = size.text_widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_network("unet", tiny_unet_config(size))
        first = build_network("text_encoder", _text_config(first_width, "quick_gelu"))
        second = build_network("text_encoder_2", _text_config(second_width, "gelu"))
        vae = build_network("vae", tiny_vae_config())
    if _VAE_WEIGHTS.exists():
        weights = open_tensor_file(_VAE_WEIGHTS)
        vae.load_state_dict({name: weights.read(name).float() for name in weights.shapes})
    return SDXLModel(
        networks={
            "unet": unet.eval(),
            "vae": vae.eval(),
            "text_encoder": first.eval(),
            "text_encoder_2": second.eval(),
        },
        prediction_type="v_prediction",
        schedule_config=ScheduleConfig(zero_terminal_snr=True),
        source=None,
    )


def tiny_unet_config(size: TinySize = _SIZE) -> Config:
    """UNet2DConditionModel's arguments: three levels, attention in the lower two, as in SDXL."""
    return unet_config(
        block_out_channels=size.unet_widths,
        transformer_layers=(0, 1, 1),
        layers_per_block=1,
        cross_attention_dim=sum(size.text_widths),
        pooled_dim=size.text_widths[1],
    )


def tiny_vae_config() -> Config:
    """AutoencoderKL's arguments: three levels (f = 4), 0.95 M parameters, SDXL's own scaling factor.

    Trained weights go to `assets/tiny_vae.safetensors` after `vae.fold_latent_statistics`, so that SDXL's factor of
    0.13025 is theirs too and nothing needs to be stored beside them.
    """
    return vae_config(block_out_channels=(32, 64, 64), layers_per_block=1)


def _text_config(width: int, activation: str) -> Config:
    return clip_config(width=width, layers=2, intermediate=4 * width, activation=activation, projection_dim=width)
