"""Trained weights as files that other programs open: a diffusers folder, or one file in SDXL's original layout.

Owns the commit: cast and written tensor by tensor under a temporary name, read back bit for bit, made to denoise one
step, flushed to disk, renamed. A file that fails any of it is never left under the final name. What stands in the files
beside weights is said by `export_metadata`, `models.diffusers_folder` and `models.single_file`.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from diffusers import AutoencoderKL
from torch import Tensor, nn

from sumizome.errors import ExportError
from sumizome.export_check import (
    TORCH_DTYPES,
    cast_weight,
    check_native,
    check_step,
    model_step_source,
    read_back,
    step_source,
)
from sumizome.export_metadata import (
    ExportDtype,
    ModelCard,
    check_sidecar,
    commit_with_sidecar,
    model_metadata,
    sidecar_path,
)
from sumizome.files import folder_committed
from sumizome.models.architecture import SDXL_SCALE, SDXL_SCALING_FACTOR, latent_scale
from sumizome.models.diffusers_folder import folder_key, network_config, write_small_files
from sumizome.models.folder_files import weights_path
from sumizome.models.key_map import NETWORK_PREFIXES, KeyRule, key_rules, to_original
from sumizome.models.networks import native_state
from sumizome.models.prediction_marks import prediction_markers
from sumizome.models.sdxl import SDXLModel
from sumizome.models.tensor_file import open_tensor_file
from sumizome.models.tensor_writer import TensorJob, job_of, write_tensors
from sumizome.models.unseen_settings import Settings, settings_metadata, unseen_settings
from sumizome.models.vae import fold_latent_statistics, latent_statistics

__all__ = [
    "ExportDtype",
    "ModelCard",
    "check_diffusers_folder",
    "check_single_file",
    "file_settings",
    "write_diffusers_folder",
    "write_single_file",
]


def write_diffusers_folder(
    model: SDXLModel,
    path: Path,
    *,
    dtype: ExportDtype = "fp32",
    overwrite: bool = False,
    fold_latents: bool = True,
    verify_step: bool = True,
) -> Path:
    """A folder that diffusers' StableDiffusionXLPipeline opens, with SDXL's tokenizers and the right scheduler.

    Returns `path`. With `overwrite`, a model folder that stands there is replaced when the new one is complete. Latent
    statistics other than SDXL's factor are folded into the VAE, or, without `fold_latents`, stated in its config, which
    diffusers reads and InvokeAI does not.
    Raises: ExportError if `path` exists, a network is missing, a weight overflows `dtype`, or reading back differs.
    """
    check_diffusers_folder(model, path, overwrite=overwrite)
    networks = model.networks
    if fold_latents and needs_folding(model.vae):
        networks = {**networks, "vae": _with_sdxl_scaling(model.vae)}
    with folder_committed(path, failure=ExportError) as folder, read_back():
        write_small_files(folder, networks, model.prediction_type, model.schedule_config)
        for name, network in networks.items():
            jobs = [
                _job(folder_key(name, key), tensor, dtype, partial(cast_weight, f"{name}.{key}", tensor, dtype))
                for key, tensor in native_state(network).items()
            ]
            write_tensors(weights_path(folder, name), jobs, {"format": "pt"})
        if verify_step:
            check_step(model_step_source(model), step_source(folder), dtype)
    return path


def check_diffusers_folder(model: SDXLModel, path: Path, *, overwrite: bool = False) -> None:
    """Raises: ExportError if `write_diffusers_folder` could not write there, or not this model."""
    _check_whole(model)
    if path.exists() and not (overwrite and (path / "model_index.json").is_file()):
        advice = "holds no diffusers model, so it is not replaced" if overwrite else "exists; ask to overwrite it"
        raise ExportError(f"{path} {advice}, or choose another path.")


def write_single_file(
    model: SDXLModel,
    path: Path,
    *,
    dtype: ExportDtype = "fp32",
    card: ModelCard | None = None,
    unet_alone: bool = False,
    overwrite: bool = False,
    verify_step: bool = True,
) -> Path:
    """A safetensors file in SDXL's original layout; for a v-prediction SDXL also A1111's sidecar, `path` as .yaml.

    Returns `path`. A VAE with other latent statistics than SDXL's single factor has them folded into its convolutions,
    because this layout has no place for them. `unet_alone`: the U-Net without the layout's prefix and its marks beside
    it, where ComfyUI's "Load Diffusion Model" looks for them; it has no sidecar.
    Raises: ExportError as `check_single_file` does, or if a weight overflows `dtype`, or reading back differs.
    """
    check_single_file(model, path, unet_alone=unet_alone, overwrite=overwrite)
    networks = {"unet": model.networks["unet"]} if unet_alone else model.networks
    if "vae" in networks and needs_folding(model.vae):
        networks = {**networks, "vae": _with_sdxl_scaling(model.vae)}
    metadata = model_metadata(model, card or ModelCard(), dtype) | settings_metadata(file_settings(networks))
    if unet_alone:
        del metadata["modelspec.vae_dtype"]
    _write_file(model, networks, path, dtype, metadata, verify_step)
    return path


def file_settings(networks: Mapping[str, nn.Module]) -> Settings:
    """What a single file of these networks says in metadata because their shapes do not show it."""
    return {name: unseen_settings(name, network_config(name, network)) for name, network in networks.items()}


def check_single_file(model: SDXLModel, path: Path, *, unet_alone: bool = False, overwrite: bool = False) -> None:
    """Refuses what `write_single_file` could not write, before anything is.

    Raises: ExportError if `path` or its sidecar exists, a .yaml there says another prediction type, a network is
    missing, the layout cannot say what the model predicts, or `unet_alone` and its latents need a folded VAE.
    """
    if path.suffix != ".safetensors":
        raise ExportError(f"{path} must end in .safetensors.")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists; ask to overwrite it, or choose another path.")
    prediction_markers(model.prediction_type, model.schedule_config)
    if not unet_alone:
        _check_whole(model)
        check_sidecar(path, sidecar_path(model, path), model.prediction_type, overwrite)
    elif "unet" not in model.networks:
        raise ExportError("the U-Net was not loaded, so it cannot be exported.")
    elif "vae" in model.networks and needs_folding(model.vae):
        raise ExportError(
            "the U-Net works on latents with statistics of their own, and alone it cannot say so: export the single "
            "file or the folder, whose VAE they are folded into."
        )


def _write_file(
    model: SDXLModel,
    networks: Mapping[str, nn.Module],
    path: Path,
    dtype: ExportDtype,
    metadata: Mapping[str, str],
    verify_step: bool,
) -> None:
    """Writes the networks and marks, streamed, and puts the file at `path` when it has read back as the model."""
    native = {f"{name}.{key}": t for name, network in networks.items() for key, t in native_state(network).items()}
    rules = [rule for name, network in networks.items() for rule in key_rules(name, native_state(network))]
    unet_alone = set(networks) == {"unet"}
    strip = NETWORK_PREFIXES["unet"] if unet_alone else ""
    markers = prediction_markers(model.prediction_type, model.schedule_config)
    jobs = [job_of(name, mark) for name, mark in markers.items()]
    for rule in rules:
        example = to_original(rule, {name: native[name].to("meta") for name in rule.native})
        jobs.append(_job(rule.original.removeprefix(strip), example, dtype, partial(_stored, rule, native, dtype)))

    def write(file: Path) -> None:
        write_tensors(file, jobs, metadata)
        with read_back():
            check_native(open_tensor_file(file), rules, native, dtype, strip)
            if verify_step:
                check_step(model_step_source(model), step_source(file), dtype)

    commit_with_sidecar(path, None if unet_alone else sidecar_path(model, path), write)


def _job(name: str, tensor: Tensor, dtype: ExportDtype, make: Callable[[], Tensor]) -> TensorJob:
    return TensorJob(
        name, TORCH_DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape), make
    )


def _stored(rule: KeyRule, native: Mapping[str, Tensor], dtype: ExportDtype) -> Tensor:
    return to_original(rule, {name: cast_weight(name, native[name], dtype) for name in rule.native})


def _check_whole(model: SDXLModel) -> None:
    missing = {"unet", "vae", "text_encoder", "text_encoder_2"} - set(model.networks)
    if missing:
        raise ExportError(f"an export needs every network; {', '.join(sorted(missing))} was not loaded.")


def needs_folding(vae: AutoencoderKL) -> bool:
    """Whether a VAE scales latents otherwise than by SDXL's one factor, which is all that most programs know."""
    return latent_scale(dict(vae.config)) != SDXL_SCALE


def _with_sdxl_scaling(vae: AutoencoderKL) -> AutoencoderKL:
    statistics = latent_statistics(vae)
    folded = copy.deepcopy(vae)
    folded.register_to_config(scaling_factor=SDXL_SCALING_FACTOR)
    return fold_latent_statistics(folded, list(statistics.mean), list(statistics.std))
