"""A VAE alone, loaded from wherever there is one: a model (file or folder), a diffusers VAE folder, a VAE file."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from sumizome.models.network_stream import open_vae
from sumizome.models.networks import build_network, fill_network

__all__ = ["load_vae"]


def load_vae(path: Path, device: torch.device | str = "cpu") -> AutoencoderKL:
    """The VAE at `path`, float32, in eval mode. Nothing else of a model is read.

    Raises: ModelError if there is none, it is damaged, or of another architecture.
    """
    network = open_vae(path)
    vae = build_network("vae", network.config, device="meta")
    tensors = (
        (name.removeprefix("vae."), tensor) for rule in network.rules for name, tensor in network.read(rule).items()
    )
    fill_network(vae, tensors, f"{path}: vae", torch.float32, device)
    return vae.eval()
