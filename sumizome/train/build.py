"""From settings to a trainer: the model, its parallelism, the data, the optimizer, and the state to go on from.

Takes the config apart; nothing below sees more of it than its own part. Every rank builds the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from sumizome.data.captions import unknown_groups
from sumizome.data.latent_statistics import stated_statistics
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.loader import BatchLoader, build_loader
from sumizome.data.shard_cache import CacheConfig
from sumizome.data.store import is_remote
from sumizome.data.tag_table import load_tag_table, unused_rows
from sumizome.data.tags import GENERAL
from sumizome.diffusion.loss import build_loss
from sumizome.diffusion.schedule import ScheduleConfig, build_noise_schedule
from sumizome.distributed.parallelize import Parallel, parallelize, put_shard, resolve_strategy
from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError
from sumizome.inference import check_canvas
from sumizome.models.model_weights import fill_shards
from sumizome.models.networks import building_blocks
from sumizome.models.sdxl import Component, SDXLModel, load_model
from sumizome.models.vae import apply_latent_statistics, vae_factor
from sumizome.seeds import derive_seed
from sumizome.settings import as_mapping
from sumizome.train.checkpoint import SavedCheckpoint
from sumizome.train.combinations import check_combinations
from sumizome.train.config import TrainConfig
from sumizome.train.denoising import Denoising
from sumizome.train.efficiency import Efficiency, device_peak
from sumizome.train.ema import Ema
from sumizome.train.going_on import build_saver, go_on
from sumizome.train.observers import build_observers
from sumizome.train.offload import offload
from sumizome.train.optim import build_optimizer
from sumizome.train.precision import Precision, build_precision
from sumizome.train.run_dir import (
    base_digests,
    check_base_model,
    stored_digests,
    table_digest,
    trained_networks,
    trained_parameters,
)
from sumizome.train.run_readme import data_facts, write_readme
from sumizome.train.stages import StagedLoader
from sumizome.train.step import Objective
from sumizome.train.timesteps import build_timestep_draw
from sumizome.train.trainer import Trainer

__all__ = ["DenoisingTrainer", "build_trainer"]

DenoisingTrainer: TypeAlias = Trainer[TrainConfig, Denoising, BatchLoader | StagedLoader]

_HELD_OUT_AT_MOST = 20
"""One picture in so many is held out at most, however small the set."""


def build_trainer(config: TrainConfig, ranks: Ranks | None = None) -> tuple[DenoisingTrainer, list[str]]:
    """A trainer at the step where the run directory stands (0 when it is new), and what a user should be told.

    The caller holds the run directory (`run_dir.hold_run_dir`). Collective.
    Raises: ConfigError, ModelError, ShardError, CheckpointError as their parts do, before anything is trained.
    """
    ranks = ranks or Ranks()
    config = _with_absolute_paths(config)
    check_combinations(config, ranks)  # before anything is loaded
    trainer = _new_trainer(config, ranks)
    loaders = trainer.loader.loaders if isinstance(trainer.loader, StagedLoader) else [trainer.loader]
    told = {"data": data_facts(loaders), **table_digest(config.tag_weights.table)}
    warnings = go_on(trainer, told, partial(_check_origin, trainer), partial(write_readme, config))
    categories = {
        loader.categories.get(tag, GENERAL) for loader in loaders for tag in loader.cache.index.vocabulary.tolist()
    }
    unused = [*_unused_rows(config.tag_weights.table, loaders), *unknown_groups(config.captions, categories)]
    return trainer, [*unused, *warnings]


def _unused_rows(table: Path | None, loaders: Sequence[BatchLoader]) -> list[str]:
    """Of the tag table, over the latents of all stages."""
    if table is None:
        return []
    vocabulary = {tag for loader in loaders for tag in loader.cache.index.vocabulary.tolist()}
    return unused_rows(table, load_tag_table(table).weights, vocabulary)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The recorded config then means the same from any directory."""
    stages = tuple(
        replace(stage, latents=str(_absolute(Path(stage.latents)))) if stage.latents else stage
        for stage in config.stage
    )
    return replace(config, model=config.model.resolve(), latents=_absolute(config.latents), stage=stages)


def _absolute(latents: Path) -> Path:
    return latents if is_remote(latents) else latents.resolve()


def _new_trainer(config: TrainConfig, ranks: Ranks) -> DenoisingTrainer:
    """At step 0, from the base model."""
    precision = build_precision(config.precision, ranks.device)
    schedule = build_noise_schedule(config.schedule)
    model, facts, parallel = _build_model(config, ranks, precision)
    loader = _build_loader(config, facts, ranks)
    facts |= {"latents": loader.fingerprint}
    if isinstance(loader, StagedLoader):
        facts |= {"latents_of_stages": loader.fingerprints}
    facts |= {"latents_order": loader.orders if isinstance(loader, StagedLoader) else [loader.order]}
    parameters = trained_parameters(model, config.optim.text_encoder_lr > 0)
    objective = Objective(schedule, config.prediction_type, build_loss(config.loss, schedule, config.prediction_type))
    draw_timesteps = build_timestep_draw(config.timestep_sampling, schedule, config.seed, config.timestep_shift_from)
    peak = device_peak(ranks.device, config.precision, config.peak_tflops)
    base = facts["base_prediction"]
    base_schedule = build_noise_schedule(ScheduleConfig(**base["schedule"]))
    return Trainer(
        config=config,
        task=Denoising(model, objective, draw_timesteps, config.max_chunks, config.noise_offset),
        loader=loader,
        parameters=parameters,
        optimizer=build_optimizer(config.optim, parameters, config.seed),
        ema=Ema(config.ema, parameters),
        saver=build_saver(config, ranks),
        facts=facts,
        ranks=ranks,
        parallel=parallel,
        precision=precision,
        efficiency=Efficiency(model, text_is_trained=config.optim.text_encoder_lr > 0, peak=peak),
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
    """Number format, gradients where they are wanted, and the VAE's statistics; checks that pictures can be drawn."""
    statistics = stated_statistics(config.latent_statistics)
    if statistics:  # previews decode with these
        apply_latent_statistics(model.vae, *statistics)
    for name, network in model.networks.items():
        if name != "vae" and precision.weights != torch.float32:
            network.to(precision.weights)
    for pictures in (config.preview, config.brightness):
        if pictures.every:
            check_canvas(model.unet, vae_factor(model.vae), pictures.canvas)
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


def _check_origin(trainer: DenoisingTrainer, saved: SavedCheckpoint) -> None:
    """Raises: CheckpointError when the checkpoint was trained from another base model, or on other latents."""
    check_base_model(trainer.config.run_dir, saved, trainer.facts["base_model"])
    fingerprints_before, fingerprints = (
        [facts.get("latents"), *facts.get("latents_of_stages", [])[1:]] for facts in (saved.facts, trainer.facts)
    )
    orders = trainer.facts["latents_order"]
    orders_before = saved.facts.get("latents_order", orders)  # not known of runs that began before it was noted
    for number, span in enumerate(trainer.config.spans()):
        if span.first >= saved.step:  # it may have any latents yet
            break
        if fingerprints_before[number : number + 1] != fingerprints[number : number + 1]:
            raise CheckpointError(
                f"{trainer.config.run_dir}: it was trained on other latents than those of {span.latents} (a manifest "
                "that was prepared anew with other pictures or tags makes others, and so does --retry-rejects, or a "
                "new folder in place of one where rejects had been tried again); give the ones it was started with, "
                "or another run_dir, whose model may be this one's export"
            )
        if orders_before[number : number + 1] != orders[number : number + 1]:
            raise CheckpointError(
                f"{trainer.config.run_dir}: {span.latents} was made from what it was trained on, but the pictures "
                "stand in another order now, or some are gone or new (it was prepared anew, or over another "
                "manifest): this run would not go on as it would have. Put that folder back as it was, or give "
                "another run_dir, whose model may be this one's export"
            )
