"""Normalisation against diffusers' formula, folding against the unfolded VAE, digests against single changes."""

import copy

import pytest
import torch
from torch import Tensor

from sumizome.errors import ConfigError
from sumizome.export import needs_folding
from sumizome.models.sdxl import SDXLModel
from sumizome.models.vae import (
    LatentStatistics,
    decode_latents,
    denormalise,
    encode_pixels,
    fold_latent_statistics,
    latent_statistics,
    model_digest,
    normalise,
    vae_digest,
    vae_factor,
)

MEAN = [4.8119, 0.1607, 1.3538, -1.7753]
STD = [9.9181, 6.2753, 7.5978, 5.9956]  # report, appendix B


def _pixels(height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_sdxls_factor_and_appendix_b_are_the_same_kind_of_statistics(tiny: SDXLModel) -> None:
    assert latent_statistics(tiny.vae) == LatentStatistics((0.0,) * 4, (1 / 0.13025,) * 4)
    vae = copy.deepcopy(tiny.vae)
    vae.register_to_config(latents_mean=MEAN, latents_std=STD, scaling_factor=1.0)
    raw = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(4)) * 8
    normalised = normalise(raw, latent_statistics(vae))
    torch.testing.assert_close(normalised[:, 0], (raw[:, 0] - 4.8119) / 9.9181)
    torch.testing.assert_close(denormalise(normalised, latent_statistics(vae)), raw)


def test_one_of_mean_and_deviation_alone_counts_for_nothing_as_in_diffusers(tiny: SDXLModel) -> None:
    """It counted in our pictures and in training, was no reason to fold, and so was lost in every export."""
    plain = latent_statistics(tiny.vae)
    for alone in ({"latents_mean": [1.0] * 4}, {"latents_std": [2.0] * 4}):
        vae = copy.deepcopy(tiny.vae)
        vae.register_to_config(**alone)
        assert latent_statistics(vae) == plain and not needs_folding(vae)
    vae.register_to_config(latents_mean=[1.0], latents_std=[2.0])
    with pytest.raises(ConfigError, match="1 means and 1 deviations for 4"):
        latent_statistics(vae)


def test_encoding_is_deterministic_and_knows_its_grid(tiny: SDXLModel) -> None:
    raw = encode_pixels(tiny.vae, _pixels())
    assert vae_factor(tiny.vae) == 4 and raw.shape == (2, 4, 8, 12) and raw.dtype == torch.float32
    assert torch.equal(raw, encode_pixels(tiny.vae, _pixels()))
    torch.testing.assert_close(raw, tiny.vae.encode(_pixels()).latent_dist.mean)
    with pytest.raises(ValueError, match="factor 4"):
        encode_pixels(tiny.vae, _pixels(30, 48))


def test_decoding_scales_as_diffusers_pipeline_does(tiny: SDXLModel) -> None:
    latents = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(5))
    expected = tiny.vae.decode(latents / 0.13025).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(tiny.vae, latents), expected)


def test_folding_gives_the_same_normalised_latents_and_pictures_under_sdxls_factor(tiny: SDXLModel) -> None:
    stated = copy.deepcopy(tiny.vae)
    stated.register_to_config(latents_mean=MEAN, latents_std=STD, scaling_factor=1.0)
    folded = copy.deepcopy(tiny.vae)
    fold_latent_statistics(folded, MEAN, STD)
    assert latent_statistics(folded) == latent_statistics(tiny.vae)

    pixels = _pixels()
    expected = normalise(encode_pixels(stated, pixels), latent_statistics(stated))
    found = normalise(encode_pixels(folded, pixels), latent_statistics(folded))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_latents(folded, found), decode_latents(stated, expected), atol=1e-5, rtol=1e-5)
    spread = folded.encode(pixels).latent_dist.std / stated.encode(pixels).latent_dist.std
    wanted = 1 / (0.13025 * torch.tensor(STD))
    torch.testing.assert_close(spread, wanted[None, :, None, None].expand_as(spread))


def test_digest_sees_one_bit_a_name_and_the_scaling_factor(tiny: SDXLModel) -> None:
    digest = vae_digest(tiny.vae)
    other = copy.deepcopy(tiny.vae)
    assert vae_digest(other) == digest
    other.register_to_config(scaling_factor=0.18215)
    assert vae_digest(other) != digest and model_digest(other) == model_digest(tiny.vae)
    with torch.no_grad():
        bits = other.decoder.conv_out.weight.view(torch.int32)
        bits[0, 0, 0, 0] ^= 1
    assert model_digest(other) != model_digest(tiny.vae)
