"""The model as one object, and loading it from a diffusers folder or an original single file.

Owns which networks make a component and in which precision they are held. Where they are found and what the U-Net
predicts is said by `diffusers_folder` and `single_file`. Nothing is fetched from a hub, nothing is unpickled.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.errors import ModelError
from sumizome.models.diffusers_folder import open_folder
from sumizome.models.infer_config import LATENT_CHANNELS
from sumizome.models.networks import build_network, fill_network
from sumizome.models.single_file import open_single_file
from sumizome.models.vae import model_digest

__all__ = ["ALL_COMPONENTS", "Component", "SDXLModel", "load_model", "model_digest"]

Component: TypeAlias = Literal["unet", "vae", "text_encoders"]
ALL_COMPONENTS: tuple[Component, ...] = ("unet", "vae", "text_encoders")

_NETWORKS: dict[str, tuple[str, ...]] = {
    "unet": ("unet",),
    "vae": ("vae",),
    "text_encoders": ("text_encoder", "text_encoder_2"),
}
"""The networks of a component, by diffusers' folder names."""


@dataclass(frozen=True)
class SDXLModel:
    """The networks that were loaded, and what the U-Net was trained to predict.

    `unet`, `vae` and `text_encoders` are for those who need them: they raise ModelError where they were not asked for.
    """

    networks: Mapping[str, nn.Module]
    """By diffusers' names, in this order: unet, vae, text_encoder, text_encoder_2."""
    prediction_type: PredictionType
    schedule_config: ScheduleConfig
    source: Path | None
    """Where it was loaded from; None for a model made from scratch."""

    @property
    def unet(self) -> UNet2DConditionModel:
        return self._network("unet")

    @property
    def vae(self) -> AutoencoderKL:
        return self._network("vae")

    @property
    def text_encoders(self) -> nn.ModuleList:
        """CLIP-L, then the wider encoder with a projection; `text_encoding.encode_prompts` takes both."""
        return nn.ModuleList(map(self._network, _NETWORKS["text_encoders"]))

    @property
    def device(self) -> torch.device:
        """Where the U-Net is. Its own property of this name asks every module first: a hundredth of a small step."""
        device: torch.device = next(self.unet.parameters()).device
        return device

    def _network(self, name: str) -> nn.Module:
        network = self.networks.get(name)
        if network is None:
            raise ModelError(f"the model's {name} is needed, and was not loaded.")
        return network

    def to(self, device: torch.device | str) -> "SDXLModel":
        """The same model, every network moved to `device` (in place, as torch's modules do)."""
        for network in self.networks.values():
            network.to(device)
        return self


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    components: tuple[Component, ...] = ALL_COMPONENTS,
    prediction_type: PredictionType | None = None,
    zero_terminal_snr: bool | None = None,
    without_weights: Collection[Component] = (),
) -> SDXLModel:
    """The SDXL model at `path`: a diffusers folder, or a safetensors file in SDXL's original layout.

    U-Net and text encoders come in `dtype`; the VAE is always float32 (SDXL's overflows in float16). All are in eval
    mode. Prediction type and terminal SNR are read from the scheduler's config, or from the file's `v_pred` and `ztsnr`
    keys and its metadata; `prediction_type` and `zero_terminal_snr` override what was found. Components
    `without_weights` stay on the meta device, for `model_weights.fill_shards`.

    Raises: ModelError for a missing component, another architecture, a damaged or a pickled file.
    """
    path = Path(path)
    source = open_folder(path) if path.is_dir() else open_single_file(path)
    networks: dict[str, nn.Module] = {}
    bare = {name for component in without_weights for name in _NETWORKS[component]}
    for name in [name for component in components for name in _NETWORKS[component]]:
        config = source.config(name)
        if name == "unet":
            _refuse_inpainting(path, config.get("in_channels", LATENT_CHANNELS))
        network = build_network(name, config, device="meta")
        if name not in bare:
            tensors = source.tensors(name, network)
            fill_network(network, tensors, f"{path}: {name}", torch.float32 if name == "vae" else dtype, device)
        networks[name] = network.eval()
    found_type, schedule_config = source.prediction()
    if zero_terminal_snr is not None:
        schedule_config = replace(schedule_config, zero_terminal_snr=zero_terminal_snr)
    return SDXLModel(networks, prediction_type or found_type, schedule_config, source=path)


def _refuse_inpainting(path: Path, channels: int) -> None:
    if channels != LATENT_CHANNELS:
        raise ModelError(
            f"{path} is an inpainting model: its U-Net takes {channels} channels, a mask and a picture beside the 4 of "
            "the latents. It can be inspected, mended and merged, not trained or drawn with: use the model that it was "
            "made from."
        )
