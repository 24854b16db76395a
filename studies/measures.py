"""What the studies measure of a model: by `sumizome evaluate`'s own functions, and by one closed form of their own.

The closed form: a flat colour's latents are known exactly, and every picture of the prompt "completely black" is that
one. So whatever the noise, the right prediction is known, and its error needs no reference set.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studies.datasets import DataSet, reference
from studies.training import HELD_OUT
from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.schedule import build_noise_schedule
from sumizome.diffusion.sigmas import SigmaMax, starting_sigma
from sumizome.evaluate.candidates import Candidate
from sumizome.evaluate.config import EvaluateConfig
from sumizome.evaluate.evaluation import FeatureSpace, evaluate_model
from sumizome.evaluate.scores import COLOURS
from sumizome.inference import (
    PictureRequest,
    SamplingConfig,
    draw_pictures,
    guided_denoiser,
    initial_noise,
    native_canvas,
)
from sumizome.models.sdxl import SDXLModel
from sumizome.models.vae import encode_pixels, latent_statistics, normalise
from sumizome.seeds import derive_seed

__all__ = ["TIMESTEPS", "captioned", "drawn", "evaluated", "first_prediction_error", "flat_latents"]

TIMESTEPS = (20, 100, 200, 300, 400, 500, 600, 700, 800, 900, 950, 990, 999)


@torch.no_grad()
def flat_latents(model: SDXLModel, colour: tuple[int, int, int], canvas: tuple[int, int]) -> torch.Tensor:
    """The latents [1, c, h, w] of a picture of one colour."""
    pixels = torch.tensor(colour).float().view(1, 3, 1, 1).expand(1, 3, *canvas) / 127.5 - 1
    return normalise(encode_pixels(model.vae, pixels), latent_statistics(model.vae))


@torch.no_grad()
def first_prediction_error(model: SDXLModel, colour: str, sigma_max: SigmaMax = "pure", count: int = 32) -> float:
    """Root mean square of D(noise; "completely COLOUR") − its latents, unguided, where sampling starts.

    In standard deviations of latents over their root mean square: 0 is exact, 1 what the answer 0 would get.
    """
    canvas = native_canvas(model)
    wanted = flat_latents(model, COLOURS[colour], canvas)
    sigma = starting_sigma(sigma_max, build_noise_schedule(model.schedule_config))
    sampling = SamplingConfig(guidance=GuidanceConfig(1.0))
    batch = [PictureRequest(f"completely {colour}", canvas=canvas, sampling=sampling)] * count
    noise = torch.stack([initial_noise(derive_seed("first", n) % 2**31, tuple(wanted.shape[1:])) for n in range(count)])
    denoised = guided_denoiser(model, batch, 1)(noise * sigma, sigma)
    return float((denoised - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def drawn(
    model: SDXLModel, prompts: Sequence[str], sampling: SamplingConfig, canvas: tuple[int, int] | None = None
) -> np.ndarray:
    """A picture of each prompt, uint8 [n, H, W, 3]; the seed is the place."""
    base = PictureRequest("", canvas=canvas or native_canvas(model), sampling=sampling)
    requests = [replace(base, prompt=prompt, seed=place) for place, prompt in enumerate(prompts)]
    return np.stack([np.asarray(p.image) for p in draw_pictures(model, requests, batch_size=16, max_chunks=1)])


def captioned(
    model: SDXLModel, data: DataSet, count: int, sampling: SamplingConfig
) -> tuple[list[np.ndarray], list[int]]:
    """Pictures [1, H, W, 3] from captions of held-out pictures, each on its own canvas, and whose captions they are."""
    held, _ = reference(data)
    places = sorted(held.test[:count].tolist(), key=lambda place: held.canvases[place])
    requests = [
        PictureRequest(", ".join(held.tag_lists[place]), canvas=held.canvases[place], seed=place, sampling=sampling)
        for place in places
    ]
    pictures = draw_pictures(model, requests, batch_size=16, max_chunks=1)
    return [np.asarray(picture.image)[None] for picture in pictures], places


def evaluated(model: SDXLModel, data: DataSet, config: EvaluateConfig) -> dict[str, Any]:
    """`sumizome evaluate` on this model: colours, tags, distances, loss by timestep, without the tables by tag.

    Without pictures to draw (`config.pictures` 0) neither tags nor distances.
    """
    held, classifier = reference(data)
    space = FeatureSpace("a small network trained on this data's tags", classifier.features)
    candidate = Candidate("arm", Path(), model, None, HELD_OUT)
    measured_with = (classifier, space) if config.pictures else (None, None)
    facts, _ = evaluate_model(candidate, config, held, *measured_with, lambda _: None)
    if facts["tags"]:
        del facts["tags"]["by_tag"], facts["tags"]["by_picture"]
    del facts["path"]
    return facts
