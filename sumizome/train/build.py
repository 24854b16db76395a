"""From settings to a trainer: the model, its parallelism, the data, the optimizer, and the state to go on from.

Takes the config apart; nothing below sees more of it than its own part. Every rank builds the same.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sumizome.data.batch_plan import check_world
from sumizome.data.latent_statistics import stated_statistics
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.loader import BatchLoader, build_loader
from sumizome.data.shard_cache import CacheConfig
from sumizome.data.store import is_remote
from sumizome.diffusion.loss import build_loss
from sumizome.diffusion.schedule import ScheduleConfig, build_noise_schedule
from sumizome.distributed.parallelize import Parallel, parallelize, put_shard, resolve_strategy
from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError, ConfigError
from sumizome.inference import check_canvas
from sumizome.models.model_weights import fill_shards
from sumizome.models.networks import building_blocks
from sumizome.models.sdxl import Component, SDXLModel, load_model
from sumizome.models.vae import apply_latent_statistics
from sumizome.seeds import derive_seed
from sumizome.settings import as_mapping
from sumizome.train.checkpoint import SavedCheckpoint, latest_checkpoint, remove_unfinished
from sumizome.train.config import TrainConfig
from sumizome.train.ema import Ema
from sumizome.train.mirror import CheckpointMirror
from sumizome.train.observers import build_observers
from sumizome.train.offload import offload
from sumizome.train.optim import build_optimizer
from sumizome.train.precision import Precision, build_precision
from sumizome.train.run_dir import (
    base_digests,
    check_base_model,
    read_run_config,
    record_run,
    stored_digests,
    table_digest,
    trained_networks,
    trained_parameters,
)
from sumizome.train.run_readme import code_facts, data_facts, machine_facts, write_readme
from sumizome.train.saver import Saver
from sumizome.train.stages import StagedLoader, span_at
from sumizome.train.state import restore
from sumizome.train.step import Objective, build_timestep_draw
from sumizome.train.trainer import Trainer

__all__ = ["build_trainer"]

_HELD_OUT_AT_MOST = 20
"""One picture in so many is held out at most, however small the set."""


def build_trainer(config: TrainConfig, ranks: Ranks | None = None) -> tuple[Trainer, list[str]]:
    """A trainer at the step where the run directory stands (0 when it is new), and what a user should be told.

    The caller holds the run directory (`run_dir.hold_run_dir`). Collective.
    Raises: ConfigError, ModelError, ShardError, CheckpointError as their parts do, before anything is trained.
    """
    ranks = ranks or Ranks()
    config = _with_absolute_paths(config)
    _check_ranks(config, ranks)  # before anything is loaded
    trainer = _new_trainer(config, ranks)
    saved, complaints = _newest_checkpoint(trainer)
    ranks.first(lambda: _record(trainer))
    if saved is not None:
        restore(saved, trainer.parameters, trainer.optimizer, trainer.ema)
        trainer.steps_done = trainer.saver.saved_step = saved.step
    return trainer, complaints


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The recorded config then means the same from any directory."""
    stages = tuple(
        replace(stage, latents=str(_absolute(Path(stage.latents)))) if stage.latents else stage
        for stage in config.stage
    )
    return replace(config, model=config.model.resolve(), latents=_absolute(config.latents), stage=stages)


def _absolute(latents: Path) -> Path:
    return latents if is_remote(latents) else latents.resolve()


def _check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Raises: ConfigError for a setting that is not for so many ranks, in any stage."""
    strategy = resolve_strategy(config.parallel, ranks)
    for span in config.spans():
        check_world(span.micro_batches_per_step, ranks.world)
    if config.optim.fused_backward and strategy != "none":
        raise ConfigError(
            f"optim.fused_backward is for one device, here several train together ({strategy}); set it to false"
        )
    if config.optim.name == "adamw8bit" and strategy in ("fsdp", "hybrid"):
        raise ConfigError(
            f'optim.name = "adamw8bit" cannot be cut over ranks ({strategy}); take "adamw" or parallel.strategy = "ddp"'
        )


def _new_trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    """At step 0, from the base model."""
    precision = build_precision(config.precision, ranks.device)
    schedule = build_noise_schedule(config.schedule)
    model, facts, parallel = _build_model(config, ranks, precision)
    loader = _build_loader(config, facts, ranks)
    facts |= {"latents": loader.fingerprint}
    if isinstance(loader, StagedLoader):
        facts |= {"latents_of_stages": loader.fingerprints}
    parameters = trained_parameters(model, config.optim.text_encoder_lr > 0)
    objective = Objective(schedule, config.prediction_type, build_loss(config.loss, schedule, config.prediction_type))
    base = facts["base_prediction"]
    base_schedule = build_noise_schedule(ScheduleConfig(**base["schedule"]))
    return Trainer(
        config=config,
        model=model,
        objective=replace(objective, noise_offset=config.noise_offset),
        draw_timesteps=build_timestep_draw(config.timestep_sampling, schedule, config.seed, config.timestep_shift_from),
        loader=loader,
        parameters=parameters,
        optimizer=build_optimizer(config.optim, parameters, config.seed),
        ema=Ema(config.ema, parameters),
        saver=_build_saver(config, ranks),
        facts=facts,
        ranks=ranks,
        parallel=parallel,
        precision=precision,
        observers=build_observers(
            config,
            model,
            objective,
            loader,
            precision,
            parallel,
            ranks,
            base=(base["prediction_type"], base_schedule),
        ),
    )


def _build_saver(config: TrainConfig, ranks: Ranks) -> Saver:
    settings = config.checkpoint
    mirror = CheckpointMirror(settings.mirror, settings.keep) if settings.mirror else None
    return Saver(
        config.run_dir / "checkpoints",
        ranks,
        keep=settings.keep,
        asynchronous=settings.asynchronous,
        mirror=mirror,
    )


def _newest_checkpoint(trainer: Trainer) -> tuple[SavedCheckpoint | None, list[str]]:
    """What to go on from, here or in the mirror, and what was wrong on the way. Collective."""
    ranks, saver, config = trainer.ranks, trainer.saver, trainer.config
    ranks.first(lambda: remove_unfinished(saver.directory))
    mirror = saver.mirror
    complaints = ranks.first(lambda: mirror.bring_back(saver.directory)) if mirror else []
    saved, damages = latest_checkpoint(saver.directory, ranks=ranks)
    complaints += [f"{damage}; going on from the checkpoint before it" for damage in damages]
    if saved is not None:
        step = saved.step
        complaints += ranks.first(lambda: _lr_complaint(config, step))
        _check_origin(trainer, saved)
    return saved, complaints


def _record(trainer: Trainer) -> None:
    """Writes what the run is into its directory. Raises: ConfigError if it was begun as something else."""
    config, loader = trainer.config, trainer.loader
    facts = {
        **trainer.facts,
        **code_facts(),
        **machine_facts(trainer.device),
        "data": data_facts(loader.loaders if isinstance(loader, StagedLoader) else [loader]),
        **table_digest(config.tag_weights.table),
        "device": str(trainer.device),
        "ranks": trainer.ranks.world,
        "strategy": trainer.parallel.strategy,
    }
    record_run(config, facts)
    write_readme(config, facts)
    trainer.saver.directory.mkdir(exist_ok=True)


def _build_model(config: TrainConfig, ranks: Ranks, precision: Precision) -> tuple[SDXLModel, dict[str, Any], Parallel]:
    """The base model, spread over the ranks, with gradients on what is trained; and its digests.

    The VAE, which only previews use, stays frozen and whole, as do text encoders that are not trained. What is cut up
    is never whole in any rank's memory: it is cut on the meta device, and each rank fills its shards from the file.
    """
    text_is_trained = config.optim.text_encoder_lr > 0
    sharded = resolve_strategy(config.parallel, ranks) in ("fsdp", "hybrid")
    cut: tuple[Component, ...] = ("unet", "text_encoders") if text_is_trained else ("unet",)
    model = load_model(config.model, device=ranks.device, without_weights=cut if sharded else ())
    # Of the base model's own float32 weights, whatever they are trained in.
    digests = ranks.first(lambda: stored_digests(model)) if sharded else base_digests(model)
    # How the run predicts, not how its base did: previews must sample what is being learned.
    base = {"prediction_type": model.prediction_type, "schedule": as_mapping(model.schedule_config)}
    model = replace(model, prediction_type=config.prediction_type, schedule_config=config.schedule)
    _prepare_networks(model, config, precision)
    trained = trained_networks(model, text_is_trained)
    parallel = parallelize(
        trained, building_blocks, ranks, config.parallel, activation_checkpointing=config.gradient_checkpointing
    )
    if sharded:
        fill_shards(config.model, trained, ranks.device, put_shard)
    if config.offload_text_encoders:
        for encoder in model.text_encoders:
            offload(encoder.to("cpu"), ranks.device)
    return model, {"base_model": digests, "base_prediction": base}, parallel


def _prepare_networks(model: SDXLModel, config: TrainConfig, precision: Precision) -> None:
    """Number format, gradients where they are wanted, and the VAE's statistics; checks that previews can be drawn."""
    statistics = stated_statistics(config.latent_statistics)
    if statistics:  # previews decode with these
        apply_latent_statistics(model.vae, *statistics)
    for name, network in model.networks().items():
        if name != "vae" and precision.weights != torch.float32:
            network.to(precision.weights)
    if config.preview.every:
        check_canvas(model, config.preview.canvas)
    model.vae.requires_grad_(False)
    model.unet.requires_grad_(True).train()
    model.text_encoders.requires_grad_(config.optim.text_encoder_lr > 0)


def _build_loader(config: TrainConfig, facts: dict[str, Any], ranks: Ranks) -> BatchLoader | StagedLoader:
    """The loader of the run's latents, or one for all of its stages."""
    spans = config.spans()
    caches = {str(span.latents): _open_latents(config, Path(span.latents), facts) for span in spans}
    loaders: list[BatchLoader] = []
    for span in spans:
        cache = caches[str(span.latents)]
        first = loaders[0] if loaders else None
        loader = build_loader(
            cache,
            # Else a picture would meet the noise of the stage before again.
            seed=derive_seed(config.seed, "stage", span.number) if span.number else config.seed,
            micro_batch_size=span.micro_batch_size,
            micro_batches_per_step=span.micro_batches_per_step,
            validation_count=0 if first else min(config.validation.count, len(cache) // _HELD_OUT_AT_MOST),
            leave_out=first.cache.index.picture_hash[first.validation_rows] if first else None,
            captions=config.captions,
            tag_weights=config.tag_weights,
            pin_memory=ranks.device.type == "cuda",
            rank=ranks.rank,
            world=ranks.world,
        )
        loaders.append(loader)
    return loaders[0] if len(loaders) == 1 else StagedLoader(spans, loaders)


def _open_latents(config: TrainConfig, latents: Path, facts: dict[str, Any]) -> LatentCache:
    """Latents, which must be those of this model's VAE, normalised as the run has it."""
    here = CacheConfig(config.cache_dir.expanduser(), round(config.cache_size * 1e9))
    cache = open_latents(latents, cache=here)
    cache.require(vae_digest=facts["base_model"]["vae"])
    statistics = stated_statistics(config.latent_statistics)
    return cache.normalised_by(*statistics) if statistics else cache


def _lr_complaint(config: TrainConfig, step: int) -> list[str]:
    """A word on a learning rate that depends on its stage's length, when that changes after the stage has begun."""
    before, now = (span_at(each.spans(), step) for each in (read_run_config(config.run_dir), config))
    if config.optim.lr_schedule == "constant" or before.number != now.number or before.last == now.last:
        return []
    return [
        f"steps was {before.last} and is now {now.last}: from here on the {config.optim.lr_schedule} learning rate is "
        f"that of {now.last} steps, so this is not the run that {now.last} steps from the start would have been"
    ]


def _check_origin(trainer: Trainer, saved: SavedCheckpoint) -> None:
    """Raises: CheckpointError when the checkpoint was trained from another base model, or on other latents."""
    check_base_model(trainer.config.run_dir, saved, trainer.facts["base_model"])
    before, now = (
        [facts.get("latents"), *facts.get("latents_of_stages", [])[1:]] for facts in (saved.facts, trainer.facts)
    )
    begun = sum(span.first < saved.step for span in trainer.config.spans())
    if before[:begun] != now[:begun]:
        raise CheckpointError(
            f"{trainer.config.run_dir}: it was trained on other latents than those of {trainer.config.latents} (a "
            "manifest that was prepared anew with other pictures or tags makes others, too); give the ones it was "
            "started with, or another run_dir, whose model may be this one's export"
        )
