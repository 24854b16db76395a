"""A tag weight reaches the gradient of the step as the closed form says: g = mean over samples of weight · ∇loss."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import short_run

from sumizome.models.text_encoding import PromptTokens
from sumizome.train.build import build_trainer
from sumizome.train.config import TrainConfig
from sumizome.train.optim import OptimConfig
from sumizome.train.run_dir import hold_run_dir
from sumizome.train.step import Drawn
from sumizome.train.task import Place
from sumizome.train.trainer import Trainer

PLACE, ROW, SAMPLES = 1, 0, 4  # which sample of the step's two micro-batches of two gets another weight
WEIGHT = 2.5


@pytest.fixture
def config(small_folder: Path, tiny_latents: Path, tmp_path: Path) -> TrainConfig:
    return short_run(small_folder, tiny_latents, tmp_path / "run", steps=1, optim=OptimConfig(max_grad_norm=0.0))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None}


def gradients_of_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    with closing(trainer.steps()) as steps:
        next(steps)
    return gradients(trainer)


def test_one_weight_moves_the_gradient_by_its_share_of_that_samples(config: TrainConfig, tmp_path: Path) -> None:
    with hold_run_dir(config.run_dir):
        plain, _ = build_trainer(config)
        batch = plain.loader.step(0)[PLACE]
        # The sample on its own, at the timestep that the step gives it.
        drawn = plain.task.draw(batch, Place(0, PLACE, config.micro_batches_per_step))
        alone = replace(
            batch,
            latents=batch.latents[[ROW]],
            captions=[batch.captions[ROW]],
            time_ids=batch.time_ids[[ROW]],
            tag_weight=torch.ones(1),
            seeds=batch.seeds[[ROW]],
        )
        loss = plain.task.loss(
            alone,
            Drawn(
                drawn.timesteps[[ROW]],
                drawn.noise[[ROW]],
                PromptTokens(drawn.tokens.input_ids[:, [ROW]], drawn.tokens.dropped[ROW : ROW + 1]),
            ),
        )
        loss.weighted.sum().backward()
        of_sample = gradients(plain)
        before = gradients_of_step(plain)

    other = replace(config, run_dir=tmp_path / "weighted")
    with hold_run_dir(other.run_dir):
        weighted, _ = build_trainer(other)
        index = weighted.loader.cache.index
        weights = np.ones(len(weighted.loader.cache), np.float32)
        weights[index.ids(np.arange(len(weights))).index(batch.sample_ids[ROW])] = WEIGHT
        weighted.loader = replace(weighted.loader, tag_weight=weights)
        after = gradients_of_step(weighted)

    assert any(float(g.abs().max()) > 1e-4 for g in of_sample.values())
    for name, gradient in of_sample.items():
        moved = after[name] - before[name]
        torch.testing.assert_close(moved, gradient * (WEIGHT - 1) / SAMPLES, rtol=1e-3, atol=1e-6)
