"""The tiny model is SDXL's architecture in small, and a function of its seed."""

import torch

from sumizome.models.sdxl import SDXLModel, model_digest
from sumizome.models.tiny import build_tiny_model


def test_the_unet_is_of_sdxls_kind(tiny: SDXLModel) -> None:
    config = tiny.unet.config
    assert config["down_block_types"] == ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    assert config["addition_embed_type"] == "text_time" and config["use_linear_projection"]
    widths = [encoder.config.hidden_size for encoder in tiny.text_encoders]
    assert widths[0] != widths[1] and config["cross_attention_dim"] == sum(widths)
    assert config["projection_class_embeddings_input_dim"] == widths[1] + 6 * config["addition_time_embed_dim"]
    assert 2.5e6 < sum(parameter.numel() for parameter in tiny.unet.parameters()) < 3.5e6


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(tiny: SDXLModel) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, other = build_tiny_model(seed=0), build_tiny_model(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, network in tiny.networks.items():
        assert model_digest(again.networks[name]) == model_digest(network)
    assert model_digest(other.unet) != model_digest(tiny.unet)


@torch.no_grad()
def test_no_normalisation_takes_a_channels_mean_away(tiny: SDXLModel) -> None:
    # GroupNorm with one channel a group before the last convolution would fix the brightness of every picture.
    norm = tiny.unet.conv_norm_out
    assert norm.num_channels > norm.num_groups
    features = torch.randn(1, norm.num_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    shift = torch.zeros(1, norm.num_channels, 1, 1)
    shift[:, ::2] = 3
    moved = norm(features + shift).mean(dim=(2, 3)) - norm(features).mean(dim=(2, 3))
    assert moved.abs().max() > 0.5
