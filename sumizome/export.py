"""Trained weights as files that other programs open: a diffusers folder, or one file in SDXL's original layout.

Owns the commit: cast, written under a temporary name, read back bit for bit, flushed to disk, renamed. A file that does
not read back is never left under the final name. What stands in the files beside weights is said by
`models.diffusers_folder` and `models.single_file`; here are only ModelSpec's card and A1111's sidecar.
"""

import copy
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from sumizome import __version__
from sumizome.errors import ExportError, ModelError
from sumizome.files import flush_to_disk, give_usual_mode, write_atomically
from sumizome.models.architecture import SDXL_SCALING_FACTOR, unet_config
from sumizome.models.diffusers_folder import folder_key, weights_path, write_small_files
from sumizome.models.key_map import KeyRule, from_original, key_rules, to_original
from sumizome.models.networks import native_state
from sumizome.models.sdxl import SDXLModel
from sumizome.models.single_file import prediction_markers, prediction_metadata
from sumizome.models.tensor_file import TensorFile, open_tensor_file
from sumizome.models.vae import fold_latent_statistics, latent_statistics

__all__ = [
    "TORCH_DTYPES",
    "ExportDtype",
    "ModelCard",
    "cast_weight",
    "folder_committed",
    "model_metadata",
    "read_back",
    "sidecar_path",
    "tensor_bytes",
    "write_diffusers_folder",
    "write_sidecar",
    "write_single_file",
]

ExportDtype = Literal["fp32", "fp16", "bf16"]
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_SIDECAR = Path(__file__).parent / "models" / "assets" / "a1111_sdxl_v.yaml"


@dataclass(frozen=True)
class ModelCard:
    """What ModelSpec metadata says of the model beside its architecture."""

    title: str = "Sumizome model"
    author: str = ""
    description: str = ""
    resolution: tuple[int, int] = (1024, 1024)
    """(height, width) px that the model was trained for."""


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
    with folder_committed(path) as folder:
        write_small_files(folder, networks, model.prediction_type, model.schedule_config)
        for name, network in networks.items():
            tensors = {
                folder_key(name, key): cast_weight(f"{name}.{key}", tensor, dtype)
                for key, tensor in native_state(network).items()
            }
            weights = weights_path(folder, name)
            save_file(tensors, weights, metadata={"format": "pt"})
            _check_tensors(open_tensor_file(weights), tensors)
    return path


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
    networks = _whole(model)
    markers = prediction_markers(model.prediction_type, model.schedule_config)
    sidecar = sidecar_path(model, path)
    _check_target(path, sidecar, overwrite)
    if _needs_folding(model.vae):
        networks = networks | {"vae": _with_sdxl_scaling(model.vae)}

    native = {
        f"{name}.{key}": cast_weight(f"{name}.{key}", tensor, dtype)
        for name, network in networks.items()
        for key, tensor in native_state(network).items()
    }
    rules = [rule for name, network in networks.items() for rule in key_rules(name, native_state(network))]
    tensors = {rule.original: to_original(rule, native) for rule in rules} | markers
    metadata = model_metadata(model, card or ModelCard(), dtype, _data_hash(tensors))

    def write(file: Path) -> None:
        save_file(tensors, file, metadata=metadata)
        with read_back():
            _check_single_file(open_tensor_file(file), rules, native, markers, metadata)

    write_atomically(path, write, failure=ExportError)
    if sidecar:
        write_sidecar(sidecar)
    return path


def sidecar_path(model: SDXLModel, path: Path) -> Path | None:
    """Where A1111 looks for the configuration of the single file `path`; None for a model that needs none."""
    needed = model.prediction_type == "v_prediction" and _is_full_size(model)
    return path.with_suffix(".yaml") if needed else None


def write_sidecar(path: Path) -> None:
    """A1111's configuration of an SDXL that predicts v. Raises: ExportError for what the disk refuses."""
    write_atomically(path, lambda file: shutil.copyfile(_SIDECAR, file), failure=ExportError)


def _whole(model: SDXLModel) -> dict[str, nn.Module]:
    networks = model.networks()
    missing = {"unet", "vae", "text_encoder", "text_encoder_2"} - set(networks)
    if missing:
        raise ExportError(f"an export needs every network; {', '.join(sorted(missing))} was not loaded.")
    return networks


def _check_target(path: Path, sidecar: Path | None, overwrite: bool) -> None:
    if path.suffix != ".safetensors":
        raise ExportError(f"{path} must end in .safetensors.")
    for file in filter(None, (path, sidecar)):
        if file.exists() and not overwrite:
            raise ExportError(f"{file} exists; ask to overwrite it, or choose another path.")


def _is_full_size(model: SDXLModel) -> bool:
    return tuple(model.unet.config["block_out_channels"]) == unet_config()["block_out_channels"]


def _needs_folding(vae: AutoencoderKL) -> bool:
    return vae.config["scaling_factor"] != SDXL_SCALING_FACTOR or bool(vae.config.get("latents_mean"))


def _with_sdxl_scaling(vae: AutoencoderKL) -> AutoencoderKL:
    statistics = latent_statistics(vae)
    folded = copy.deepcopy(vae)
    folded.register_to_config(scaling_factor=SDXL_SCALING_FACTOR)
    return fold_latent_statistics(folded, list(statistics.mean), list(statistics.std))


def cast_weight(name: str, tensor: Tensor, dtype: ExportDtype) -> Tensor:
    """The tensor in the export's dtype, on the CPU, contiguous.

    Raises: ExportError if it is not finite, there or already before.
    """
    wanted = TORCH_DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype
    cast = tensor.detach().to("cpu", wanted).contiguous()
    if not torch.isfinite(cast).all():
        if torch.isfinite(tensor).all():
            most = float(tensor.abs().max())
            raise ExportError(f"{name} reaches {most:.3g}, which overflows {dtype}: export as bf16 or fp32.")
        raise ExportError(f"{name} holds NaN or infinity: export an earlier checkpoint.")
    return cast


def model_metadata(model: SDXLModel, card: ModelCard, dtype: ExportDtype, data_hash: str) -> dict[str, str]:
    """ModelSpec 1.0.1, `format`, and who wrote it."""
    stated = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base" if _is_full_size(model) else "sumizome-tiny",
        "implementation": "sgm",
        "title": card.title,
        "author": card.author,
        "description": card.description,
        "resolution": f"{card.resolution[1]}x{card.resolution[0]}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hash_sha256": f"0x{data_hash}",
        "unet_dtype": dtype,
        "vae_dtype": dtype,
    }
    return {
        **{f"modelspec.{key}": value for key, value in stated.items() if value},
        **prediction_metadata(model.prediction_type, model.schedule_config),
        "format": "pt",
        "software": f"Sumizome {__version__}",
    }


def _data_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 hex of the file's data, whose order safetensors fixes: wider dtypes first, then by name."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        digest.update(tensor_bytes(tensor).numpy().data)
    return digest.hexdigest()


# --- reading back ----------------------------------------------------------------------------------------------------


@contextmanager
def read_back() -> Iterator[None]:
    """Raises: ExportError where reading what was just written raises ModelError."""
    try:
        yield
    except ModelError as error:
        raise ExportError(f"the export did not read back: {error}") from error


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


def _check_names(file: TensorFile, names: Iterable[str]) -> None:
    difference = set(file.shapes) ^ set(names)
    if difference:
        raise ExportError(f"{file.path}: {len(difference)} tensors did not read back, {min(difference)} for one.")


def _check_same(file: TensorFile, name: str, written: Tensor, read: Tensor) -> None:
    same = written.dtype == read.dtype and written.shape == read.shape
    if not same or not torch.equal(tensor_bytes(written), tensor_bytes(read)):
        raise ExportError(f"{file.path}: {name} did not read back bit for bit. Check the disk and export again.")


def tensor_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes as they stand in a file."""
    return tensor.contiguous().flatten().view(torch.uint8)


# --- a folder in one step --------------------------------------------------------------------------------------------


@contextmanager
def folder_committed(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, flushed and renamed to `path` if nothing is raised; what stood there goes then.

    Raises: ExportError for what the disk refuses, and for what does not read back.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        temporary.mkdir(parents=True)
        with read_back():
            yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            if written.is_file():
                give_usual_mode(written)
            flush_to_disk(written)
        if path.exists():  # a folder cannot be renamed over another one
            path.rename(replaced)
        temporary.rename(path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
