"""From settings to a trainer: the model, its parallelism, the data, the optimizer, and the state to go on from.

Takes the config apart; nothing below sees more of it than its own part. Every rank builds the same.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sumizome.data.latent_statistics import stated_statistics
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.loader import BatchLoader, build_loader
from sumizome.data.shard_cache import CacheConfig
from sumizome.data.store import is_remote
from sumizome.diffusion.loss import build_loss
from sumizome.diffusion.schedule import NoiseSchedule, ScheduleConfig, build_noise_schedule
from sumizome.distributed.parallelize import Parallel, parallelize, resolve_strategy
from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError, ConfigError
from sumizome.inference import check_canvas
from sumizome.models.networks import building_blocks
from sumizome.models.sdxl import SDXLModel, load_model
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
    table_digest,
    trained_networks,
    trained_parameters,
)
from sumizome.train.run_readme import code_facts, data_facts, machine_facts, write_readme
from sumizome.train.saver import Saver
from sumizome.train.stages import StagedLoader
from sumizome.train.state import restore
from sumizome.train.step import Objective
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
    # Absolute, so that the recorded config means the same from any directory.
    stages = tuple(
        replace(stage, latents=str(_absolute(Path(stage.latents)))) if stage.latents else stage
        for stage in config.stage
    )
    config = replace(config, model=config.model.resolve(), latents=_absolute(config.latents), stage=stages)
    _check_memory_savers(config, resolve_strategy(config.parallel, ranks))  # before anything is loaded
    precision = build_precision(config.precision, ranks.device)
    schedule = build_noise_schedule(config.schedule)
    model, facts, parallel = _build_model(config, ranks, precision)
    loader = _build_loader(config, facts, ranks)
    facts = {**facts, "latents": loader.fingerprint}
    if isinstance(loader, StagedLoader):
        facts["latents_of_stages"] = loader.fingerprints
    parameters = trained_parameters(model, config.optim.text_encoder_lr > 0)
    objective = Objective(schedule, config.prediction_type, build_loss(config.loss, schedule, config.prediction_type))
    checkpoints = config.run_dir / "checkpoints"
    mirror = CheckpointMirror(config.checkpoint.mirror, config.checkpoint.keep) if config.checkpoint.mirror else None
    trainer = Trainer(
        config=config,
        model=model,
        objective=replace(objective, noise_offset=config.noise_offset),
        loader=loader,
        parameters=parameters,
        optimizer=build_optimizer(config.optim, parameters, config.seed),
        ema=Ema(config.ema, parameters),
        saver=Saver(
            checkpoints,
            ranks,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            mirror=mirror,
        ),
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
            base=(facts["base_prediction"]["prediction_type"], _base_schedule(facts)),
        ),
    )
    ranks.first(lambda: remove_unfinished(checkpoints))
    complaints = ranks.first(lambda: mirror.bring_back(checkpoints)) if mirror else []
    saved, damages = latest_checkpoint(checkpoints, ranks=ranks)
    complaints += [f"{damage}; going on from the checkpoint before it" for damage in damages]
    if saved is not None:
        complaints += ranks.first(lambda: _lr_complaint(config))
        _check_origin(trainer, saved)
    environment = {
        **code_facts(),
        **machine_facts(ranks.device),
        "data": data_facts(loader.loaders if isinstance(loader, StagedLoader) else [loader]),
        **table_digest(config.tag_weights.table),
        "device": str(ranks.device),
        "ranks": ranks.world,
        "strategy": parallel.strategy,
    }
    ranks.first(lambda: record_run(config, {**facts, **environment}))
    ranks.first(lambda: write_readme(config, {**facts, **environment}))
    ranks.first(lambda: checkpoints.mkdir(exist_ok=True))
    if saved is not None:
        restore(saved, trainer.parameters, trainer.optimizer, trainer.ema)
        trainer.steps_done = trainer.saver.saved_step = saved.step
    return trainer, complaints


def _check_memory_savers(config: TrainConfig, strategy: str) -> None:
    """Raises: ConfigError for a setting that works on one device alone."""
    if config.optim.fused_backward and strategy != "none":
        raise ConfigError(
            f"optim.fused_backward is for one device, here several train together ({strategy}); set it to false"
        )
    if config.optim.name == "adamw8bit" and strategy in ("fsdp", "hybrid"):
        raise ConfigError(
            f'optim.name = "adamw8bit" cannot be cut over ranks ({strategy}); take "adamw" or parallel.strategy = "ddp"'
        )


def _build_model(config: TrainConfig, ranks: Ranks, precision: Precision) -> tuple[SDXLModel, dict[str, Any], Parallel]:
    """The base model, spread over the ranks, with gradients on what is trained; and its digests.

    The VAE, which only previews use, stays frozen and whole, as do text encoders that are not trained.
    """
    sharded = resolve_strategy(config.parallel, ranks) in ("fsdp", "hybrid")
    # A model that is to be cut up is loaded in main memory: no device needs to hold it whole.
    model = load_model(config.model, device="cpu" if sharded else ranks.device)
    digests = base_digests(model)  # of the base model's own float32 weights, whatever they are trained in
    statistics = stated_statistics(config.latent_statistics)
    if statistics:  # previews decode with these
        apply_latent_statistics(model.vae, *statistics)
    for name, network in model.networks().items():
        if name != "vae" and precision.weights != torch.float32:
            network.to(precision.weights)
    # How the run predicts, not how its base did: previews must sample what is being learned.
    base = {"prediction_type": model.prediction_type, "schedule": as_mapping(model.schedule_config)}
    model = replace(model, prediction_type=config.prediction_type, schedule_config=config.schedule)
    if config.preview.every:
        check_canvas(model, config.preview.canvas)
    model.vae.requires_grad_(False)
    model.unet.requires_grad_(True).train()
    model.text_encoders.requires_grad_(config.optim.text_encoder_lr > 0)
    parallel = parallelize(
        trained_networks(model, config.optim.text_encoder_lr > 0),
        building_blocks,
        ranks,
        config.parallel,
        activation_checkpointing=config.gradient_checkpointing,
    )
    if config.offload_text_encoders:
        model.unet.to(ranks.device)
        model.vae.to(ranks.device)
        for encoder in model.text_encoders:
            offload(encoder.to("cpu"), ranks.device)
        return model, {"base_model": digests, "base_prediction": base}, parallel
    return model.to(ranks.device), {"base_model": digests, "base_prediction": base}, parallel


def _base_schedule(facts: dict[str, Any]) -> NoiseSchedule:
    return build_noise_schedule(ScheduleConfig(**facts["base_prediction"]["schedule"]))


def _absolute(latents: Path) -> Path:
    return latents if is_remote(latents) else latents.resolve()


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


def _lr_complaint(config: TrainConfig) -> list[str]:
    """A word on a learning rate that depends on the run's length, when the length changes."""
    before = read_run_config(config.run_dir).steps
    if before == config.steps or config.optim.lr_schedule == "constant":
        return []
    return [
        f"steps was {before} and is now {config.steps}: from here on the {config.optim.lr_schedule} learning rate is "
        f"that of {config.steps} steps, so this is not the run that {config.steps} steps from the start would have been"
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
