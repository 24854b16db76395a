"""The tiny VAE: its start is the principal-component codec in closed form, and the shipped weights beat that codec."""

import math
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from draw import draw_picture, plan
from PIL import ImageOps
from safetensors.torch import load_file
from torch.nn import functional
from train_tiny_vae import (
    ASSET,
    DETAIL_DEVIATION,
    flat_levels,
    latent_moments,
    linear_start,
    patch_components,
    psnr,
    reconstruction_loss,
    write_asset,
)

from sumizome.models.tiny import tiny_vae_config


@pytest.fixture(scope="module")
def pictures() -> list[torch.Tensor]:
    """Drawn pictures that the VAE was not trained on (another seed), at 64 × 64."""
    drawn = [draw_picture(kind, Random(f"test:{k}"))[0] for k, kind in enumerate(plan(20, seed=99))]
    return [torch.from_numpy(np.array(ImageOps.fit(image, (64, 64)))).permute(2, 0, 1) for image in drawn]


def _projected(pictures: list[torch.Tensor], components: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The codec itself: coefficients of every 4×4 patch, and its PSNR."""
    basis = components[:4].flatten(1)
    pixels = torch.stack(pictures).float() / 127.5 - 1
    patches = functional.unfold(pixels, 4, stride=4).transpose(1, 2)
    coefficients = patches @ basis.T
    error = ((coefficients @ basis).clamp(-1, 1) - patches).square().mean()
    return coefficients.transpose(1, 2).reshape(-1, 4, 16, 16), 10 * math.log10(4 / float(error))


@torch.no_grad()
def test_linear_start_encodes_patch_components(pictures: list[torch.Tensor]) -> None:
    components = patch_components(pictures)
    vae = AutoencoderKL(**tiny_vae_config()).eval()
    linear_start(vae, components, torch.Generator().manual_seed(0), anchor=300.0)
    latents = vae.encode(torch.stack(pictures).float() / 127.5 - 1).latent_dist.mode()
    coefficients, _ = _projected(pictures, components)
    assert (latents - coefficients).abs().max() < 0.01 * coefficients.abs().max()
    levels = flat_levels(vae)
    assert levels["black"] < 0.01 and levels["white"] > 0.99 and abs(levels["grey"] - 0.5) < 0.002


def test_components_are_orthonormal_and_ordered(pictures: list[torch.Tensor]) -> None:
    components = patch_components(pictures).flatten(1)
    assert torch.allclose(components @ components.T, torch.eye(48), atol=1e-5)
    patches = torch.cat([functional.unfold(p[None].float() / 127.5 - 1, 4, stride=4)[0].T for p in pictures])
    energy = (patches @ components.T).square().mean(dim=0)
    assert (energy[:-1] >= energy[1:] - 1e-6).all()


def test_overshooting_black_costs_almost_nothing_and_undershooting_does() -> None:
    black = torch.full((1, 3, 4, 4), -1.0)
    assert reconstruction_loss(black - 0.5, black) < 0.02
    assert reconstruction_loss(black + 0.5, black) == pytest.approx(1.0)
    assert reconstruction_loss(0 * black + 0.5, 0 * black) == pytest.approx(1.0)


@torch.no_grad()
def test_asset_is_the_network_that_was_trained_with_unit_latents(pictures: list[torch.Tensor], tmp_path: Path) -> None:
    vae = AutoencoderKL(**tiny_vae_config()).eval()
    linear_start(vae, patch_components(pictures), torch.Generator().manual_seed(0), anchor=30.0)
    pictures = pictures[:8]
    write_asset(vae, pictures, tmp_path / "vae.safetensors")
    again = AutoencoderKL(**tiny_vae_config()).eval()
    again.load_state_dict({name: tensor.float() for name, tensor in load_file(tmp_path / "vae.safetensors").items()})
    assert psnr(again, pictures) == pytest.approx(psnr(vae, pictures), abs=0.05)
    mean, std = latent_moments(again, pictures)
    factor = again.config["scaling_factor"]
    assert np.allclose(np.multiply(mean, factor), 0, atol=0.02)
    assert np.allclose(np.multiply(std, factor), (1, 1, 1, DETAIL_DEVIATION), atol=0.02)


@torch.no_grad()
def test_shipped_weights_beat_the_linear_codec_and_keep_flat_colours(pictures: list[torch.Tensor]) -> None:
    vae = AutoencoderKL(**tiny_vae_config()).eval()
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(ASSET).items()})
    assert ASSET.stat().st_size < 2.2e6
    _, codec = _projected(pictures, patch_components(pictures))
    assert psnr(vae, pictures) > codec + 3
    levels = flat_levels(vae)
    assert levels["black"] <= 0.01 and levels["white"] >= 0.99 and abs(levels["grey"] - 0.5) < 0.02
    mean, std = latent_moments(vae, pictures)
    factor = vae.config["scaling_factor"]
    assert np.allclose(np.multiply(mean, factor), 0, atol=0.35)
    assert np.allclose(np.multiply(std, factor), (1, 1, 1, DETAIL_DEVIATION), atol=0.25)
