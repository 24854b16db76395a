"""The training loop: batch, loss, gradient, step, average; and around it validation, previews, checkpoints, metrics.

`build_trainer` takes the settings apart and resumes what is there; `Trainer.steps` trains and yields a report a step,
so that the progress bar, and the decision to stop, belong to the caller. One process; every random number is a
function of the run's seed and of what it is for (epoch and sample, or step and position), so weights, optimizer,
average and step are the whole state.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sumizome.data.latent_statistics import stated_statistics
from sumizome.data.latents import open_latents
from sumizome.data.loader import BatchLoader, TrainBatch, build_loader
from sumizome.data.shard_cache import CacheConfig
from sumizome.data.store import is_remote
from sumizome.device import choose_device
from sumizome.diffusion.loss import build_loss
from sumizome.diffusion.schedule import build_noise_schedule
from sumizome.errors import CheckpointError, NonFiniteError
from sumizome.inference import check_canvas
from sumizome.models.sdxl import SDXLModel, load_model
from sumizome.models.vae import apply_latent_statistics, vae_digest
from sumizome.train.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_optimizer,
    optimizer_tensors,
    prune_checkpoints,
    remove_unfinished,
    write_checkpoint,
)
from sumizome.train.config import TrainConfig
from sumizome.train.ema import Ema
from sumizome.train.metrics import Metrics, Window
from sumizome.train.optim import apply_lr, build_optimizer, lr_factor
from sumizome.train.preview import write_preview
from sumizome.train.run_dir import (
    base_digests,
    check_base_model,
    read_run_config,
    record_run,
    table_digest,
    trained_parameters,
)
from sumizome.train.step import Objective, StepLoss, draw_timesteps, training_loss
from sumizome.train.validation import validation_loss

__all__ = ["StepReport", "Trainer", "build_trainer"]

_HELD_OUT_AT_MOST = 20
"""One picture in so many is held out at most, however small the set."""


@dataclass(frozen=True)
class StepReport:
    """What one step did, for whoever watches."""

    steps_done: int
    epoch: int
    loss: float
    """Unweighted mean squared error of the step."""
    images_per_second: float
    notes: tuple[str, ...] = ()
    """Events in plain words: a checkpoint, a validation."""


@dataclass
class Trainer:
    """A run in progress: its state is `model`, `optimizer`, `ema` and `steps_done`; the rest is how it is trained."""

    config: TrainConfig
    model: SDXLModel
    objective: Objective
    loader: BatchLoader
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema
    steps_done: int
    device: torch.device
    facts: dict[str, Any]
    window: Window = field(default_factory=Window)

    def steps(self) -> Iterator[StepReport]:
        """Trains up to `config.steps`, yielding after each step; close the generator to stop after a step.

        The last finished step is in a checkpoint when it ends, is closed, or meets a number that is not finite.
        Raises: NonFiniteError when a loss or gradient is not finite; the weights are those of the step before.
        """
        with Metrics(self.config.run_dir, self.steps_done, self.config.tensorboard) as metrics:
            saved_at = self.steps_done
            try:
                with self.loader.from_step(self.steps_done) as batches_of_steps:
                    while self.steps_done < self.config.steps:
                        started = time.perf_counter()
                        batches = next(batches_of_steps)
                        waited = time.perf_counter() - started
                        loss = self._train_step(batches)
                        seconds = time.perf_counter() - started
                        self.window.add_time(seconds, waited)
                        notes = self._after_step(metrics)
                        saved_at = self.steps_done if "checkpoint" in notes else saved_at
                        epoch = max(max(batch.epochs) for batch in batches)
                        yield StepReport(self.steps_done, epoch, loss, self._images_per_step / seconds, notes)
            except (GeneratorExit, NonFiniteError):
                # In both cases the weights are those of the last finished step.
                if saved_at < self.steps_done:
                    self._save()
                raise

    def _train_step(self, batches: list[TrainBatch]) -> float:
        """One optimizer step on the step's micro-batches; returns their unweighted loss.

        A micro-batch is the mean over its samples, the step the mean over its micro-batches.
        Raises: NonFiniteError, with nothing changed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for index, batch in enumerate(batches):
            with self._precision():
                loss = training_loss(
                    self.model,
                    self.objective,
                    batch,
                    self._timesteps(batch, index, len(batches)),
                    self.config.max_chunks,
                )
            (loss.weighted.mean() / len(batches)).backward()
            losses.append(loss)
        grad_norm = self._clip()
        self._check_finite(losses, grad_norm, batches)
        lr = apply_lr(self.optimizer, lr_factor(self.config.optim, self.steps_done, self.config.steps))
        self.optimizer.step()
        self.steps_done += 1
        self.ema.update(self.steps_done)
        self.window.add_step(losses, float(grad_norm), lr)
        return float(torch.cat([loss.unweighted for loss in losses]).detach().mean())

    def _timesteps(self, batch: TrainBatch, index: int, micro_batches: int) -> Tensor:
        rows = len(batch.seeds)
        positions = (index * rows + torch.arange(rows)) / (micro_batches * rows)
        return draw_timesteps(
            self.config.timestep_sampling,
            self.objective.schedule.num_timesteps,
            batch.seeds,
            self.config.seed,
            self.steps_done,
            positions,
        )

    @property
    def _images_per_step(self) -> int:
        return self.config.micro_batch_size * self.config.micro_batches_per_step

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _clip(self) -> Tensor:
        limit = self.config.optim.max_grad_norm or math.inf
        return nn.utils.clip_grad_norm_(self.parameters.values(), limit)

    def _check_finite(self, losses: list[StepLoss], grad_norm: Tensor, batches: list[TrainBatch]) -> None:
        finite = torch.stack([loss.weighted.detach().isfinite().all() for loss in losses]).all()
        if bool(finite) and math.isfinite(float(grad_norm)):
            return
        samples = [
            sample
            for loss, batch in zip(losses, batches, strict=True)
            for sample, value in zip(batch.sample_ids, loss.weighted.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        what = "loss" if samples else "gradient"
        samples = samples or [sample for batch in batches for sample in batch.sample_ids]
        self.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"step {self.steps_done + 1}: the {what} is not finite, in samples {', '.join(samples)}. The weights of "
            "the step before are saved. Look at these images; to go on with other settings, such as a lower optim.lr, "
            "export the run and train the export in a new run_dir"
        )

    def _after_step(self, metrics: Metrics) -> tuple[str, ...]:
        """Whatever is due after a step; returns what was done, in words."""
        step, config = self.steps_done, self.config
        notes: list[str] = []
        # First of all: whatever fails below must not cost the steps since the last checkpoint.
        if _due(step, config.checkpoint.every, config.steps):
            self._save()
            notes.append("checkpoint")
        if _due(step, config.log_every, config.steps):
            record = self.window.summary(self._images_per_step, self.objective.schedule.num_timesteps)
            metrics.write(step, {**record, "samples_seen": step * self._images_per_step})
            self.window = Window()
        if config.validation.every and config.validation.count and _due(step, config.validation.every, config.steps):
            losses = self._validate()
            metrics.write(step, {"validation_loss": losses})
            noisiest = max(losses, key=int)
            mean = sum(losses.values()) / len(losses)
            notes.append(f"validation loss {mean:.4f}, at t = {noisiest} {losses[noisiest]:.4f}")
        if config.preview.every and _due(step, config.preview.every, config.steps):
            with self.ema.applied():
                path, image = write_preview(self.model, config.preview, config.run_dir / "previews", step)
            metrics.write_image(step, "previews", image)
            notes.append(f"preview {path}")
        return tuple(notes)

    def _validate(self) -> dict[str, float]:
        with self.ema.applied(), self._precision():
            return validation_loss(
                self.model,
                self.objective,
                self.loader.validation_batches(self.config.micro_batch_size),
                self.config.validation.timesteps,
                self.config.max_chunks,
            )

    def _save(self) -> None:
        directory = self.config.run_dir / "checkpoints"
        state = Checkpoint(
            step=self.steps_done,
            weights=self.parameters,
            ema=self.ema.average,
            optimizer=optimizer_tensors(self.optimizer, self.parameters),
            facts=self.facts,
        )
        write_checkpoint(directory, state)
        prune_checkpoints(directory, self.config.checkpoint.keep)


def build_trainer(config: TrainConfig) -> tuple[Trainer, list[str]]:
    """A trainer at the step where the run directory stands (0 when it is new), and what a user should be told.

    The caller holds the run directory (`run_dir.hold_run_dir`).
    Raises: ConfigError, ModelError, ShardError, CheckpointError as their parts do, before anything is trained.
    """
    # Absolute, so that the recorded config means the same from any directory.
    latents = config.latents if is_remote(config.latents) else config.latents.resolve()
    config = replace(config, model=config.model.resolve(), latents=latents)
    device = choose_device(config.device)
    # The report's float32 with tf32 matrix products; without effect on a CPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    schedule = build_noise_schedule(config.schedule)
    model = _load_base_model(config, device)
    if config.preview.every:
        check_canvas(model, config.preview.canvas)
    loader = _build_loader(config, model)
    checkpoints = config.run_dir / "checkpoints"
    facts = {"base_model": base_digests(model), "latents": loader.fingerprint}
    statistics = stated_statistics(config.latent_statistics)
    if statistics:  # after the digests, which are the base model's own; previews decode with these
        apply_latent_statistics(model.vae, *statistics)
    parameters = trained_parameters(model, config.optim.text_encoder_lr > 0)
    trainer = Trainer(
        config=config,
        model=model,
        objective=Objective(
            schedule, config.prediction_type, build_loss(config.loss, schedule, config.prediction_type)
        ),
        loader=loader,
        parameters=parameters,
        optimizer=build_optimizer(config.optim, parameters),
        ema=Ema(config.ema, parameters),
        steps_done=0,
        device=device,
        facts=facts,
    )
    remove_unfinished(checkpoints)
    checkpoint, damages = latest_checkpoint(checkpoints)
    complaints = [f"{damage}; going on from the checkpoint before it" for damage in damages]
    complaints += _lr_complaint(config) if checkpoint is not None else []
    record_run(config, {**facts, **table_digest(config.tag_weights.table), "device": str(device)})
    checkpoints.mkdir(exist_ok=True)
    if checkpoint is not None:
        _resume(trainer, checkpoint)
    return trainer, complaints


def _build_loader(config: TrainConfig, model: SDXLModel) -> BatchLoader:
    """The loader of the run's latents, which must be those of this model's VAE."""
    here = CacheConfig(config.cache_dir.expanduser(), round(config.cache_size * 1e9))
    cache = open_latents(config.latents, cache=here)
    cache.require(vae_digest=vae_digest(model.vae))
    statistics = stated_statistics(config.latent_statistics)
    if statistics:
        cache = cache.normalised_by(*statistics)
    return build_loader(
        cache,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        micro_batches_per_step=config.micro_batches_per_step,
        validation_count=min(config.validation.count, len(cache) // _HELD_OUT_AT_MOST),
        captions=config.captions,
        tag_weights=config.tag_weights,
    )


def _load_base_model(config: TrainConfig, device: torch.device) -> SDXLModel:
    """The base model with gradients on what is trained. The VAE, which only previews use, stays frozen."""
    model = load_model(config.model, device=device)
    # How the run predicts, not how its base did: previews must sample what is being learned.
    model = replace(model, prediction_type=config.prediction_type, schedule_config=config.schedule)
    model.vae.requires_grad_(False)
    model.unet.requires_grad_(True).train()
    model.text_encoders.requires_grad_(config.optim.text_encoder_lr > 0)
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    return model


def _lr_complaint(config: TrainConfig) -> list[str]:
    """A word on a learning rate that depends on the run's length, when the length changes."""
    before = read_run_config(config.run_dir).steps
    if before == config.steps or config.optim.lr_schedule == "constant":
        return []
    return [
        f"steps was {before} and is now {config.steps}: from here on the {config.optim.lr_schedule} learning rate is "
        f"that of {config.steps} steps, so this is not the run that {config.steps} steps from the start would have been"
    ]


def _resume(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Puts the checkpoint's state into the trainer.

    Raises: CheckpointError when it was trained from another base model, on other latents, or does not fit.
    """
    check_base_model(trainer.config.run_dir, checkpoint, trainer.facts["base_model"])
    if checkpoint.facts.get("latents") != trainer.facts["latents"]:
        raise CheckpointError(
            f"{trainer.config.run_dir}: it was trained on other latents than those of {trainer.config.latents} (a "
            "manifest that was prepared anew with other pictures or tags makes others, too); give the ones it was "
            "started with, or another run_dir, whose model may be this one's export"
        )
    if set(checkpoint.weights) != set(trainer.parameters):
        raise CheckpointError(f"{trainer.config.run_dir}: its checkpoint holds other parameters than are trained now")
    for name, parameter in trainer.parameters.items():
        parameter.data.copy_(checkpoint.weights[name])
    trainer.ema.load(checkpoint.ema)
    load_optimizer(trainer.optimizer, trainer.parameters, checkpoint.optimizer)
    trainer.steps_done = checkpoint.step


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
