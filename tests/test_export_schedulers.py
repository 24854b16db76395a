"""The exported folder drawn by diffusers' schedulers and by us: the same picture, scheduler by scheduler.

Where both sides have the algorithm, equal to 5e-5 of the latents' largest value (seen: 6e-6). Where only diffusers has
it, both must come near one solution: within 15 % (root mean square) of ours at 30 steps (seen: 3 to 11 %), where a
schedule without the terminal step or a wrong prediction type is off by 100 %.
"""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from sumizome.diffusion import samplers
from sumizome.diffusion.denoiser import Denoiser
from sumizome.diffusion.guidance import GuidanceConfig, build_guided_denoiser
from sumizome.diffusion.samplers import SAMPLERS, SamplerName
from sumizome.diffusion.schedule import NoiseSchedule, build_noise_schedule
from sumizome.diffusion.sigmas import build_sigmas
from sumizome.models.conditioning import UNetConditioning, apply_unet, canvas_time_ids
from sumizome.models.sdxl import SDXLModel, model_digest
from sumizome.models.text_encoding import encode_prompts, tokenize

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

CANVAS, PROMPT = (64, 48), "1girl, blue hair, night sky"
SHAPE = (1, 4, CANVAS[0] // 4, CANVAS[1] // 4)


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def theirs(pipeline: StableDiffusionXLPipeline, folder: Path, noise: Tensor, kind: str, steps: int, scale: float,
           **options: Any) -> Tensor:  # fmt: skip
    pipeline.scheduler = getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler", **options)
    asked = {"height": CANVAS[0], "width": CANVAS[1], "num_inference_steps": steps, "guidance_scale": scale}
    return pipeline(
        PROMPT,
        negative_prompt="",
        latents=noise.clone(),
        output_type="latent",
        generator=torch.Generator().manual_seed(5),
        **asked,
    ).images


@torch.no_grad()
def ours(model: SDXLModel, noise: Tensor, name: SamplerName, sigmas: Tensor, scale: float) -> Tensor:
    schedule = build_noise_schedule(model.schedule_config)

    def denoiser(prompts: list[str]) -> Denoiser:
        embeds, pooled = encode_prompts(model.text_encoders, tokenize(prompts).input_ids)
        conditioning = UNetConditioning(embeds, pooled, canvas_time_ids(CANVAS, len(prompts)))
        return Denoiser(schedule, "v_prediction", lambda x, t: apply_unet(model.unet, x, t, conditioning))

    guided = build_guided_denoiser(GuidanceConfig(scale), denoiser([PROMPT]), denoiser([PROMPT, ""]))
    draw = torch.Generator().manual_seed(5)
    *_, last = SAMPLERS[name](guided, noise * float(sigmas[0]), sigmas, lambda key: torch.randn(SHAPE, generator=draw))
    return last.x


SAME: dict[str, tuple[SamplerName, dict[str, Any]]] = {
    "EulerDiscreteScheduler": ("euler", {}),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", {}),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", {}),
    "DPMSolverMultistepScheduler (SDE)": ("dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_algorithm_draws_the_same_picture(
    vivid: SDXLModel, vivid_pipeline: StableDiffusionXLPipeline, vivid_folder: Path, noise: Tensor, kind: str
) -> None:
    name, options = SAME[kind]
    found = theirs(vivid_pipeline, vivid_folder, noise, kind.split()[0], 8, 4.0, **options)
    assert vivid_pipeline.scheduler.timesteps[0] == 999
    assert float(vivid_pipeline.scheduler.sigmas[0]) == pytest.approx(4096, rel=1e-6)
    expected = ours(vivid, noise, name, vivid_pipeline.scheduler.sigmas.double(), 4.0)
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 5e-5 * expected.abs().max()


def test_heun_is_theirs_too_but_for_the_step_from_pure_noise(
    vivid: SDXLModel,
    vivid_pipeline: StableDiffusionXLPipeline,
    vivid_folder: Path,
    noise: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """diffusers' Heun corrects the step from 4096 as well, by a trapezoid that does not fit there; ours does not."""
    found = theirs(vivid_pipeline, vivid_folder, noise, "HeunDiscreteScheduler", 6, 1.0)
    scheduler = vivid_pipeline.scheduler
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]]).double()
    # Heun does not know the flag and takes `trained_betas` as they are: their own table, to look up timesteps in.
    table = NoiseSchedule(scheduler.alphas_cumprod.double())
    monkeypatch.setattr(samplers, "HEUN_SIGMA_MAX", float("inf"))
    monkeypatch.setattr(NoiseSchedule, "timestep_of", lambda _, sigma: _nearest(table, sigma))
    expected = ours(vivid, noise, "heun", sigmas, 1.0)
    # 2e-3: theirs subtracts numbers of the size of sigma 4096 in float32.
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


def _nearest(table: NoiseSchedule, sigma: Tensor) -> Tensor:
    distance = (table.sigmas.log()[None] - sigma.double().clamp(min=1e-9).log()[:, None]).abs()
    return distance.argmin(dim=1)


@pytest.fixture(scope="module")
def solution(vivid: SDXLModel, noise: Tensor) -> Tensor:
    sigmas = build_sigmas("native", 60, build_noise_schedule(vivid.schedule_config), "pure", (128, 96))
    return ours(vivid, noise, "dpmpp_2m", sigmas, 1.0)


@pytest.mark.parametrize(
    "kind",
    [
        "DEISMultistep",  # without the flag for zero terminal SNR: it goes by `trained_betas`
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("DDIM", "LMSDiscrete", "KDPM2Discrete", "UniPCMultistep", "PNDM", "DPMSolverSinglestep")
        ),
    ],
)
def test_every_other_scheduler_comes_to_the_same_picture(
    solution: Tensor, vivid_pipeline: StableDiffusionXLPipeline, vivid_folder: Path, noise: Tensor, kind: str
) -> None:
    found = theirs(vivid_pipeline, vivid_folder, noise, f"{kind}Scheduler", 30, 1.0)
    assert vivid_pipeline.scheduler.timesteps[0] == 999
    assert (found - solution).norm() < 0.15 * solution.norm()


@torch.no_grad()
def test_a_pipeline_from_the_single_file_and_the_folder_as_config_is_the_folders(
    vivid: SDXLModel, vivid_pipeline: StableDiffusionXLPipeline, vivid_folder: Path, noise: Tensor, tmp_path: Path
) -> None:
    """`from_single_file(file, config=folder)`, offline: every network and the scheduler, to the same pixels."""
    from sumizome.export import write_single_file

    file = write_single_file(vivid, tmp_path / "model.safetensors")
    single = StableDiffusionXLPipeline.from_single_file(file, config=str(vivid_folder), local_files_only=True)
    single.set_progress_bar_config(disable=True)
    assert single.scheduler.config.prediction_type == "v_prediction"
    assert single.scheduler.config.rescale_betas_zero_snr and single.scheduler.config.timestep_spacing == "trailing"
    asked = {"height": CANVAS[0], "width": CANVAS[1], "num_inference_steps": 4, "output_type": "pt"}
    vivid_pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(vivid_folder, subfolder="scheduler")
    for name, network in vivid.networks.items():
        assert model_digest(getattr(single, name)) == model_digest(network), name
    found = single(PROMPT, negative_prompt="", latents=noise.clone(), guidance_scale=1.0, **asked).images
    again = vivid_pipeline(PROMPT, negative_prompt="", latents=noise.clone(), guidance_scale=1.0, **asked).images
    assert (found - again).abs().max() < 1e-4
