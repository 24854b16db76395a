"""What is looked at while a run trains: observers, called after the steps at which they are due.

An observer sees the averaged weights (the trainer puts them in place), writes its numbers and returns what a user
should read, or None. Every rank calls it; `metrics` writes on the first only. One more thing to watch is one more
observer in `build_observers`, and nothing in the loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sumizome.data.loader import BatchLoader
from sumizome.distributed.parallelize import Parallel
from sumizome.distributed.runtime import Ranks
from sumizome.models.sdxl import SDXLModel
from sumizome.train.config import TrainConfig
from sumizome.train.precision import Precision
from sumizome.train.preview import write_preview
from sumizome.train.stages import StagedLoader
from sumizome.train.step import Objective
from sumizome.train.validation import validation_loss

__all__ = ["Observer", "build_observers"]


@dataclass(frozen=True)
class Observer:
    """Something that is done every so many steps, and after the last one."""

    name: str
    every: int
    look: Callable[[int, Any], str | None]
    """(step, metrics) → a line for the user."""


def build_observers(
    config: TrainConfig,
    model: SDXLModel,
    objective: Objective,
    loader: BatchLoader | StagedLoader,
    precision: Precision,
    parallel: Parallel,
    ranks: Ranks,
) -> list[Observer]:
    """Validation and previews, where the settings ask for them."""

    def validate(step: int, metrics: Any) -> str | None:
        batches = list(loader.validation_batches(config.micro_batch_size))
        if not batches:
            return None
        with precision.autocast():
            losses = validation_loss(model, objective, batches, config.validation.timesteps, config.max_chunks, ranks)
        metrics.write(step, {"validation_loss": losses})
        noisiest = max(losses, key=int)
        mean = sum(losses.values()) / len(losses)
        return f"validation loss {mean:.4f}, at t = {noisiest} {losses[noisiest]:.4f}"

    def preview(step: int, metrics: Any) -> str | None:
        # A forward pass of sharded networks needs every rank; else the first draws alone.
        if not (ranks.is_first or parallel.lockstep):
            return None
        folder = config.run_dir / "previews" if ranks.is_first else None
        path, image = write_preview(model, config.preview, folder, step)
        metrics.write_image(step, "previews", image)
        return f"preview {path}"

    observers = [Observer("validation", config.validation.every if config.validation.count else 0, validate)]
    observers += [Observer("preview", config.preview.every, preview)]
    return [observer for observer in observers if observer.every]
