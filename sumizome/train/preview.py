"""Pictures of a run while it trains: the same prompts and seeds each time, as one grid."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.inference import PictureRequest, SamplingConfig, draw_pictures, picture_grid
from sumizome.models.sdxl import SDXLModel
from sumizome.train.config import PreviewConfig

__all__ = ["write_preview"]


def write_preview(
    model: SDXLModel, config: PreviewConfig, directory: Path | None, step: int
) -> tuple[Path | None, NDArray[np.uint8]]:
    """Draws the configured prompts with the model's present weights; returns the grid's path and pixels [H, W, 3].

    Without a directory it is drawn and not written: for ranks that must take part in the forward passes.
    """
    sampling = SamplingConfig(
        steps=config.sampling_steps, guidance=GuidanceConfig(guidance_scale=config.guidance_scale)
    )
    requests = [
        PictureRequest(prompt, canvas=config.canvas, seed=config.seed + index, sampling=sampling)
        for index, prompt in enumerate(config.prompts)
    ]
    grid = picture_grid([picture.image for picture in draw_pictures(model, requests)])
    if directory is None:
        return None, np.asarray(grid)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{step:08d}.png"
    grid.save(path)
    return path, np.asarray(grid)
