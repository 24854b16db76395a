"""Checkpoints: written whole or not at all, verified before they are believed, older ones used when one is damaged.

A checkpoint is a directory `step-00000500` of safetensors files and `state.json`, committed in this order: files into
a temporary directory, each flushed to disk; `manifest.json` with every file's SHA-256 last; one rename. A directory
without a manifest is never read, and nothing is unpickled. Training state is (weights, optimizer, EMA, step): data
order, captions, crops, noise and timesteps follow from the seed and what they are for, see `sumizome.seeds`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sumizome.errors import CheckpointError
from sumizome.files import flush_to_disk, give_usual_mode, sha256_of

__all__ = [
    "Checkpoint",
    "latest_checkpoint",
    "list_checkpoints",
    "load_optimizer",
    "optimizer_tensors",
    "prune_checkpoints",
    "read_checkpoint",
    "remove_unfinished",
    "verify_checkpoint",
    "write_checkpoint",
]

FORMAT_VERSION = 1
_TENSOR_FILES = ("weights", "ema", "optimizer")
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """The training state after `step` steps."""

    step: int
    weights: Mapping[str, Tensor]
    """Trained parameters, "unet.…", "text_encoder.…", "text_encoder_2.…"; frozen ones stay in the base model."""
    ema: Mapping[str, Tensor]
    """Their moving average, float32."""
    optimizer: Mapping[str, Tensor]
    """`{parameter}/{moment}`, and `{parameter}/step`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the state was trained from and on: base model digest, data fingerprint, samples seen, versions."""


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Commits the checkpoint below `directory` and returns its path.

    Raises: CheckpointError when the disk is full or cannot be written; earlier checkpoints are left as they are.
    """
    final = directory / f"step-{checkpoint.step:08d}"
    unfinished = directory / f".unfinished-{final.name}-{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        for name in _TENSOR_FILES:
            tensors = {key: value.detach().cpu().contiguous() for key, value in getattr(checkpoint, name).items()}
            save_file(tensors, unfinished / f"{name}.safetensors")
            give_usual_mode(unfinished / f"{name}.safetensors")
        state = {"format": FORMAT_VERSION, "step": checkpoint.step, "facts": dict(checkpoint.facts)}
        (unfinished / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        digests = {path.name: sha256_of(path) for path in sorted(unfinished.iterdir())}
        for name in digests:
            flush_to_disk(unfinished / name)
        (unfinished / "manifest.json").write_text(json.dumps({"sha256": digests}, indent=2) + "\n", encoding="utf-8")
        flush_to_disk(unfinished / "manifest.json")
        flush_to_disk(unfinished)
        if final.exists():  # the same step written again: only after a fall-back past a damaged one
            shutil.rmtree(final)
        unfinished.rename(final)
        flush_to_disk(directory)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error.strerror or error}); earlier ones are untouched. "
            "Free some disk and run the same command again"
        ) from error
    return final


def list_checkpoints(directory: Path) -> list[Path]:
    """The committed checkpoints below `directory`, oldest first; their contents are not looked at."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def remove_unfinished(directory: Path) -> None:
    """Removes what a killed writer left behind. Only the holder of the run directory's lock may call it."""
    for path in directory.glob(".unfinished-*") if directory.is_dir() else ():
        shutil.rmtree(path)


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Removes the oldest checkpoints down to `keep`, and never the last two."""
    for path in list_checkpoints(directory)[: -max(2, keep)]:
        # The manifest goes first, so that a half-removed checkpoint is not taken for a whole one.
        (path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(path)


def latest_checkpoint(directory: Path, tensors: Sequence[str] = _TENSOR_FILES) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies (None when there is none at all), and what was wrong with newer ones.

    Raises: CheckpointError when checkpoints exist and every one is damaged.
    """
    complaints: list[str] = []
    for path in reversed(list_checkpoints(directory)):
        try:
            return read_checkpoint(path, tensors), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if complaints:
        raise CheckpointError(
            f"{directory}: every checkpoint is damaged ({'; '.join(complaints)}); "
            "restore one from a backup, or start in a new run_dir"
        )
    return None, []


def read_checkpoint(path: Path, tensors: Sequence[str] = _TENSOR_FILES) -> Checkpoint:
    """The checkpoint at `path`, verified first; `tensors` names what is read of it, the rest stays empty.

    Raises: CheckpointError naming the file that is missing or differs.
    """
    verify_checkpoint(path, tensors)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {state.get('format')}, this version reads {FORMAT_VERSION}")
    loaded = {name: load_file(path / f"{name}.safetensors") if name in tensors else {} for name in _TENSOR_FILES}
    return Checkpoint(step=int(state["step"]), facts=state["facts"], **loaded)


def verify_checkpoint(path: Path, tensors: Sequence[str] = _TENSOR_FILES) -> None:
    """Compares the files with the manifest. safetensors alone loads a flipped bit in silence.

    Raises: CheckpointError naming the file that is missing or differs.
    """
    manifest = path / "manifest.json"
    try:
        digests = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
        expected = {str(name): str(digest) for name, digest in digests.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest}: missing or damaged, so this checkpoint cannot be trusted") from error
    required = {f"{name}.safetensors" for name in _TENSOR_FILES} | {"state.json"}
    if set(expected) != required:
        raise CheckpointError(f"{manifest}: lists {sorted(expected)}, expected {sorted(required)}")
    for name, digest in expected.items():
        if name != "state.json" and name.removesuffix(".safetensors") not in tensors:
            continue
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing")
        if sha256_of(path / name) != digest:
            raise CheckpointError(f"{path / name}: its SHA-256 is not the one in manifest.json; the file is damaged")


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors; parameters that have none yet are left out."""
    return dict(_moments(optimizer, parameters))


def _moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}/{moment}", value


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Puts the named tensors back as the optimizer's state, beside the parameters they belong to."""
    for key, value in tensors.items():
        name, moment = key.rsplit("/", 1)
        parameter = parameters[name]
        # A copy: what was loaded maps a file that pruning will remove. A fused optimizer wants its step counter on the
        # parameter's device too.
        optimizer.state[parameter][moment] = value.to(parameter.device, copy=True)
