"""Pictures of a run while it trains: the same prompts and seeds each time, as one grid."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.errors import CheckpointError
from sumizome.files import write_atomically
from sumizome.inference import PictureRequest, SamplingConfig, draw_pictures, picture_grid
from sumizome.models.sdxl import SDXLModel
from sumizome.train.config import PreviewConfig

__all__ = ["draw_preview", "write_preview"]


def draw_preview(
    model: SDXLModel, config: PreviewConfig, max_chunks: int, may_go_on: Callable[[], None]
) -> Image.Image:
    """Draws the configured prompts with the model's present weights, as one grid. `max_chunks`: as captions have.

    `may_go_on` is asked after each sampler step; what it raises ends the drawing.
    """
    sampling = SamplingConfig(
        steps=config.sampling_steps, guidance=GuidanceConfig(guidance_scale=config.guidance_scale)
    )
    requests = [
        PictureRequest(prompt, canvas=config.canvas, seed=config.seed + index, sampling=sampling)
        for index, prompt in enumerate(config.prompts)
    ]
    pictures = draw_pictures(model, requests, max_chunks=max_chunks, on_step=lambda *_: may_go_on())
    return picture_grid([picture.image for picture in pictures])


def write_preview(grid: Image.Image, directory: Path, step: int) -> Path:
    """Writes a step's grid and returns its path. Raises: CheckpointError if it cannot be written."""
    path = directory / f"step-{step:08d}.png"
    write_atomically(path, lambda temporary: grid.save(temporary, format="PNG"), failure=CheckpointError)
    return path
