"""What is looked at while a run trains: observers, called after the steps at which they are due.

An observer sees the averaged weights (the trainer puts them in place), writes its numbers and returns what a user
should read, or None. Every rank calls it; `metrics` writes on the first only, and what is written beside it goes
through `metrics.keep`: a full disk must end no run, nor set one rank apart from the others. Between two pieces of its
work an observer asks `lookout` whether to go on. One more thing to watch is one more observer in `build_observers`, and
nothing in the loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sumizome.data.loader import BatchLoader
from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import NoiseSchedule
from sumizome.distributed.parallelize import Parallel
from sumizome.distributed.runtime import Ranks
from sumizome.models.sdxl import SDXLModel
from sumizome.train.brightness import brightness
from sumizome.train.config import TrainConfig
from sumizome.train.lookout import Lookout
from sumizome.train.precision import Precision
from sumizome.train.preview import draw_preview, write_preview
from sumizome.train.stages import StagedLoader
from sumizome.train.step import Objective
from sumizome.train.uptraining import base_loss, readable_timesteps, write_loss_table
from sumizome.train.validation import SampleLoss, loss_of, validation_loss

__all__ = ["Observer", "build_observers"]


@dataclass(frozen=True)
class Observer:
    """Something that is done every so many steps, and after the last one."""

    name: str
    every: int
    look: Callable[[int, Any, Lookout], str | None]
    """(step, metrics, lookout) → a line for the user."""
    before_training: bool = False
    """Look once before the first step, too, at step 0."""


def build_observers(
    config: TrainConfig,
    model: SDXLModel,
    objective: Objective,
    loader: BatchLoader | StagedLoader,
    precision: Precision,
    parallel: Parallel,
    ranks: Ranks,
    base: tuple[PredictionType, NoiseSchedule],
) -> list[Observer]:
    """Validation, previews and brightness, where the settings ask for them. `base`: how the base model predicts."""

    def losses_of(sample_loss: SampleLoss, timesteps: Sequence[int], lookout: Lookout) -> dict[str, float]:
        # As many at a time as the stage trains on whose pictures they are.
        batches = list(loader.validation_batches(config.spans()[0].micro_batch_size))
        with precision.autocast():
            return validation_loss(model, sample_loss, batches, timesteps, config.max_chunks, ranks, lookout)

    def validate(step: int, metrics: Any, lookout: Lookout) -> str | None:
        timesteps = config.validation.timesteps
        if not len(loader.validation_rows):
            return None
        if step == 0 and (base[0] != objective.prediction_type or _differ(base[1], objective.schedule)):
            readable = readable_timesteps(objective.schedule, base[1], timesteps)
            before = losses_of(base_loss(model, objective, *base), readable, lookout)
            metrics.write(step, {"base_loss": {str(t): before.get(str(t)) for t in timesteps}})
        losses = losses_of(loss_of(model, objective), timesteps, lookout)
        metrics.write(step, {"validation_loss": losses})
        metrics.keep("loss_by_timestep.txt", lambda: write_loss_table(config.run_dir, step, losses))
        noisiest = max(losses, key=int)
        mean = sum(losses.values()) / len(losses)
        return f"validation loss {mean:.4f}, at t = {noisiest} {losses[noisiest]:.4f}"

    def preview(step: int, metrics: Any, lookout: Lookout) -> str | None:
        # A forward pass of sharded networks needs every rank; else the first draws alone.
        if not (ranks.is_first or parallel.lockstep):
            return None
        may_go_on = lookout.together if parallel.lockstep else lookout.alone
        grid = draw_preview(model, config.preview, config.max_chunks, may_go_on)
        path = metrics.keep("the preview", lambda: write_preview(grid, config.run_dir / "previews", step))
        metrics.write_image(step, "previews", np.asarray(grid))
        return f"preview {path}" if path else None

    def flat_pictures(step: int, metrics: Any, lookout: Lookout) -> str | None:
        found = brightness(
            model,
            config.brightness,
            ranks,
            max_chunks=config.max_chunks,
            lockstep=parallel.lockstep,
            lookout=lookout,
        )
        metrics.write(step, found)
        means = ", ".join(f"{prompt} {mean:.3f}" for prompt, mean in found["brightness"].items())
        return f"brightness {means}; off by {found['brightness_error']:.3f}"

    observers = [
        Observer("validation", config.validation.every if config.validation.count else 0, validate, True),
        Observer("preview", config.preview.every, preview),
        Observer("brightness", config.brightness.every, flat_pictures),
    ]
    return [observer for observer in observers if observer.every]


def _differ(a: NoiseSchedule, b: NoiseSchedule) -> bool:
    return not torch.equal(a.alphas_cumprod, b.alphas_cumprod)
