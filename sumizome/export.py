"""Trained weights as files that other programs open: a diffusers folder, or one file in SDXL's original layout.

Owns what those programs need beside the weights (scheduler config, `v_pred` and `ztsnr`, ModelSpec, A1111's
sidecar) and the commit: written under a temporary name, read back bit for bit, flushed to disk, renamed. A file
that does not read back is never left under the final name.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sumizome import __version__
from sumizome.diffusion.schedule import (
    COMFYUI_TERMINAL_ALPHA_CUMPROD,
    DIFFUSERS_TERMINAL_ALPHA_CUMPROD,
    NoiseSchedule,
    ScheduleConfig,
    build_noise_schedule,
)
from sumizome.errors import ExportError, ModelError
from sumizome.models.architecture import SDXL_SCALING_FACTOR, clip_config, unet_config
from sumizome.models.sdxl import SDXLModel, native_state
from sumizome.models.single_file import KeyRule, from_original, key_rules, to_original
from sumizome.models.tensor_file import TensorFile, open_tensor_file
from sumizome.models.text_encoding import bpe_vocabulary
from sumizome.models.vae import fold_latent_statistics, latent_statistics

__all__ = ["ExportDtype", "ModelCard", "write_diffusers_folder", "write_single_file"]

ExportDtype = Literal["fp32", "fp16", "bf16"]
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_ASSETS = Path(__file__).parent / "models" / "assets"


@dataclass(frozen=True)
class ModelCard:
    """What ModelSpec metadata says of the model beside its architecture."""

    title: str = "Sumizome model"
    author: str = ""
    description: str = ""
    resolution: tuple[int, int] = (1024, 1024)
    """(height, width) px that the model was trained for."""


# --- a diffusers folder ----------------------------------------------------------------------------------------------


def write_diffusers_folder(
    model: SDXLModel, path: Path, *, dtype: ExportDtype = "fp32", overwrite: bool = False
) -> Path:
    """A folder that diffusers' StableDiffusionXLPipeline opens, with SDXL's tokenizers and the right scheduler.

    Returns `path`. With `overwrite`, a model folder that stands there is replaced when the new one is complete.
    Raises: ExportError if `path` exists, a network is missing, a weight overflows `dtype`, or reading back differs.
    """
    networks = _whole(model)
    if path.exists() and not (overwrite and (path / "model_index.json").is_file()):
        advice = "holds no diffusers model, so it is not replaced" if overwrite else "exists; ask to overwrite it"
        raise ExportError(f"{path} {advice}, or choose another path.")
    with _committed(path) as folder:
        folder.mkdir()
        _write_json(folder / "model_index.json", _model_index())
        _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(model))
        _write_tokenizer(folder / "tokenizer", padding="<|endoftext|>")
        _write_tokenizer(folder / "tokenizer_2", padding="!")
        for name, network in networks.items():
            is_text = name.startswith("text_encoder")
            tensors = {
                _folder_key(name, key): _cast(f"{name}.{key}", tensor, dtype)
                for key, tensor in native_state(network).items()
            }
            stem = "model" if is_text else "diffusion_pytorch_model"
            weights = folder / name / f"{stem}.safetensors"
            _write_json(folder / name / "config.json", _text_config(network) if is_text else _config(network))
            _save_tensors(tensors, weights, {"format": "pt"})
            _check_tensors(open_tensor_file(weights), tensors)
    return path


def _folder_key(name: str, key: str) -> str:
    """transformers 4 and 5 both read "text_model."; the projection stands beside it."""
    inside = name.startswith("text_encoder") and not key.startswith("text_projection")
    return f"text_model.{key}" if inside else key


def _config(network: nn.Module) -> dict[str, Any]:
    own = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return {"_class_name": type(network).__name__, "_diffusers_version": diffusers.__version__, **own}


def _text_config(network: nn.Module) -> dict[str, Any]:
    """CLIP's architecture alone: transformers 4 and 5 differ in everything else that they write."""
    own = {key: getattr(network.config, key) for key in clip_config()}
    return {"model_type": "clip_text_model", "architectures": [type(network).__name__], **own}


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        # Captions dropped in training are encoded empty prompts, not zeros.
        "force_zeros_for_empty_prompt": False,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _scheduler_config(model: SDXLModel) -> dict[str, Any]:
    schedule = model.schedule_config
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": diffusers.__version__,
        "num_train_timesteps": schedule.num_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": model.prediction_type,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "timestep_spacing": "trailing",  # "leading", SDXL's default, would never visit the terminal step
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    }
    return config | ({"trained_betas": _trained_betas(schedule)} if schedule.zero_terminal_snr else {})


def _trained_betas(config: ScheduleConfig) -> list[float]:
    """Betas that end at sigma 4096, and from which `rescale_betas_zero_snr` makes our schedule exactly.

    diffusers' classes that know the flag rescale whatever betas they are given. Betas of the finished schedule would be
    rescaled twice: sigma 5012 at t = 998, above the terminal 4096. So the rescale is undone here, as an affine map of
    √ᾱ. Classes without the flag (Heun, LMS, KDPM2, DEIS, …) use these betas as they are: pure noise at the last step
    and 1.4 % less sigma at t = 962, where SDXL's own betas would stop at sigma 14.6.
    """
    table = build_noise_schedule(config).alphas_cumprod
    rates = table.sqrt()
    last = DIFFUSERS_TERMINAL_ALPHA_CUMPROD**0.5
    betas: list[float] = NoiseSchedule((rates * (1 - last / rates[0]) + last).square()).betas.tolist()
    return betas


def _write_tokenizer(folder: Path, padding: str) -> None:
    vocabulary, merges = bpe_vocabulary()
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": padding,
    }
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", special | config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- an original single file -----------------------------------------------------------------------------------------


def write_single_file(
    model: SDXLModel,
    path: Path,
    *,
    dtype: ExportDtype = "fp32",
    card: ModelCard | None = None,
    overwrite: bool = False,
) -> Path:
    """A safetensors file in SDXL's original layout; for a v-prediction SDXL also A1111's sidecar, `path` as .yaml.

    Returns `path`. A VAE with other latent statistics than SDXL's single factor has them folded into its convolutions,
    because this layout has no place for them.
    Raises: ExportError if `path` exists, a network is missing, the layout cannot say what the model predicts, a weight
    overflows `dtype`, or reading back differs.
    """
    networks = dict(_whole(model))
    _check_expressible(model)
    if path.suffix != ".safetensors":
        raise ExportError(f"{path} must end in .safetensors.")
    sidecar = path.with_suffix(".yaml") if _needs_sidecar(model) else None
    for file in filter(None, (path, sidecar)):
        if file.exists() and not overwrite:
            raise ExportError(f"{file} exists; ask to overwrite it, or choose another path.")
    if networks["vae"].config["scaling_factor"] != SDXL_SCALING_FACTOR or networks["vae"].config.get("latents_mean"):
        networks["vae"] = _with_sdxl_scaling(networks["vae"])

    native = {
        f"{name}.{key}": _cast(f"{name}.{key}", tensor, dtype)
        for name, network in networks.items()
        for key, tensor in native_state(network).items()
    }
    rules = [rule for name, network in networks.items() for rule in key_rules(name, native_state(network))]
    markers = _markers(model)
    tensors = {rule.original: to_original(rule, native) for rule in rules} | markers
    metadata = _metadata(model, card or ModelCard(), dtype, _tensor_hash(tensors))
    with _committed(path) as file:
        _save_tensors(tensors, file, metadata)
        _check_single_file(open_tensor_file(file), rules, native, markers, metadata)
    if sidecar:
        with _committed(sidecar) as file:
            shutil.copyfile(_ASSETS / "a1111_sdxl_v.yaml", file)
    return path


def _check_expressible(model: SDXLModel) -> None:
    if model.prediction_type == "sample":
        raise ExportError("the single-file layout has no mark for prediction type sample: export a diffusers folder.")
    if model.schedule_config.zero_terminal_snr and model.prediction_type != "v_prediction":
        raise ExportError("the single-file layout marks zero terminal SNR only for v_prediction (ztsnr needs v_pred).")
    standard = ScheduleConfig(zero_terminal_snr=model.schedule_config.zero_terminal_snr)
    if model.schedule_config != standard:
        raise ExportError("the single-file layout cannot hold betas other than SDXL's: export a diffusers folder.")


def _with_sdxl_scaling(vae: nn.Module) -> nn.Module:
    statistics = latent_statistics(vae)
    folded = copy.deepcopy(vae)
    folded.register_to_config(scaling_factor=SDXL_SCALING_FACTOR)
    return fold_latent_statistics(folded, list(statistics.mean), list(statistics.std))


def _markers(model: SDXLModel) -> dict[str, Tensor]:
    """The tensors by which programs know what the U-Net predicts."""
    markers = {}
    if model.prediction_type == "v_prediction":
        markers["v_pred"] = torch.tensor([])
    if model.schedule_config.zero_terminal_snr:
        markers["ztsnr"] = torch.tensor([])
        # stable-diffusion.cpp reads this table instead of the mark; all the others ignore it.
        schedule = build_noise_schedule(model.schedule_config)
        table = schedule.with_terminal_alpha_cumprod(COMFYUI_TERMINAL_ALPHA_CUMPROD).alphas_cumprod
        markers["alphas_cumprod"] = table.float()
    return markers


def _metadata(model: SDXLModel, card: ModelCard, dtype: ExportDtype, tensor_hash: str) -> dict[str, str]:
    """ModelSpec 1.0.1, and the bare `prediction_type` that qDiffusion reads.

    `v-zsnr` is no value of the specification: given plain "v", SwarmUI switches zero terminal SNR off.
    """
    velocity = model.prediction_type == "v_prediction"
    zero_snr = model.schedule_config.zero_terminal_snr
    stated = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base" if _is_full_size(model) else "sumizome-tiny",
        "implementation": "sgm",
        "title": card.title,
        "author": card.author,
        "description": card.description,
        "resolution": f"{card.resolution[1]}x{card.resolution[0]}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hash_sha256": f"0x{tensor_hash}",
        "prediction_type": ("v-zsnr" if zero_snr else "v") if velocity else "epsilon",
        "unet_dtype": dtype,
        "vae_dtype": dtype,
    }
    specification = {f"modelspec.{key}": value for key, value in stated.items() if value}
    return specification | {
        "format": "pt",
        "prediction_type": "v" if velocity else "epsilon",
        "software": f"Sumizome {__version__}",
    }


def _tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 hex of the file's data, whose order safetensors fixes: wider dtypes first, then by name."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def _is_full_size(model: SDXLModel) -> bool:
    return tuple(model.unet.config["block_out_channels"]) == unet_config()["block_out_channels"]


def _needs_sidecar(model: SDXLModel) -> bool:
    return model.prediction_type == "v_prediction" and _is_full_size(model)


# --- writing safely --------------------------------------------------------------------------------------------------


def _whole(model: SDXLModel) -> dict[str, nn.Module]:
    networks = model.networks()
    missing = {"unet", "vae", "text_encoder", "text_encoder_2"} - set(networks)
    if missing:
        raise ExportError(f"an export needs every network; {', '.join(sorted(missing))} was not loaded.")
    return networks


def _cast(name: str, tensor: Tensor, dtype: ExportDtype) -> Tensor:
    """The tensor in the export's dtype, on the CPU, contiguous and finite."""
    wanted = _DTYPES[dtype]
    cast = tensor.detach().to("cpu", wanted if tensor.is_floating_point() else tensor.dtype).contiguous()
    if not torch.isfinite(cast).all():
        if torch.isfinite(tensor).all():
            most = float(tensor.abs().max())
            raise ExportError(f"{name} reaches {most:.3g}, which overflows {dtype}: export as bf16 or fp32.")
        raise ExportError(f"{name} holds NaN or infinity: export an earlier checkpoint.")
    return cast


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=dict(metadata))
    path.chmod(mode)  # safetensors makes files that only their owner can read, whatever the umask


def _check_tensors(file: TensorFile, tensors: Mapping[str, Tensor]) -> None:
    """Raises: ExportError unless the file holds exactly these tensors, bit for bit."""
    _check_names(file, tensors)
    for name, tensor in tensors.items():
        _check_same(file, name, tensor, file.read(name))


def _check_single_file(
    file: TensorFile,
    rules: list[KeyRule],
    native: Mapping[str, Tensor],
    markers: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Raises: ExportError unless the file, read as a loader reads it, gives back every native tensor bit for bit."""
    _check_names(file, [*(rule.original for rule in rules), *markers])
    for rule in rules:
        for name, tensor in from_original(rule, file.read(rule.original)).items():
            _check_same(file, name, native[name], tensor)
    for name, tensor in markers.items():
        _check_same(file, name, tensor, file.read(name))
    if file.metadata != dict(metadata):
        raise ExportError(f"{file.path}: the metadata did not read back as written.")


def _check_names(file: TensorFile, names: Any) -> None:
    difference = set(file.shapes) ^ set(names)
    if difference:
        raise ExportError(f"{file.path}: {len(difference)} tensors did not read back, {min(difference)} for one.")


def _check_same(file: TensorFile, name: str, written: Tensor, read: Tensor) -> None:
    same = written.dtype == read.dtype and written.shape == read.shape
    if not same or not torch.equal(_bytes(written), _bytes(read)):
        raise ExportError(f"{file.path}: {name} did not read back bit for bit. Check the disk and export again.")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@contextmanager
def _committed(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the caller puts there is flushed and renamed to `path` if nothing is raised.

    Raises: ExportError for what the disk refuses, and for what does not read back.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        for written in [*(temporary.rglob("*") if temporary.is_dir() else ()), temporary]:
            _flush(written)
        if path.is_dir():  # a folder cannot be renamed over another one
            path.rename(replaced)
        temporary.replace(path)
        _flush(path.parent)
    except ModelError as error:
        raise ExportError(f"the export did not read back: {error}") from error
    except OSError as error:
        raise ExportError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        _remove(temporary)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        _remove(replaced)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
