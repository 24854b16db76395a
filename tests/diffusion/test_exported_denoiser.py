"""k-diffusion's denoiser, which ComfyUI's and A1111's come from, over a U-Net that diffusers loaded from our export."""

import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sumizome.diffusion.denoiser import Denoiser
from sumizome.diffusion.schedule import build_noise_schedule
from sumizome.export import write_diffusers_folder
from sumizome.models.conditioning import UNetConditioning, apply_unet, canvas_time_ids
from sumizome.models.text_encoding import encode_prompts, tokenize
from sumizome.models.tiny import build_tiny_model

CANVAS, PROMPT = (64, 48), "1girl, blue hair, night sky"
SHAPE = (4, CANVAS[0] // 4, CANVAS[1] // 4)


@torch.no_grad()
def test_k_diffusions_denoiser_on_the_exported_unet_is_ours(tmp_path: Path, k_diffusion: types.SimpleNamespace) -> None:
    """`DiscreteVDDPMDenoiser` over the folder's U-Net and its table; ComfyUI's and A1111's preconditioning."""
    model = build_tiny_model(seed=3)
    folder = write_diffusers_folder(model, tmp_path / "folder", verify_step=False)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True)
    schedule = build_noise_schedule(model.schedule_config).with_terminal_alpha_cumprod(4.8973451890853435e-08)
    embeds, pooled = encode_prompts(model.text_encoders, tokenize([PROMPT] * 3).input_ids)
    conditioning = UNetConditioning(embeds, pooled, canvas_time_ids(CANVAS, 3))
    inner: Callable[..., Tensor] = lambda x, t, **_: apply_unet(unet, x, t, conditioning)  # noqa: E731
    reference = k_diffusion.external.DiscreteVDDPMDenoiser(inner, schedule.alphas_cumprod.float(), quantize=True)
    assert float(reference.sigmas[-1]) == pytest.approx(4518.7637, rel=1e-5)
    mine = Denoiser(schedule, "v_prediction", lambda x, t: apply_unet(model.unet, x, t, conditioning))
    sigmas = torch.tensor([4518.7637, 56.1782, 0.4703])
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)) * sigmas[:, None, None, None]
    expected, found = reference(x, sigmas), mine(x, sigmas)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
