"""Write a trained model as files that other programs open, and read them back to be sure.

    sumizome export runs/mine --folder mine-diffusers --file mine.safetensors --dtype fp16

The folder is for diffusers and InvokeAI; the single file, in SDXL's original layout with `v_pred` and `ztsnr`, for
ComfyUI, Forge, A1111 (with the .yaml beside it) and their kin.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome export` takes."""

    model: Annotated[Path, tyro.conf.Positional]
    """Run directory, or a model: a diffusers folder or a single file."""
    folder: Path | None = None
    """Diffusers folder to write."""
    file: Path | None = None
    """Single safetensors file to write."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Of the written weights."""
    weights: Literal["ema", "raw"] = "ema"
    """Of a run directory: the averaged weights, or the trained ones as they are."""
    title: str | None = None
    """The model's name in the file's metadata; by default the file's own."""
    overwrite: bool = False
    """Replace what stands at the given paths."""


def run(command: Command) -> None:
    """Exports, verifies and says what was written."""
    from sumizome.errors import ConfigError
    from sumizome.export import ModelCard, write_diffusers_folder, write_single_file
    from sumizome.models.sdxl import load_model
    from sumizome.train.run_dir import is_run_dir, load_trained_model

    if command.folder is None and command.file is None:
        raise ConfigError("nothing to write; give --folder DIR, --file FILE.safetensors, or both")
    for path in (command.folder, command.file):
        if path is not None and path.exists() and not command.overwrite:
            raise ConfigError(f"{path} exists; give another path, or --overwrite to replace it")
    if is_run_dir(command.model):
        model, step = load_trained_model(command.model, command.weights)
        print(f"{command.model}: step {step}, {command.weights} weights")
    else:
        model = load_model(command.model)
    if command.folder is not None:
        path = write_diffusers_folder(model, command.folder, dtype=command.dtype, overwrite=command.overwrite)
        print(f"{path}: diffusers folder, read back bit for bit")
    if command.file is not None:
        card = ModelCard(title=command.title or command.file.stem)
        path = write_single_file(model, command.file, dtype=command.dtype, card=card, overwrite=command.overwrite)
        print(f"{path}: single file, read back bit for bit")
