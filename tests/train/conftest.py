"""A model smaller than the tiny one, for tests that train it many times over."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sumizome.models.sdxl import SDXLModel


@pytest.fixture(scope="session")
def small_folder(tiny: "SDXLModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two levels and narrower text encoders, untrained, as a diffusers folder."""
    import torch

    from sumizome.export import write_diffusers_folder
    from sumizome.models.architecture import clip_config, unet_config
    from sumizome.models.networks import build_network

    torch.manual_seed(0)
    unet = unet_config(
        block_out_channels=(32, 64),
        transformer_layers=(0, 1),
        layers_per_block=1,
        cross_attention_dim=32 + 64,
        pooled_dim=64,
    )
    encoders = {
        name: build_network(
            name, clip_config(width=width, layers=2, intermediate=64, activation="gelu", projection_dim=width)
        ).eval()
        for name, width in (("text_encoder", 32), ("text_encoder_2", 64))
    }
    small = replace(tiny, networks={**tiny.networks, "unet": build_network("unet", unet).eval(), **encoders})
    return write_diffusers_folder(small, tmp_path_factory.mktemp("small") / "small")
