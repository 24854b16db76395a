"""The report's task: latents are noised, a U-Net says what was done to them. The arithmetic is `step`'s."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sumizome.data.loader import TrainBatch
from sumizome.models.sdxl import SDXLModel
from sumizome.shapes import Timesteps
from sumizome.train.step import Objective, training_loss
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
    clipped_apart: tuple[str, ...] = ()

    @property
    def num_timesteps(self) -> int:
        return self.objective.schedule.num_timesteps

    def draw(self, batch: TrainBatch, place: Place) -> Timesteps:
        """The timestep of each sample."""
        rows = len(batch.seeds)
        positions = (place.micro_batch * rows + torch.arange(rows)) / (place.micro_batches * rows)
        return self.draw_timesteps(batch, place.step, positions)

    def loss(self, batch: TrainBatch, drawn: Timesteps) -> StepLoss:
        """The loss of each sample at its timestep."""
        return training_loss(self.model, self.objective, batch, drawn, self.max_chunks)

    def log_line(self, batch: TrainBatch, drawn: Timesteps) -> Mapping[str, Any]:
        """The noise is not written: it follows from the seed."""
        return {"timesteps": drawn.tolist(), "captions": batch.captions}
