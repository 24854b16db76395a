"""The report's task: latents are noised, a U-Net says what was done to them. The arithmetic is `step`'s."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sumizome.data.loader import TrainBatch
from sumizome.models.sdxl import SDXLModel
from sumizome.train.step import Drawn, Objective, draw, training_loss
from sumizome.train.task import Place, StepLoss
from sumizome.train.timesteps import DrawTimesteps

__all__ = ["Denoising"]


@dataclass(frozen=True)
class Denoising:
    """The model and what it learns; a `task.Task`."""

    model: SDXLModel
    objective: Objective
    draw_timesteps: DrawTimesteps
    max_chunks: int
    noise_offset: float = 0.0
    """See `step.draw_noise`."""
    clipped_apart: tuple[str, ...] = ()

    @property
    def num_timesteps(self) -> int:
        return self.objective.schedule.num_timesteps

    def draw(self, batch: TrainBatch, place: Place) -> Drawn:
        """The timestep and noise of each sample, and its caption's tokens."""
        rows = len(batch.seeds)
        positions = (place.micro_batch * rows + torch.arange(rows)) / (place.micro_batches * rows)
        timesteps = self.draw_timesteps(batch, place.step, positions)
        return draw(batch, timesteps, self.max_chunks, self.noise_offset)

    def loss(self, batch: TrainBatch, drawn: Drawn) -> StepLoss:
        """The loss of each sample at its timestep."""
        return training_loss(self.model, self.objective, batch, drawn)

    def log_line(self, batch: TrainBatch, drawn: Drawn) -> Mapping[str, Any]:
        """The noise is not written: it follows from the seed."""
        return {"timesteps": drawn.timesteps.tolist(), "captions": batch.captions}
