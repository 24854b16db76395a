"""Write a trained model as files that other programs open, and read them back to be sure.

    sumizome export runs/mine --folder mine-diffusers --file mine.safetensors --dtype fp16

The folder is for diffusers and InvokeAI; the single file, in SDXL's original layout with `v_pred` and `ztsnr`, for
ComfyUI, Forge, A1111 (with the .yaml beside it) and their kin.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from sumizome.export import ModelCard
    from sumizome.models.sdxl import SDXLModel

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
    unet: Path | None = None
    """Safetensors file to write with the U-Net alone, for ComfyUI's "Load Diffusion Model"."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Of the written weights."""
    weights: Literal["ema", "raw"] = "ema"
    """Of a run directory: the averaged weights, or the trained ones as they are."""
    latents: Literal["fold", "config"] = "fold"
    """Latent statistics of the run's own, in a folder. fold: into the VAE, so that every program draws rightly.
    config: stated beside the VAE as it was, which diffusers reads; for training on. A single file always folds."""
    title: str | None = None
    """The model's name in the file's metadata; by default the file's own."""
    author: str = ""
    """In the file's metadata."""
    description: str = ""
    """In the file's metadata."""
    verify_step: bool = True
    """Beside comparing every bit, make what was written denoise one step and compare it with the source's."""
    overwrite: bool = False
    """Replace what stands at the given paths."""


def run(command: Command) -> None:
    """Exports, verifies and says what was written."""
    from sumizome.errors import ConfigError
    from sumizome.export import (
        check_diffusers_folder,
        check_single_file,
        file_settings,
        write_diffusers_folder,
        write_single_file,
    )
    from sumizome.export_metadata import sidecar_path
    from sumizome.mend_decision import check_kept
    from sumizome.models.unseen_settings import settings_words

    targets = [path for path in (command.folder, command.file, command.unet) if path is not None]
    if not targets:
        raise ConfigError("nothing to write; give --folder DIR, --file FILE.safetensors, --unet FILE.safetensors")
    for number, path in enumerate(targets):
        check_kept(command.model, path)
        if path.resolve() in [other.resolve() for other in targets[:number]]:
            raise ConfigError(f"{path} is given twice; give each thing to write a path of its own")
        if path.exists() and not command.overwrite:
            raise ConfigError(f"{path} exists; give another path, or --overwrite to replace it")
    model, card = _model_and_card(command)
    if command.folder is not None:
        check_diffusers_folder(model, command.folder, overwrite=command.overwrite)
    files = [(command.file, "single file", False), (command.unet, "U-Net alone", True)]
    for target, _, unet_alone in files:
        if target is not None:
            check_single_file(model, target, unet_alone=unet_alone, overwrite=command.overwrite)

    proof = "read back bit for bit" + (", one denoising step compared" if command.verify_step else "")
    options: dict[str, Any] = {
        "dtype": command.dtype,
        "overwrite": command.overwrite,
        "verify_step": command.verify_step,
    }
    if command.folder is not None:
        path = write_diffusers_folder(model, command.folder, fold_latents=command.latents == "fold", **options)
        print(f"{path}: diffusers folder, {proof}")
    for target, what, unet_alone in files:
        if target is not None:
            titled = replace(card, title=command.title or target.stem)
            path = write_single_file(model, target, card=titled, unet_alone=unet_alone, **options)
            print(f"{path}: {what}, {proof}")
            networks = {"unet": model.networks["unet"]} if unet_alone else model.networks
            for line in settings_words(file_settings(networks)):
                print(f"! {line}")
    sidecar = sidecar_path(model, command.file) if command.file else None
    if sidecar is not None:
        print(f"{sidecar}: for A1111, which reads it where it stands beside the file")


def _model_and_card(command: Command) -> "tuple[SDXLModel, ModelCard]":
    """The model, and what its file's metadata is to say."""
    from sumizome.export import ModelCard
    from sumizome.inference import native_canvas
    from sumizome.inspection import inspect_model
    from sumizome.models.sdxl import ALL_COMPONENTS, Component, load_model
    from sumizome.train.run_dir import is_run_dir, load_trained_model
    from sumizome.train.summary import training_summary

    card = ModelCard(author=command.author, description=command.description)
    if not is_run_dir(command.model):
        components: tuple[Component, ...] = ALL_COMPONENTS
        if command.folder is None and command.file is None:
            # The VAE too, if there is one: it says whether the U-Net's latents are SDXL's.
            held = {part.name for part in inspect_model(command.model).components}
            components = ("unet", "vae") if "vae" in held else ("unet",)
        model = load_model(command.model, components=components)
        return model, replace(card, resolution=native_canvas(model)) if "vae" in model.networks else card
    model, step = load_trained_model(command.model, command.weights)
    print(f"{command.model}: step {step}, {command.weights} weights")
    summary = training_summary(command.model, step, command.weights)
    return model, replace(card, resolution=summary.resolution or native_canvas(model), training=summary.metadata)
