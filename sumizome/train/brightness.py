"""The brightness test: does "completely black" come out black, and white white? One number, from pure noise.

A model whose schedule ends before pure noise, or that never learned the step from it, draws everything near middle
grey: the error is then near 0.33 (black and white each 0.5 off, grey 0). Pictures are shared out over the ranks.
Source: report §2.2; Lin et al. 2305.08891, figure 1.
"""

from itertools import product
from typing import TypedDict

import numpy as np

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.distributed.runtime import Ranks
from sumizome.inference import PictureRequest, SamplingConfig, draw_pictures
from sumizome.models.sdxl import SDXLModel
from sumizome.train.config import BrightnessConfig
from sumizome.train.lookout import LookEnded, Lookout

__all__ = ["Brightness", "brightness"]


class Brightness(TypedDict):
    """What the test found."""

    brightness: dict[str, float]
    """Mean of each prompt's pictures, 0 … 1."""
    brightness_error: float
    """Mean distance of a picture's brightness from what was wanted."""


def brightness(
    model: SDXLModel,
    config: BrightnessConfig,
    ranks: Ranks | None = None,
    *,
    max_chunks: int = 3,
    lockstep: bool = False,
    lookout: Lookout | None = None,
) -> Brightness:
    """How bright the prompts' pictures come out of pure noise. `max_chunks`: as captions have.

    With `lockstep` every forward pass needs all ranks, so that each draws all; else each draws its part. Collective.
    Raises: LookEnded on every rank when one is asked to stop.
    """
    ranks, lookout = ranks or Ranks(), lookout or Lookout()
    sampling = SamplingConfig(
        steps=config.sampling_steps, guidance=GuidanceConfig(guidance_scale=config.guidance_scale)
    )
    jobs = list(product(range(len(config.prompts)), range(config.seeds)))
    mine = jobs if lockstep else ranks.share(jobs)
    requests = [
        PictureRequest(config.prompts[prompt], canvas=config.canvas, seed=seed, sampling=sampling)
        for prompt, seed in mine
    ]
    sums = np.zeros((2, len(config.prompts)))
    may_go_on, ended = lookout.together if lockstep else lookout.alone, False
    try:
        pictures = draw_pictures(model, requests, max_chunks=max_chunks, on_step=lambda *_: may_go_on())
        for (prompt, _), picture in zip(mine, pictures, strict=True):
            mean = float(np.asarray(picture.image.convert("L"), dtype=np.float64).mean() / 255)
            sums[:, prompt] += mean, abs(mean - config.wanted[prompt])
    except LookEnded:
        ended = True
    lookout.together(ended=ended)
    if not lockstep:
        sums = np.array(ranks.sums(sums.ravel().tolist())).reshape(sums.shape)
    means, errors = (sums / config.seeds).tolist()
    return {
        "brightness": dict(zip(config.prompts, means, strict=True)),
        "brightness_error": float(np.mean(errors)),
    }
