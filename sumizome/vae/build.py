"""From a decoder's settings to the trainer of U-Net training: the VAE, its crops, and the state to go on from.

Takes the config apart; nothing below sees more of it than its own part. Every rank builds the same.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from diffusers import AutoencoderKL
from torch import nn

from sumizome.data.canvas import RESIZE_VERSION
from sumizome.data.ingest import available_cores
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.manifest import load_manifest
from sumizome.distributed.parallelize import parallelize, resolve_strategy
from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError, ConfigError, ModelError
from sumizome.files import sha256_of, write_atomically
from sumizome.models.networks import building_blocks
from sumizome.models.vae import model_digest, vae_digest, vae_factor
from sumizome.models.vae_file import load_vae
from sumizome.train.checkpoint import SavedCheckpoint
from sumizome.train.ema import Ema
from sumizome.train.going_on import build_saver, go_on
from sumizome.train.optim import build_optimizer
from sumizome.train.precision import build_precision
from sumizome.train.trainer import Trainer
from sumizome.vae.config import VaeTrainConfig
from sumizome.vae.crop_loader import CropLoader, build_crop_loader
from sumizome.vae.decoding import Decoding, trained_networks
from sumizome.vae.discriminator import build_discriminator
from sumizome.vae.losses import DecoderLossConfig, build_perceptual
from sumizome.vae.picture_source import PictureSource
from sumizome.vae.regions import open_masks
from sumizome.vae.watching import build_observers

__all__ = ["DecoderTrainer", "build_vae_trainer", "check_encoder", "encoder_digest", "open_pictures"]

DecoderTrainer: TypeAlias = Trainer[VaeTrainConfig, Decoding, CropLoader]

_WORKERS_AT_MOST = 8


def build_vae_trainer(config: VaeTrainConfig, ranks: Ranks | None = None) -> tuple[DecoderTrainer, list[str]]:
    """A trainer at the step where the run directory stands, and what a user should be told.

    The caller holds the run directory (`run_dir.hold_run_dir`). Collective.
    Raises: ConfigError, ModelError, DataError, CheckpointError as their parts do, before anything is trained.
    """
    ranks = ranks or Ranks()
    config = _absolute(config)
    resolve_strategy(config.parallel, ranks)  # before anything is loaded
    precision = build_precision(config.precision, ranks.device)
    vae = load_vae(config.model, ranks.device)
    facts = {"base_model": {"vae": vae_digest(vae), "encoder": encoder_digest(vae)}}
    vae.requires_grad_(False)
    loader = _build_loader(config, vae, ranks)
    facts["origin"] = _origin(loader.source, config.losses)
    discriminator = build_discriminator(config.adversarial, config.seed)
    if discriminator is not None:
        discriminator.to(ranks.device)
    networks = trained_networks(vae, discriminator)
    for network in networks.values():
        network.requires_grad_(True)
    parallel = parallelize(
        networks, building_blocks, ranks, config.parallel, activation_checkpointing=config.gradient_checkpointing
    )
    parameters = {f"{part}.{name}": p for part, module in networks.items() for name, p in module.named_parameters()}
    averaged = {name: p for name, p in parameters.items() if not name.startswith("discriminator.")}
    perceptual = build_perceptual(config.losses, ranks.device)
    trainer = Trainer(
        config=config,
        task=Decoding(vae, config.losses, config.adversarial, discriminator, perceptual),
        loader=loader,
        parameters=parameters,
        optimizer=build_optimizer(
            config.optim, parameters, config.seed, lr_apart={"discriminator": config.adversarial.lr}
        ),
        ema=Ema(config.ema, averaged),
        saver=build_saver(config, ranks),
        facts=facts,
        ranks=ranks,
        parallel=parallel,
        precision=precision,
        observers=build_observers(config.validation, vae, loader, ranks),
    )
    told = {"data": _data_facts(loader)}
    complaints = go_on(trainer, told, partial(_check_origin, trainer), partial(_write_readme, config))
    if loader.too_small:
        complaints.append(
            f"{loader.too_small} pictures have a side shorter than crops.side = {config.crops.side} and are left out"
        )
    return trainer, complaints


def encoder_digest(vae: AutoencoderKL) -> str:
    """SHA-256 hex of what makes latents: the encoder and `quant_conv`. No finetuning changes it."""
    return model_digest(nn.ModuleDict({"encoder": vae.encoder, "quant_conv": vae.quant_conv}))


def check_encoder(trainer: DecoderTrainer) -> str:
    """The encoder's digest now. Raises: ModelError if it is not the one that training began with."""
    now, before = encoder_digest(trainer.task.vae), trainer.facts["base_model"]["encoder"]
    if now != before:
        raise ModelError(
            f"{trainer.config.run_dir}: the encoder's digest was {before[:12]} and is {now[:12]}, so latents would no "
            "longer fit; this is a fault of the program: do not use this run"
        )
    return now


def open_pictures(
    manifest: Path, masks: Path | None = None, latents: Path | None = None, vae: AutoencoderKL | None = None
) -> PictureSource:
    """A manifest's pictures; with `latents`, which this VAE must have made, as their canvases.

    Raises: DataError, ConfigError if one of them is missing, damaged or made by something else.
    """
    source = PictureSource(
        load_manifest(manifest), open_masks(masks), None if latents is None else _cache(latents, vae)
    )
    if source.masks is not None and len(source) and not any(map(source.has_mask, range(len(source)))):
        raise ConfigError(
            f"masks: {masks} has no mask for any picture; that of {source.path(0)} would be "
            f"{source.masks.place(source.path(0))}"
        )
    return source


def _cache(latents: Path, vae: AutoencoderKL | None) -> LatentCache:
    cache = open_latents(latents)
    cache.require(resize=RESIZE_VERSION)
    if vae is not None:
        cache.require(vae_digest=vae_digest(vae))
    return cache


def _absolute(config: VaeTrainConfig) -> VaeTrainConfig:
    """Absolute paths, so that the recorded config means the same from any directory."""
    paths = {name: getattr(config, name) for name in ("model", "manifest", "latents", "masks")}
    losses = config.losses
    if losses.lpips_weights is not None:
        losses = replace(losses, lpips_weights=losses.lpips_weights.resolve())
    return replace(config, losses=losses, **{name: p.resolve() for name, p in paths.items() if p is not None})


def _build_loader(config: VaeTrainConfig, vae: AutoencoderKL, ranks: Ranks) -> CropLoader:
    return build_crop_loader(
        open_pictures(config.manifest, config.masks, config.latents, vae),
        crops=config.crops,
        regions=config.regions,
        factor=vae_factor(vae),
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        micro_batches_per_step=config.micro_batches_per_step,
        validation_count=config.validation.count,
        workers=config.workers or min(_WORKERS_AT_MOST, available_cores()),
        rank=ranks.rank,
        world=ranks.world,
    )


def _origin(source: PictureSource, losses: DecoderLossConfig) -> dict[str, str]:
    """Digests of what a run goes on with: the same rows, and the same latents, masks and features where it has any."""
    found = {"manifest": source.manifest.digest}
    if source.cache is not None:
        found["latents"] = source.cache.fingerprint.digest
        found["order_of_latents"] = source.cache.index.order
    if source.masks is not None:
        found["masks"] = source.masks.digest
    if losses.lpips_weights is not None:
        found["lpips_weights"] = sha256_of(losses.lpips_weights)
    return found


def _data_facts(loader: CropLoader) -> dict[str, Any]:
    source = loader.source
    return {
        "pictures": len(source),
        "crops_an_epoch": loader.plan.samples_per_epoch,
        "held_out": len(loader.validation_rows),
        "too_small": loader.too_small,
        "masks": 0 if source.masks is None else len(source.masks.names),
    }


def _check_origin(trainer: DecoderTrainer, saved: SavedCheckpoint) -> None:
    """Raises: CheckpointError when the checkpoint was trained from another VAE, or on other pictures."""
    where = trainer.config.run_dir
    if saved.facts.get("base_model") != trainer.facts["base_model"]:
        raise CheckpointError(f"{where}: it was trained from another VAE; give the model that it was started with")
    before, now = saved.facts.get("origin", {}), trainer.facts["origin"]
    if "order_of_latents" not in before:  # it began before that was noted
        now = {name: digest for name, digest in now.items() if name != "order_of_latents"}
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed == ["order_of_latents"]:
        raise CheckpointError(
            f"{where}: it was trained with another order of latents than there is now (they were prepared anew, or "
            "over another manifest); put the folder back as it was, or give another run_dir"
        )
    if changed:
        raise CheckpointError(
            f"{where}: it was trained with other {changed[0].replace('_', ' ')} than are there now; give what it was "
            "started with, or another run_dir"
        )


_README = """{name}: a VAE's decoder, finetuned by Sumizome

It finetunes the decoder of {model} for {steps} steps on crops of {pictures} pictures; {held_out} are held out.
The encoder stays as it is, so latents, caches and U-Nets stay valid.

Go on, or look whether it is done:   sumizome vae train {run_dir}/config.toml
Measure it against the original:     sumizome vae evaluate --model {run_dir} --out evaluation.html
Put it into a model:                 sumizome vae bake {run_dir} --out NAME.safetensors
Watch it:                            tensorboard --logdir {run_dir}/tensorboard
"""


def _write_readme(config: VaeTrainConfig, facts: Mapping[str, Any]) -> None:
    data = facts["data"]
    text = _README.format(
        name=config.run_dir.name,
        model=config.model.name,
        steps=config.steps,
        pictures=data["pictures"],
        held_out=data["held_out"],
        run_dir=config.run_dir,
    )
    path = config.run_dir / "README.txt"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), failure=CheckpointError)
