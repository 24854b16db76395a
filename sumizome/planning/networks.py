"""The shapes of the model that a plan is for, on the meta device: no weight is read, nothing is allocated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from sumizome.models.architecture import clip_config, unet_config, vae_config
from sumizome.models.diffusers_folder import open_folder
from sumizome.models.networks import build_network
from sumizome.models.single_file import open_single_file

__all__ = ["Networks", "count", "read_networks"]


@dataclass(frozen=True, eq=False)
class Networks:
    """The shapes of a model."""

    unet: UNet2DConditionModel
    text_encoders: tuple[nn.Module, ...]
    vae: nn.Module
    vae_factor: int
    origin: str
    """Where the shapes were read, in words."""

    @property
    def text_count(self) -> int:
        """Parameters of both text encoders."""
        return sum(map(count, self.text_encoders))

    def trained_names(self, *, text_is_trained: bool) -> list[str]:
        """The trained parameters, as checkpoints and `optim.lr_of` name them."""
        networks: dict[str, nn.Module] = {"unet": self.unet}
        if text_is_trained:
            networks |= dict(zip(("text_encoder", "text_encoder_2"), self.text_encoders, strict=True))
        return [f"{part}.{name}" for part, network in networks.items() for name, _ in network.named_parameters()]


def count(network: nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def read_networks(path: Path | None) -> Networks:
    """The shapes of the model at `path`, from its header or its configs; SDXL's own where there is none.

    Raises: ModelError if it is there and is no SDXL.
    """
    if path is None or not path.exists():
        texts = (
            clip_config(),
            clip_config(width=1280, layers=32, intermediate=5120, activation="gelu", projection_dim=1280),
        )
        configs = {"unet": unet_config(), "text_encoder": texts[0], "text_encoder_2": texts[1], "vae": vae_config()}
        origin = "SDXL's own shapes" + (f", since {path} is not here" if path else "")
    else:
        source = open_folder(path) if path.is_dir() else open_single_file(path)
        configs = {name: source.config(name) for name in ("unet", "text_encoder", "text_encoder_2", "vae")}
        origin = f"the shapes of {path}"
    made: dict[str, Any] = {name: build_network(name, config, device="meta") for name, config in configs.items()}
    levels = len(made["vae"].config.block_out_channels)
    encoders = (made["text_encoder"], made["text_encoder_2"])
    return Networks(made["unet"], encoders, made["vae"], 2 ** (levels - 1), origin)
