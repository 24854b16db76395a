"""The brightness test: does "completely black" come out black, and white white? One number, from pure noise.

A model whose schedule ends before pure noise, or that never learned the step from it, draws everything near middle
grey: the error is then near 0.33 (black and white each 0.5 off, grey 0). Pictures are shared out over the ranks.
Source: report §2.2; Lin et al. 2305.08891, figure 1.
"""

from dataclasses import dataclass
from itertools import product
from typing import TypedDict

import numpy as np

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.distributed.runtime import Ranks
from sumizome.errors import ConfigError
from sumizome.inference import PictureRequest, SamplingConfig, draw_pictures
from sumizome.models.sdxl import SDXLModel

__all__ = ["Brightness", "BrightnessConfig", "brightness"]


class Brightness(TypedDict):
    """What the test found."""

    brightness: dict[str, float]
    """Mean of each prompt's pictures, 0 … 1."""
    brightness_error: float
    """Mean distance of a picture's brightness from what was wanted."""


@dataclass(frozen=True)
class BrightnessConfig:
    """How bright flat pictures come out, with the averaged weights."""

    every: int = 0
    """Steps between tests; 0 = never. One is then made at the last step, too."""
    prompts: tuple[str, ...] = ("completely black", "completely white", "completely grey")
    """What is drawn: words that the captions of the run's pictures use."""
    wanted: tuple[float, ...] = (0.0, 1.0, 0.5)
    """Mean brightness that each prompt asks for: 0 black, 1 white."""
    seeds: int = 4
    """Pictures a prompt."""
    canvas: tuple[int, int] = (1024, 1024)
    """(height, width) in pixels."""
    sampling_steps: int = 28
    """Steps from pure noise."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 = off."""

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.wanted) or not self.prompts:
            raise ConfigError(
                f"brightness has {len(self.prompts)} prompts and {len(self.wanted)} wanted values; give one of each"
            )
        if self.every < 0 or self.seeds < 1 or not all(0 <= value <= 1 for value in self.wanted):
            raise ConfigError("brightness takes every ≥ 0, seeds ≥ 1, and wanted values from 0 (black) to 1 (white)")


def brightness(
    model: SDXLModel, config: BrightnessConfig, ranks: Ranks | None = None, *, lockstep: bool = False
) -> Brightness:
    """How bright the prompts' pictures come out of pure noise.

    With `lockstep` every forward pass needs all ranks, so that each draws all; else each draws its part. Collective.
    """
    ranks = ranks or Ranks()
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
    for (prompt, _), picture in zip(mine, draw_pictures(model, requests), strict=True):
        mean = float(np.asarray(picture.image.convert("L"), dtype=np.float64).mean() / 255)
        sums[:, prompt] += mean, abs(mean - config.wanted[prompt])
    if not lockstep:
        sums = np.array(ranks.sums(sums.ravel().tolist())).reshape(sums.shape)
    means, errors = (sums / config.seeds).tolist()
    return {
        "brightness": dict(zip(config.prompts, means, strict=True)),
        "brightness_error": float(np.mean(errors)),
    }
