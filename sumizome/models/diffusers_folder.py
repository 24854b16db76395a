"""A model as a diffusers folder: what is read from one, and the small files that make one.

Owns the folder's layout, variants and shards, and the scheduler's configuration both ways. Weights are `networks`',
the commit is `export`'s. Names that a folder's files give are checked before they are followed.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
from torch import Tensor, nn

from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import (
    DIFFUSERS_TERMINAL_ALPHA_CUMPROD,
    NoiseSchedule,
    ScheduleConfig,
    build_noise_schedule,
)
from sumizome.errors import ModelError
from sumizome.models.architecture import Config, clip_config
from sumizome.models.networks import native_name
from sumizome.models.tensor_file import open_tensor_file
from sumizome.models.tensor_header import refuse_pickle
from sumizome.models.text_encoding import bpe_vocabulary

__all__ = ["DiffusersFolder", "folder_key", "open_folder", "weights_path", "write_small_files"]


@dataclass(frozen=True)
class DiffusersFolder:
    """An opened folder: a source of configurations and tensors for `sdxl.load_model`."""

    path: Path

    def config(self, name: str) -> Config:
        """The network's config.json. Raises: ModelError if it is missing or has tokens that CLIP does not."""
        config = _read_json(self.path / name / "config.json", f"SDXL's {name} belongs there")
        rows = config.get("vocab_size", 49408)
        if rows != 49408:
            raise ModelError(
                f"{self.path / name} has a vocabulary of {rows} tokens; only CLIP's own 49408 are supported."
            )
        return config

    def tensors(self, name: str, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The network's tensors by native names, one at a time."""
        for file in map(open_tensor_file, _weight_files(weights_path(self.path, name))):
            for key in file.shapes:
                yield _renamed(native_name(key)), file.read(key)

    def prediction(self) -> tuple[PredictionType, ScheduleConfig]:
        """What the scheduler's configuration says. Raises: ModelError for a schedule that is not SDXL's kind."""
        config = _read_json(self.path / "scheduler" / "scheduler_config.json", "it says what the U-Net predicts")
        stated = config.get("prediction_type", "epsilon")
        if stated not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(f"{self.path}: scheduler_config.json has an unknown prediction_type {stated!r}.")
        kind = config.get("beta_schedule")
        if kind != "scaled_linear":
            raise ModelError(f"{self.path}: scheduler_config.json has beta_schedule {kind!r}, expected scaled_linear.")
        schedule = ScheduleConfig(
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
            beta_start=float(config.get("beta_start", ScheduleConfig.beta_start)),
            beta_end=float(config.get("beta_end", ScheduleConfig.beta_end)),
            num_timesteps=int(config.get("num_train_timesteps", ScheduleConfig.num_timesteps)),
        )
        return stated, schedule


def open_folder(path: Path) -> DiffusersFolder:
    """The folder at `path`. Raises: ModelError if it is no folder of an SDXL pipeline."""
    kind = str(_read_json(path / "model_index.json", "a diffusers model folder has one").get("_class_name"))
    if not kind.startswith("StableDiffusionXL"):
        raise ModelError(f"{path} holds a {kind}, expected a StableDiffusionXLPipeline.")
    return DiffusersFolder(path)


def weights_path(folder: Path, name: str) -> Path:
    """Where a network's full-precision weights stand in a folder."""
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    return folder / name / f"{stem}.safetensors"


def _weight_files(whole: Path) -> list[Path]:
    """The safetensors files of a network: the full-precision one, else its shards, else a variant such as fp16."""
    if whole.exists():
        return [whole]
    folder, stem = whole.parent, whole.stem
    for index in [folder / f"{stem}.safetensors.index.json", *sorted(folder.glob(f"{stem}.*index*.json"))]:
        if index.exists():
            return _shards(index)
    for variant in [folder / f"{stem}.fp16.safetensors", *sorted(folder.glob(f"{stem}.*.safetensors"))]:
        if variant.exists():
            return [variant]
    for pickled in folder.glob("*pytorch_model*.bin"):
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


# --- writing ---------------------------------------------------------------------------------------------------------


def write_small_files(
    folder: Path, networks: Mapping[str, nn.Module], prediction_type: PredictionType, schedule_config: ScheduleConfig
) -> None:
    """Everything of a model folder but the weights: index, scheduler, tokenizers, and each network's configuration."""
    _write_json(folder / "model_index.json", _model_index(networks))
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(prediction_type, schedule_config))
    _write_tokenizer(folder / "tokenizer", padding="<|endoftext|>")
    _write_tokenizer(folder / "tokenizer_2", padding="!")
    for name, network in networks.items():
        config = _text_config(network) if name.startswith("text_encoder") else _config(network)
        _write_json(folder / name / "config.json", config)


def folder_key(name: str, key: str) -> str:
    """A native name as a folder has it: transformers 4 and 5 both read "text_model."; the projection is beside it."""
    inside = name.startswith("text_encoder") and not key.startswith("text_projection")
    return f"text_model.{key}" if inside else key


def _config(network: nn.Module) -> Config:
    own = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return {"_class_name": type(network).__name__, "_diffusers_version": diffusers.__version__, **own}


def _text_config(network: nn.Module) -> Config:
    """CLIP's architecture alone: transformers 4 and 5 differ in everything else that they write."""
    own = {key: getattr(network.config, key) for key in clip_config()}
    return {"model_type": "clip_text_model", "architectures": [type(network).__name__], **own}


def _model_index(networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    libraries = {name: "transformers" if name.startswith("text_encoder") else "diffusers" for name in networks}
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        # Captions dropped in training are encoded empty prompts, not zeros.
        "force_zeros_for_empty_prompt": False,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        **{name: [libraries[name], type(network).__name__] for name, network in networks.items()},
    }


def _scheduler_config(prediction_type: PredictionType, schedule: ScheduleConfig) -> dict[str, Any]:
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": diffusers.__version__,
        "num_train_timesteps": schedule.num_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
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
    rates = build_noise_schedule(config).alphas_cumprod.sqrt()
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
