"""The directory of a run: who holds it, what it was started with, and the model that it trained.

run_dir/config.toml        the resolved settings; `sumizome train run_dir/config.toml` goes on with the run
        README.txt         what this run is, in words
        environment.json   versions, commit, device, digests of model and data
        loss_by_timestep.txt   before the run and at its last validation
        metrics.jsonl      one JSON object a line
        samples/           rank-00000.jsonl …: what each step trained on, where `log_samples` is set
        checkpoints/       step-00000500/ …, see `sumizome.train.checkpoint`
        previews/          step-000500.png …
        tensorboard/
"""

import contextlib
import json
import platform
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sumizome import __version__
from sumizome.data.latent_statistics import stated_statistics
from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError, ConfigError
from sumizome.files import hold_lock, sha256_of, write_atomically
from sumizome.models.model_weights import stored_digest
from sumizome.models.sdxl import SDXLModel, load_model
from sumizome.models.vae import apply_latent_statistics, model_digest, vae_digest
from sumizome.settings import as_mapping, read_toml, to_toml
from sumizome.train.checkpoint import SavedCheckpoint, latest_checkpoint, list_checkpoints, open_checkpoint
from sumizome.train.config import TrainConfig
from sumizome.train.task import RunSettings

__all__ = [
    "base_digests",
    "check_base_model",
    "hold_run_dir",
    "is_decoder_run",
    "is_run_dir",
    "load_trained_model",
    "read_run_config",
    "record_run",
    "recorded_settings",
    "stored_digests",
    "table_digest",
    "trained_networks",
    "trained_parameters",
]

# What may differ between a run and its continuation: how long, how watched, where computed; never what is learned.
_MAY_CHANGE = (
    "run_dir", "model", "latents", "manifest", "steps", "device", "workers", "log_every", "tensorboard",
    "gradient_checkpointing",
    "validation.every", "validation.timesteps", "preview.", "checkpoint.", "parallel.", "ema.device", "log_samples",
    "cache_dir", "cache_size", "stage", "brightness.", "wandb", "peak_tflops",
)  # fmt: skip


def is_run_dir(path: Path) -> bool:
    """Whether `path` is a run directory: one with a config and checkpoints."""
    return (path / "config.toml").is_file() and (path / "checkpoints").is_dir()


@contextlib.contextmanager
def hold_run_dir(run_dir: Path, ranks: Ranks | None = None) -> Iterator[None]:
    """Holds the run directory for this run: its first rank has the lock.

    Raises: CheckpointError, on every rank, when another trainer holds it.
    """
    with contextlib.ExitStack() as held:
        (ranks or Ranks()).first(lambda: held.enter_context(_lock(run_dir)))
        yield


@contextlib.contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{run_dir}: not a directory that can be written ({error.strerror})") from error

    def refusal(holder: str) -> CheckpointError:
        return CheckpointError(
            f"{run_dir}: another trainer is at work here ({holder}); wait for it, stop it, or choose another run_dir"
        )

    with hold_lock(run_dir / ".lock", refusal):
        yield


def record_run(config: RunSettings, facts: Mapping[str, Any]) -> None:
    """Writes config and environment, after checking them against those the run was started with.

    Raises: ConfigError naming the first setting that would change what is learned.
    """
    path = config.run_dir / "config.toml"
    if path.exists() and list_checkpoints(config.run_dir / "checkpoints"):
        _check_unchanged(path, config)
        _check_stages(config)
        _check_table(config.run_dir, facts.get(_TABLE))
    # Absolute: the recorded settings go on with this run from any directory.
    _write_text(path, to_toml(replace(config, run_dir=config.run_dir.absolute())))
    environment = {
        "sumizome": __version__,
        **{name: _version(name) for name in ("torch", "diffusers", "transformers", "safetensors")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        **facts,
    }
    _write_text(config.run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), failure=CheckpointError)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _check_unchanged(path: Path, config: RunSettings) -> None:
    started = dict(_flat(tomllib.loads(path.read_text(encoding="utf-8"))))
    now = dict(_flat(as_mapping(config)))
    for key in sorted(started.keys() | now.keys()):
        if not key.startswith(_MAY_CHANGE) and started.get(key) != now.get(key):
            raise ConfigError(
                f"{path.parent}: this run was started with {key} = {started.get(key)!r}, now it is {now.get(key)!r}, "
                "which would train something else; restore the setting, or choose another run_dir"
            )


def _check_stages(config: RunSettings) -> None:
    """Stages to come may change; raises ConfigError for one that has begun, or that began elsewhere."""
    newest = list_checkpoints(config.run_dir / "checkpoints")[-1]
    steps_done = int(newest.name.rsplit("-", 1)[1])
    before, now = (_begun(each, steps_done) for each in (recorded_settings(config), config))
    if before != now:
        raise ConfigError(
            f"{config.run_dir}: this run has done {steps_done} steps in stages {before} (first step, learning rate, "
            f"samples × micro-batches), now they would be {now}, which would train something else; restore "
            "[[stage]], or choose another run_dir"
        )


def _begun(config: RunSettings, steps_done: int) -> str:
    spans = [span for span in config.spans() if span.first < steps_done]
    lrs = [config.optim.lr * span.lr_factor for span in spans]
    batches = [f"{span.micro_batch_size} × {span.micro_batches_per_step}" for span in spans]
    return ", ".join(f"({span.first}, {lr:g}, {b})" for span, lr, b in zip(spans, lrs, batches, strict=True))


_TABLE = "tag_table_sha256"


def table_digest(table: Path | None) -> dict[str, str]:
    """What a run remembers of the tag table that it weighs by: its name would be the same after an edit."""
    return {} if table is None else {_TABLE: sha256_of(table)}


def _check_table(run_dir: Path, digest: str | None) -> None:
    """Raises: ConfigError if the tag table is no longer the one that the run was last started with."""
    try:
        before = json.loads((run_dir / "environment.json").read_text(encoding="utf-8")).get(_TABLE)
    except (OSError, ValueError):
        return  # a run without it, begun by an older version or damaged: its settings have been compared
    if before is not None and before != digest:
        raise ConfigError(
            f"{run_dir}: the table of tag_weights was edited since this run was started (SHA-256 {before[:8]}, now "
            f"{(digest or 'none')[:8]}), which would train something else; restore the table, or choose another run_dir"
        )


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value


def trained_networks(model: SDXLModel, train_text_encoders: bool) -> dict[str, nn.Module]:
    """The networks that a run trains, by diffusers' names."""
    modules: dict[str, nn.Module] = {"unet": model.unet}
    if train_text_encoders:
        modules |= dict(zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=True))
    return modules


def trained_parameters(model: SDXLModel, train_text_encoders: bool) -> dict[str, nn.Parameter]:
    """The parameters that a run trains, by the name they have in a checkpoint."""
    modules = trained_networks(model, train_text_encoders)
    return {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}


def base_digests(model: SDXLModel) -> dict[str, str]:
    """SHA-256 of each part of a base model, as checkpoints remember it."""
    return {
        "unet": model_digest(model.unet),
        "text_encoders": model_digest(model.text_encoders),
        "vae": vae_digest(model.vae),
    }


def stored_digests(model: SDXLModel) -> dict[str, str]:
    """As `base_digests`, out of the file for networks that have no weights yet."""
    assert model.source is not None
    names = {"unet": ("unet",), "text_encoders": ("text_encoder", "text_encoder_2")}
    networks = model.networks
    digests = {"vae": vae_digest(model.vae)}
    for part, of_part in names.items():
        has_weights = not any(p.is_meta for name in of_part for p in networks[name].parameters())
        digests[part] = model_digest(getattr(model, part)) if has_weights else stored_digest(model.source, *of_part)
    return digests


def check_base_model(run_dir: Path, checkpoint: SavedCheckpoint, digests: Mapping[str, str]) -> None:
    """Raises: CheckpointError naming the part of the base model that is not the one the run was trained from."""
    remembered = checkpoint.facts.get("base_model", {})
    for part, digest in digests.items():
        if remembered.get(part) != digest:
            raise CheckpointError(
                f"{run_dir}: it was trained from another base model: the {part.replace('_', ' ')} had the digest "
                f"{str(remembered.get(part))[:8]}, now {digest[:8]}; give the model that it was started with"
            )


def load_trained_model(
    run_dir: Path, weights: Literal["ema", "raw"] = "ema", *, checkpoint: Path | None = None, **load_options: Any
) -> tuple[SDXLModel, int]:
    """The run's model with its newest verified weights (or those of one checkpoint), and the step they were saved at.

    Raises: CheckpointError when there is no checkpoint yet; ModelError when the base model cannot be read.
    """
    config = read_run_config(run_dir)
    part = "ema" if weights == "ema" else "weights"
    if checkpoint is not None:
        saved: SavedCheckpoint | None = open_checkpoint(checkpoint, parts=(part,))
        complaints: list[str] = []
    else:
        saved, complaints = latest_checkpoint(run_dir / "checkpoints", parts=(part,))
    if saved is None:
        raise CheckpointError(f"{run_dir}: no checkpoint yet; let `sumizome train` reach one (checkpoint.every)")
    for complaint in complaints:
        print(f"sumizome: warning: {complaint}; using step {saved.step} instead")
    model = load_model(config.model, **load_options)
    frozen = {name: digest for name, digest in base_digests(model).items() if name != "unet"}
    if config.optim.text_encoder_lr > 0:
        del frozen["text_encoders"]
    if load_options.get("dtype", torch.float32) != torch.float32:
        frozen.pop("text_encoders", None)  # digests are of float32 weights, which the VAE always has
    check_base_model(run_dir, saved, frozen)
    parameters = trained_parameters(model, config.optim.text_encoder_lr > 0)
    if set(parameters) != set(saved.shapes(part)):
        raise CheckpointError(f"{run_dir}: its checkpoint does not fit the base model {config.model}")
    saved.read_into(part, {name: parameter.detach() for name, parameter in parameters.items()})
    trained = replace(model, prediction_type=config.prediction_type, schedule_config=config.schedule)
    statistics = stated_statistics(config.latent_statistics)
    if statistics and "vae" in trained.networks:
        apply_latent_statistics(trained.vae, *statistics)
    return trained, saved.step


def read_run_config(run_dir: Path) -> TrainConfig:
    """The settings the run was last started with.

    Raises: CheckpointError when `run_dir` holds no run, or a run of `sumizome vae train`.
    """
    if not is_run_dir(run_dir):
        raise CheckpointError(f"{run_dir}: not a run directory (no config.toml and checkpoints/ in it)")
    if is_decoder_run(run_dir):
        raise CheckpointError(
            f"{run_dir}: a run of `sumizome vae train`, which has a VAE's decoder and no U-Net; "
            "`sumizome vae bake` puts it into a model"
        )
    config: TrainConfig = read_toml(run_dir / "config.toml", TrainConfig)
    return config


def is_decoder_run(run_dir: Path) -> bool:
    """Whether a run directory is one of `sumizome vae train`: its pictures come from a manifest."""
    return "manifest" in tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))


def recorded_settings(config: RunSettings) -> RunSettings:
    """What `config.run_dir` was last started with, in the type of `config`."""
    recorded: RunSettings = read_toml(config.run_dir / "config.toml", type(config))
    return recorded
