"""The VAE of a decoder's run: the base model's, with the newest verified decoder in it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL

from sumizome.errors import CheckpointError
from sumizome.evaluate.candidates import unique_names
from sumizome.models.vae import vae_digest
from sumizome.models.vae_file import load_vae
from sumizome.settings import read_toml
from sumizome.train.checkpoint import latest_checkpoint
from sumizome.train.run_dir import is_decoder_run, is_run_dir
from sumizome.vae.config import VaeTrainConfig
from sumizome.vae.decoding import trained_networks
from sumizome.vae.evaluation import Candidate

__all__ = ["held_out_by", "load_candidates", "load_trained_vae", "read_vae_config"]


def read_vae_config(run_dir: Path) -> VaeTrainConfig:
    """The settings a decoder's run was last started with. Raises: CheckpointError when `run_dir` holds no such run."""
    if not is_run_dir(run_dir) or not is_decoder_run(run_dir):
        raise CheckpointError(f"{run_dir}: not a run directory of `sumizome vae train`")
    config: VaeTrainConfig = read_toml(run_dir / "config.toml", VaeTrainConfig)
    return config


def held_out_by(run_dir: Path) -> int:
    """How many pictures a run held out of training: those of least hash."""
    config = read_vae_config(run_dir)
    try:
        recorded = json.loads((run_dir / "environment.json").read_bytes())["data"]["held_out"]
    except (OSError, ValueError, KeyError, TypeError):
        recorded = config.validation.count
    return min(int(recorded), config.validation.count)


def load_trained_vae(
    run_dir: Path,
    weights: Literal["ema", "raw"] = "ema",
    *,
    base: Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[AutoencoderKL, int]:
    """(the VAE, the step its decoder was saved at); `base` where the model that was finetuned lies elsewhere by now.

    Raises: CheckpointError when there is no checkpoint, or it was trained from another VAE; ModelError when the base
        cannot be read.
    """
    config = read_vae_config(run_dir)
    part = "ema" if weights == "ema" else "weights"
    saved, complaints = latest_checkpoint(run_dir / "checkpoints", parts=(part,))
    if saved is None:
        raise CheckpointError(f"{run_dir}: no checkpoint yet; let `sumizome vae train` reach one (checkpoint.every)")
    for complaint in complaints:
        print(f"sumizome: warning: {complaint}; using step {saved.step} instead")
    vae = load_vae(base or config.model, device)
    if vae_digest(vae) != saved.facts["base_model"]["vae"]:
        raise CheckpointError(
            f"{run_dir}: it was trained from another VAE than that of {base or config.model}; give the one it was "
            "started with"
        )
    places = {
        f"{network}.{name}": parameter.detach()
        for network, module in trained_networks(vae).items()
        for name, parameter in module.named_parameters()
    }
    saved.read_into(part, places)
    return vae, saved.step


def load_candidates(paths: Sequence[Path], weights: Literal["ema", "raw"], device: torch.device) -> list[Candidate]:
    """The VAEs to measure; before a run directory's own stands the one that it began with, once.

    Raises: ModelError, CheckpointError as they are loaded.
    """
    found: list[Candidate] = []
    bases: set[Path] = set()
    for path in paths:
        if not is_run_dir(path):
            found.append(Candidate(path.name, load_vae(path, device), str(path)))
            continue
        config = read_vae_config(path)
        if config.model not in bases:
            bases.add(config.model)
            start = load_vae(config.model, device)
            found.append(Candidate(f"{config.model.name}, untouched", start, str(config.model)))
        vae, step = load_trained_vae(path, weights, device=device)
        found.append(Candidate(f"{path.name}, step {step}", vae, str(path)))
    names = unique_names([candidate.name for candidate in found])
    return [replace(candidate, name=name) for candidate, name in zip(found, names, strict=True)]
