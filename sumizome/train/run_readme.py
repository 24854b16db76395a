"""What a run directory says of itself to a stranger: README.txt, and where the code and the data came from."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import sumizome
from sumizome.data.loader import BatchLoader
from sumizome.errors import CheckpointError
from sumizome.files import write_atomically
from sumizome.train.config import TrainConfig

__all__ = ["code_facts", "data_facts", "machine_facts", "write_readme"]


def code_facts() -> dict[str, str]:
    """The git commit of the package, where it runs from a checkout, and that of the working directory."""
    places = {"sumizome_commit": Path(sumizome.__file__).parent, "working_directory_commit": Path.cwd()}
    commits = {name: _commit(place) for name, place in places.items()}
    return {name: commit for name, commit in commits.items() if commit}


def _commit(place: Path) -> str:
    """The commit checked out at `place`, "+changes" behind it if files differ from it; "" where there is none."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(place), *words], capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+changes" if changes else "")


def machine_facts(device: torch.device) -> dict[str, Any]:
    """The device by name, and what the machine has."""
    if device.type != "cuda":
        return {"cpus": os.cpu_count()}
    return {"cpus": os.cpu_count(), "gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}


def data_facts(loaders: Sequence[BatchLoader]) -> list[dict[str, Any]]:
    """Of each stage: its latents, their fingerprint, and how many pictures in how many buckets."""
    return [
        {
            "latents": str(loader.cache.root),
            "fingerprint": loader.fingerprint,
            "vae": loader.cache.fingerprint.vae_digest,
            "images": len(loader.cache.index.pictures()),
            "images_an_epoch": loader.plan.samples_per_epoch,
            "held_out": len(loader.validation_rows),
            "buckets": len(loader.cache.buckets),
        }
        for loader in loaders
    ]


_README = """{name}: a training run of Sumizome {version}{commit}

{summary}

Go on, or look whether it is done:   sumizome train {run_dir}/config.toml
Draw with it:                        sumizome sample --model {run_dir} --prompt … --out pictures
Make a model file of it:             sumizome export {run_dir} …

{files}
"""


def _files(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """What the run writes, and what it is."""
    yield "config.toml", "the settings in full; what was not set has its default"
    yield "environment.json", "versions, commit, device, digests of the base model, fingerprints of the latents"
    yield "metrics.jsonl", "a JSON object a line: losses, rates, norms, speed, memory; validation, brightness when due"
    yield "checkpoints/", "the training state; each is whole, with a manifest of SHA-256"
    if config.validation.every and config.validation.count:
        yield "loss_by_timestep.txt", "the loss by timestep before the run and at its last validation"
    if config.preview.every:
        yield "previews/", "the preview prompts, the same seeds each time"
    if config.tensorboard:
        yield "tensorboard/", f"the same numbers and pictures: tensorboard --logdir {config.run_dir}/tensorboard"
    if config.wandb:
        yield "wandb/", f"the same for Weights & Biases, project {config.wandb}; wandb-run-id.txt is this run's there"
    if config.log_samples:
        yield "samples/", "what each step trained on, a file a rank"


def write_readme(config: TrainConfig, facts: Mapping[str, Any]) -> Path:
    """Writes run_dir/README.txt."""
    config = replace(config, run_dir=config.run_dir.absolute())
    stages = config.spans()
    said = [f"It trains {config.model.name} for {config.steps} steps; the U-Net learns {config.prediction_type}."]
    base = facts.get("base_prediction", {})
    if base and base["prediction_type"] != config.prediction_type:
        said.append(f"The base predicts {base['prediction_type']}; its loss before is in metrics.jsonl at step 0.")
    for stage, data in zip(stages, facts["data"], strict=True):
        said.append(
            f"Steps {stage.first + 1} to {stage.last}{f' ({stage.name})' if len(stages) > 1 else ''}: "
            f"{stage.images_per_step} images a step out of {data['images']} in {data['latents']} "
            f"(fingerprint {data['fingerprint'][:12]})."
        )
    commit = str(facts.get("sumizome_commit", ""))
    text = _README.format(
        name=config.run_dir.name,
        version=sumizome.__version__,
        commit=f", commit {commit[:12]}{'+changes' if commit.endswith('+changes') else ''}" if commit else "",
        summary="\n".join(said),
        run_dir=config.run_dir,
        files="\n".join(f"{name:<24}{what}" for name, what in _files(config)),
    )
    path = config.run_dir / "README.txt"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), failure=CheckpointError)
    return path
