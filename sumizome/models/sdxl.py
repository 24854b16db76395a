"""The model as one object, and loading it from a diffusers folder or an original single file.

Owns where each component is found and what kind of model it is (prediction type, terminal SNR). The original layout's
names are `single_file`'s. Nothing is fetched from a hub, nothing is unpickled. A component is made without memory
(meta device) and filled tensor by tensor, so that loading takes the model's size and one tensor.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.errors import ModelError
from sumizome.models.architecture import Config
from sumizome.models.single_file import COMPONENT_PREFIXES, from_original, infer_configs, key_rules, prediction_of
from sumizome.models.tensor_file import TensorFile, open_tensor_file, refuse_pickle
from sumizome.models.vae import model_digest

__all__ = [
    "ALL_COMPONENTS",
    "Component",
    "SDXLModel",
    "build_network",
    "load_model",
    "model_digest",
    "native_state",
]

Component: TypeAlias = Literal["unet", "vae", "text_encoders"]
ALL_COMPONENTS: tuple[Component, ...] = ("unet", "vae", "text_encoders")

_NETWORKS: dict[str, tuple[str, ...]] = {
    "unet": ("unet",),
    "vae": ("vae",),
    "text_encoders": ("text_encoder", "text_encoder_2"),
}
"""The networks of a component, by diffusers' folder names."""


@dataclass(frozen=True)
class SDXLModel:
    """The networks and what the U-Net was trained to predict. A component that was not asked for is None."""

    unet: UNet2DConditionModel | None
    vae: AutoencoderKL | None
    text_encoders: nn.ModuleList | None
    """CLIP-L, then the wider encoder with a projection; `text_encoding.encode_prompts` takes both."""
    prediction_type: PredictionType
    schedule_config: ScheduleConfig
    source: Path | None
    """Where it was loaded from; None for a model made from scratch."""

    def networks(self) -> dict[str, nn.Module]:
        """The loaded networks by diffusers' names: unet, vae, text_encoder, text_encoder_2."""
        first, second = self.text_encoders or (None, None)
        named = {"unet": self.unet, "vae": self.vae, "text_encoder": first, "text_encoder_2": second}
        return {name: network for name, network in named.items() if network is not None}

    def to(self, device: torch.device | str) -> "SDXLModel":
        """The same model, every network moved to `device` (in place, as torch's modules do)."""
        for network in self.networks().values():
            network.to(device)
        return self


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    components: tuple[Component, ...] = ALL_COMPONENTS,
    prediction_type: PredictionType | None = None,
    zero_terminal_snr: bool | None = None,
) -> SDXLModel:
    """The SDXL model at `path`: a diffusers folder, or a safetensors file in SDXL's original layout.

    U-Net and text encoders come in `dtype`; the VAE is always float32 (SDXL's overflows in float16). All are in eval
    mode. Prediction type and terminal SNR are read from the scheduler's config, or from the file's `v_pred` and `ztsnr`
    keys and its metadata; `prediction_type` and `zero_terminal_snr` override what was found.

    Raises: ModelError for a missing component, another architecture, a damaged or a pickled file.
    """
    path = Path(path)
    source = _open_folder(path) if path.is_dir() else _open_single_file(path)
    networks: dict[str, nn.Module] = {}
    for name in [name for component in components for name in _NETWORKS[component]]:
        network = build_network(name, source.config(name), device="meta")
        _fill(network, name, source, torch.float32 if name == "vae" else dtype, torch.device(device))
        networks[name] = network.eval()
    found_type, schedule_config = source.prediction()
    if zero_terminal_snr is not None:
        schedule_config = ScheduleConfig(
            zero_terminal_snr, schedule_config.beta_start, schedule_config.beta_end, schedule_config.num_timesteps
        )
    encoders = [networks[name] for name in _NETWORKS["text_encoders"] if name in networks]
    return SDXLModel(
        unet=networks.get("unet"),
        vae=networks.get("vae"),
        text_encoders=nn.ModuleList(encoders) if encoders else None,
        prediction_type=prediction_type or found_type,
        schedule_config=schedule_config,
        source=path,
    )


def build_network(name: str, config: Config, device: torch.device | str = "cpu") -> nn.Module:
    """One network by its diffusers name, randomly initialised (or without memory on the meta device).

    Raises: ModelError if diffusers or transformers do not accept the configuration.
    """
    try:
        with torch.device(device):
            match name:
                case "unet":
                    return UNet2DConditionModel.from_config(config)
                case "vae":
                    return AutoencoderKL.from_config(config)
            text = CLIPTextConfig.from_dict(config)
            return (CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection)(text)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"the configuration of {name} is not one of SDXL's architecture: {error}.") from error


def native_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's tensors by names that do not depend on the version of transformers (no "text_model." prefix)."""
    return {_native(name): tensor for name, tensor in network.state_dict().items()}


def _native(name: str) -> str:
    return name.removeprefix("text_model.")


# --- sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A model on disk: where configurations and tensors of each network come from."""

    path: Path
    config: Callable[[str], Config]
    tensors: Callable[[str, nn.Module], Iterator[tuple[str, Tensor]]]
    prediction: Callable[[], tuple[PredictionType, ScheduleConfig]]


_IGNORED = re.compile(r"(.*\.)?(position_ids|logit_scale|attn_mask)|text_projection(\.weight)?")
"""Tensors that some programs write and the networks do not have: they carry no trained weight that SDXL uses."""


def _fill(network: nn.Module, name: str, source: _Source, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a network on the meta device its tensors, one by one.

    Raises: ModelError naming tensors that are missing, foreign or of another shape.
    """
    places = {_native(key): key for key in network.state_dict()}
    shapes = {key: tensor.shape for key, tensor in native_state(network).items()}
    foreign = []
    for key, tensor in source.tensors(name, network):
        place = places.pop(key, None)
        if place is None:
            foreign += [] if _IGNORED.fullmatch(key) else [key]
        elif tensor.shape != shapes[key]:
            raise ModelError(
                f"{source.path}: {name}'s {key} has shape {tuple(tensor.shape)}, expected {tuple(shapes[key])}. "
                "It is no SDXL model, or one whose architecture was changed."
            )
        else:
            cast = dtype if tensor.is_floating_point() else tensor.dtype
            # A copy always: the tensor may map the file, which somebody may write to while the model trains.
            _assign(network, place, tensor.to(device, cast, copy=True).contiguous())
    if places or foreign:
        problem = f"lacks {_some(places)}" if places else f"has tensors that SDXL does not: {_some(foreign)}"
        raise ModelError(f"{source.path}: {name} {problem}. Use a complete SDXL model.")
    for module in network.modules():  # CLIP's positions are a buffer that no file needs to hold
        if isinstance(getattr(module, "position_ids", None), Tensor):
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]


def _assign(network: nn.Module, place: str, tensor: Tensor) -> None:
    owner, _, leaf = place.rpartition(".")
    module = network.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- an original single file -----------------------------------------------------------------------------------------

_OTHER_KINDS = (
    ("cond_stage_model.", "a Stable Diffusion 1 or 2 checkpoint"),
    ("conditioner.embedders.0.model.", "the SDXL refiner"),
    ("lora_", "a LoRA, not a model"),
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 model"),
    ("double_blocks.", "a Flux model"),
    ("model.diffusion_model.double_blocks.", "a Flux model"),
    ("input_blocks.", "a bare U-Net without VAE and text encoders"),
    ("down_blocks.", "one component of a diffusers folder: give the folder that holds model_index.json"),
)


def _open_single_file(path: Path) -> _Source:
    file = open_tensor_file(path)
    for prefix, kind in _OTHER_KINDS:
        if any(name.startswith(prefix) for name in file.shapes):
            raise ModelError(f"{path} is not a whole SDXL model but {kind}.")
    try:
        configs = infer_configs(file.shapes)
        stated, zero_terminal_snr = prediction_of(file.shapes, file.metadata)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error

    def config(name: str) -> Config:
        if name not in configs:
            held = ", ".join(configs) or "none of SDXL's components"
            raise ModelError(
                f"{path} has no {name} (no {COMPONENT_PREFIXES[name]}* tensors), only {held}. Use the full checkpoint, "
                "or a diffusers folder that holds every component."
            )
        return configs[name]

    def prediction() -> tuple[PredictionType, ScheduleConfig]:
        return stated, ScheduleConfig(zero_terminal_snr=zero_terminal_snr)

    return _Source(path, config, lambda name, network: _original_tensors(file, name, network), prediction)


def _original_tensors(file: TensorFile, name: str, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    prefix = COMPONENT_PREFIXES[name]
    remaining = {key for key in file.shapes if key.startswith(prefix)}
    for rule in key_rules(name, native_state(network)):
        if rule.original in remaining:
            remaining.remove(rule.original)
            for native, tensor in from_original(rule, file.read(rule.original)).items():
                yield native.removeprefix(f"{name}."), tensor
    for key in remaining:
        yield key.removeprefix(prefix), torch.empty(0)


# --- a diffusers folder ----------------------------------------------------------------------------------------------


def _open_folder(path: Path) -> _Source:
    index = _read_json(path / "model_index.json", "a diffusers model folder has one")
    kind = str(index.get("_class_name"))
    if not kind.startswith("StableDiffusionXL"):
        raise ModelError(f"{path} holds a {kind}, expected a StableDiffusionXLPipeline.")

    def config(name: str) -> Config:
        found = _read_json(path / name / "config.json", f"SDXL's {name} belongs there")
        rows = found.get("vocab_size", 49408)
        if rows != 49408:
            raise ModelError(f"{path / name} has a vocabulary of {rows} tokens; only CLIP's own 49408 are supported.")
        return found

    def tensors(name: str, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        for file in map(open_tensor_file, _weight_files(path / name, stem)):
            for key in file.shapes:
                yield _renamed(_native(key)), file.read(key)

    return _Source(path, config, tensors, lambda: _folder_prediction(path))


def _folder_prediction(path: Path) -> tuple[PredictionType, ScheduleConfig]:
    config = _read_json(path / "scheduler" / "scheduler_config.json", "it says what the U-Net predicts")
    stated = config.get("prediction_type", "epsilon")
    if stated not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{path}: scheduler_config.json says prediction_type {stated!r}, which is not known here.")
    if config.get("beta_schedule") != "scaled_linear":
        raise ModelError(
            f"{path}: scheduler_config.json has beta_schedule {config.get('beta_schedule')!r}, expected scaled_linear."
        )
    return stated, ScheduleConfig(
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        beta_start=float(config["beta_start"]),
        beta_end=float(config["beta_end"]),
        num_timesteps=int(config["num_train_timesteps"]),
    )


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a network: the full-precision one, else shards, else a variant such as fp16."""
    whole = folder / f"{stem}.safetensors"
    if whole.exists():
        return [whole]
    indices = [folder / f"{stem}.safetensors.index.json", *sorted(folder.glob(f"{stem}.*index*.json"))]
    for index in indices:
        if index.exists():
            return _shards(index)
    variants = [folder / f"{stem}.fp16.safetensors", *sorted(folder.glob(f"{stem}.*.safetensors"))]
    for variant in variants:
        if variant.exists():
            return [variant]
    for pickled in folder.glob(f"{'pytorch_model' if stem == 'model' else stem}*.bin"):
        refuse_pickle(pickled)
    raise ModelError(f"{whole} is missing, and there are no shards or fp16 variant of it. Copy the folder again.")


def _shards(index: Path) -> list[Path]:
    names = _read_json(index, "the weights are in shards").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files. Copy the folder again.")
    files = []
    for name in sorted(set(names.values())):
        if name != PurePosixPath(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}, which is no safetensors file in its own folder.")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent / name} is missing, a shard that {index.name} names. Copy it again.")
        files.append(index.parent / name)
    return files


_DEPRECATED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What VAE folders of 2023 call the parts of their attention."""


def _renamed(key: str) -> str:
    for old, new in _DEPRECATED.items():
        key = key.replace(old, new)
    return key


def _read_json(path: Path, why: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {why}. Check the path, or copy the folder again.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}). Copy it again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object. Copy it again.")
    return found
