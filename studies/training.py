"""One run of a study, by Sumizome's own trainer: its settings, and what is looked at on the way.

Owns what all studies share: batch, optimizer, average. There is no loop here but that over `Trainer.steps`.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from studies.datasets import DataSet, alone, base_model, latents
from sumizome.models.sdxl import SDXLModel
from sumizome.train.build import build_trainer
from sumizome.train.config import CheckpointConfig, TrainConfig, ValidationConfig
from sumizome.train.ema import EmaConfig
from sumizome.train.optim import OptimConfig
from sumizome.train.run_dir import hold_run_dir, load_trained_model

__all__ = ["BATCH", "HELD_OUT", "finished_run", "run_config", "train"]

BATCH = 16
"""Pictures a step."""
HELD_OUT = 64
"""Pictures that no run trains on: those of the validation loss."""

Look = Callable[[int, SDXLModel], None]
"""(steps done, the model with its averaged weights)"""


def run_config(data: DataSet, seed: int, steps: int, run_dir: Path, **changes: Any) -> TrainConfig:
    """The settings of a run; `changes` are what an arm changes of them."""
    settings: dict[str, Any] = {
        "model": base_model(seed),
        "latents": latents(data),
        "run_dir": run_dir,
        "steps": steps,
        "micro_batch_size": BATCH,
        "max_chunks": 1,
        "seed": seed,
        "device": "cpu",
        "log_every": 50,
        "tensorboard": False,
        "optim": optimizer(steps),
        "ema": EmaConfig(decay=0.98),
        "validation": ValidationConfig(every=0, count=HELD_OUT),
        "checkpoint": CheckpointConfig(every=0, asynchronous=False),
    }
    return TrainConfig(**{**settings, **changes})


def optimizer(steps: int, *, lr: float = 2e-3, text_encoder_lr: float = 4e-3) -> OptimConfig:
    """AdamW as in the demo, with a shorter warm-up."""
    return OptimConfig(
        lr=lr,
        text_encoder_lr=text_encoder_lr,
        warmup_steps=min(30, steps // 8),
        lr_schedule="cosine",
        final_lr_factor=0.05,
        beta2=0.99,
    )


def train(config: TrainConfig, look: Look, looks: Sequence[int] = (), *, keep: bool = False) -> None:
    """Trains from the beginning; looks after each of the steps named (0: before the first) and after the last.

    The run directory is removed at the end unless it is to be kept.
    """
    shutil.rmtree(config.run_dir, ignore_errors=True)
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)

        def look_at(step: int) -> None:
            with trainer.ema.applied():
                look(step, trainer.task.model)

        if 0 in looks:
            look_at(0)
        with closing(trainer.steps()) as reports:
            for report in reports:
                if report.steps_done in looks or report.steps_done == config.steps:
                    look_at(report.steps_done)
    if not keep:
        shutil.rmtree(config.run_dir)


def finished_run(config: TrainConfig) -> SDXLModel:
    """The averaged model of a run that others begin from: trained here if it is not there whole."""
    with alone(config.run_dir):
        if not (config.run_dir / "checkpoints" / f"step-{config.steps:08d}").exists():
            train(config, lambda step, model: None, keep=True)
    return load_trained_model(config.run_dir)[0]
