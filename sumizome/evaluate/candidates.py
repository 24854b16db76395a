"""The models that are looked at: a run directory, one of its checkpoints, a diffusers folder or a single file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sumizome.errors import ConfigError
from sumizome.models.sdxl import SDXLModel, load_model
from sumizome.train.checkpoint import checkpoint_facts
from sumizome.train.run_dir import is_run_dir, load_trained_model, read_run_config

__all__ = ["Candidate", "Weights", "load_candidate", "unique_names"]

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class Candidate:
    """A loaded model and what it is called on pages."""

    name: str
    path: Path
    model: SDXLModel
    step: int | None = None
    """Of a run directory."""
    held_out: int | None = None
    """Pictures that its run kept out of training at most; None where the model does not tell, or none were."""
    trained_on: str | None = None
    """Fingerprint of the latents that it held them out of, its first stage's; None where the model does not tell."""


def load_candidate(
    path: Path, weights: Weights = "ema", *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Candidate:
    """The model at `path`; RUN/checkpoints/step-… is that checkpoint of the run.

    Raises: ModelError, CheckpointError as their readers do; ConfigError where nothing is there.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no model there; give a run directory, a diffusers folder or a safetensors file")
    run_dir, checkpoint = (path.parents[1], path) if _is_checkpoint(path) else (path, None)
    if is_run_dir(run_dir):
        model, step = load_trained_model(run_dir, weights, checkpoint=checkpoint, device=device, dtype=dtype)
        held_out = read_run_config(run_dir).validation.count or None
        facts = checkpoint_facts(checkpoint or run_dir / "checkpoints" / f"step-{step:08d}")
        name = f"{run_dir.resolve().name}-step{step}"
        return Candidate(name, path, model, step, held_out, facts.get("latents"))
    return Candidate(path.stem, path, load_model(path, device=device, dtype=dtype))


def _is_checkpoint(path: Path) -> bool:
    path = path.absolute()
    return path.is_dir() and path.parent.name == "checkpoints" and is_run_dir(path.parents[1])


def unique_names(names: list[str]) -> list[str]:
    """The names, with a number behind those that are there twice."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]
