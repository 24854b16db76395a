"""Runs of a few steps on the CPU, for tests of whatever surrounds a step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sumizome.train.config import CheckpointConfig, TrainConfig, ValidationConfig

__all__ = ["short_run"]


def short_run(model: Path, latents: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    """Steps of two micro-batches of two pictures; nothing is looked at or saved before the last."""
    config = TrainConfig(
        model=model,
        latents=latents,
        run_dir=run_dir,
        steps=4,
        micro_batch_size=2,
        micro_batches_per_step=2,
        max_chunks=1,
        log_every=1,
        tensorboard=False,
        device="cpu",
        validation=ValidationConfig(every=0, count=4, timesteps=(100, 999)),
        checkpoint=CheckpointConfig(every=0),
    )
    return replace(config, **changes)
