"""A VAE alone: loaded from wherever there is one, and written as a diffusers VAE folder or as one file.

The file has the original layout without `first_stage_model.`, which is how programs know a VAE by itself.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from sumizome.models.diffusers_folder import write_config
from sumizome.models.key_map import NETWORK_PREFIXES, key_rules, to_original
from sumizome.models.network_stream import open_vae
from sumizome.models.networks import build_network, fill_network, native_state
from sumizome.models.tensor_writer import job_of, write_tensors
from sumizome.models.unseen_settings import settings_metadata, unseen_settings

__all__ = ["load_vae", "write_vae_file", "write_vae_folder"]


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


def write_vae_folder(vae: AutoencoderKL, folder: Path) -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors into an empty folder, in the VAE's own dtype.

    Raises: ExportError if the weights do not read back.
    """
    write_config(folder, vae)
    jobs = [job_of(name, tensor.detach().cpu().contiguous()) for name, tensor in vae.state_dict().items()]
    write_tensors(folder / "diffusion_pytorch_model.safetensors", jobs, {"format": "pt"})


def write_vae_file(vae: AutoencoderKL, path: Path) -> None:
    """Writes the one file, in the VAE's own dtype, with metadata where its settings are not SDXL's.

    Its statistics have no place there: SDXL's factor is understood.

    Raises: ExportError if it does not read back.
    """
    native = {f"vae.{name}": tensor.detach().cpu() for name, tensor in native_state(vae).items()}
    jobs = [
        job_of(rule.original.removeprefix(NETWORK_PREFIXES["vae"]), to_original(rule, native).contiguous())
        for rule in key_rules("vae", [name.removeprefix("vae.") for name in native])
    ]
    settings = {"vae": unseen_settings("vae", dict(vae.config))}
    write_tensors(path, jobs, {"format": "pt"} | settings_metadata(settings))
