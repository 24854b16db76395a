"""A model as a diffusers folder: what is read from one, and the small files that make one.

Owns the configurations that stand in a folder. Which files hold the weights is `folder_files`', what a scheduler's
configuration means is `scheduler_config`'s; weights are `networks`', the commit is `export`'s.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import (
    DIFFUSERS_TERMINAL_ALPHA_CUMPROD,
    NoiseSchedule,
    ScheduleConfig,
    build_noise_schedule,
)
from sumizome.errors import ModelError
from sumizome.models.architecture import Config, clip_config
from sumizome.models.expected import check_counts
from sumizome.models.folder_files import read_index, read_json, weight_files, weights_path
from sumizome.models.infer_config import LATENT_CHANNELS
from sumizome.models.key_map import native_name
from sumizome.models.scheduler_config import StatedSchedule, read_scheduler_config, table_sigmas
from sumizome.models.tensor_file import open_tensor_file
from sumizome.models.text_encoding import bpe_vocabulary

__all__ = ["DiffusersFolder", "folder_key", "network_config", "open_folder", "write_small_files"]


@dataclass(frozen=True)
class DiffusersFolder:
    """An opened folder: a source of configurations and tensors for `sdxl.load_model`."""

    path: Path

    def config(self, name: str) -> Config:
        """The network's config.json. Raises: ModelError if it is missing, or for no network that could be built."""
        config = read_json(self.path / name / "config.json", f"SDXL's {name} belongs there")
        check_counts(name, config)
        rows = config.get("vocab_size", 49408)
        if rows != 49408:
            raise ModelError(
                f"{self.path / name} has a vocabulary of {rows} tokens; only CLIP's own 49408 are supported."
            )
        return config

    def tensors(self, name: str, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The network's tensors by native names, one at a time."""
        for file in map(open_tensor_file, weight_files(weights_path(self.path, name))):
            for key in file.shapes:
                yield native_name(key), file.read(key)

    def reader(self, name: str) -> Callable[[str], Tensor]:
        """A function from a native name to the network's tensor, read when asked for."""
        files = [open_tensor_file(file) for file in weight_files(weights_path(self.path, name))]
        places = {native_name(key): (file, key) for file in files for key in file.shapes}

        def read(native: str) -> Tensor:
            file, key = places[native]
            return file.read(key)

        return read

    def prediction(self) -> tuple[PredictionType, ScheduleConfig]:
        """What the scheduler's configuration says. Raises: ModelError for a schedule that is not SDXL's kind."""
        stated = read_scheduler_config(self.path)
        schedule = ScheduleConfig(
            zero_terminal_snr=stated.zero_terminal_snr,
            beta_start=stated.beta_start,
            beta_end=stated.beta_end,
            num_timesteps=stated.num_timesteps,
        )
        _check_trained_betas(self.path, stated, schedule)
        return stated.prediction_type, schedule


_BETAS_TOLERANCE = 0.05
"""Of sigma. Betas that we write are 1.4 % low where a scheduler does not rescale them; another curve is far off."""


def _check_trained_betas(path: Path, stated: StatedSchedule, config: ScheduleConfig) -> None:
    """Raises: ModelError if the folder's own betas are not those of the schedule that its other numbers give."""
    if stated.trained_betas is None:
        return
    ours = build_noise_schedule(config).sigmas[:-1].tolist()
    theirs = table_sigmas(stated.trained_betas)
    if stated.rescales and not stated.betas_reach_zero_snr:
        ours = build_noise_schedule(replace(config, zero_terminal_snr=False)).sigmas[:-1].tolist()
    # The last steps of a rescaled table run off to 4096 on one side and to infinity on the other.
    compared = range(min(len(ours), len(theirs)) * 24 // 25)
    if len(theirs) != stated.num_timesteps or any(
        abs(theirs[t] - ours[t]) > _BETAS_TOLERANCE * ours[t] for t in compared
    ):
        raise ModelError(
            f"{path}: scheduler_config.json has trained_betas of another schedule than beta_start {stated.beta_start} "
            f"and beta_end {stated.beta_end} give, which is not supported. Remove them if they are wrong."
        )


def open_folder(path: Path) -> DiffusersFolder:
    """The folder at `path`. Raises: ModelError if it is no folder of an SDXL pipeline."""
    read_index(path)
    return DiffusersFolder(path)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_small_files(
    folder: Path,
    networks: Mapping[str, nn.Module],
    prediction_type: PredictionType,
    schedule_config: ScheduleConfig,
    *,
    zeros_for_empty_prompt: bool = False,
) -> None:
    """Everything of a model folder but the weights: index, scheduler, tokenizers, and each network's configuration.

    `zeros_for_empty_prompt`: what diffusers gives the U-Net without a negative prompt; else the empty prompt, encoded,
    as captions dropped in our training are.
    """
    _write_json(folder / "model_index.json", _model_index(networks, zeros_for_empty_prompt))
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(prediction_type, schedule_config))
    _write_tokenizer(folder / "tokenizer", padding="<|endoftext|>")
    _write_tokenizer(folder / "tokenizer_2", padding="!")
    for name, network in networks.items():
        _write_json(folder / name / "config.json", network_config(name, network))


def network_config(name: str, network: nn.Module) -> Config:
    """What the config.json of a network says, by its diffusers name."""
    return _text_config(network) if name.startswith("text_encoder") else _config(network)


def write_config(folder: Path, network: ModelMixin) -> None:
    """The config.json of one network of diffusers, alone in its folder."""
    _write_json(folder / "config.json", _config(network))


def folder_key(name: str, key: str) -> str:
    """A native name as a folder has it: transformers 4 and 5 both read "text_model."; the projection is beside it."""
    inside = name.startswith("text_encoder") and not key.startswith("text_projection")
    return f"text_model.{key}" if inside else key


def _config(network: ModelMixin) -> Config:
    own = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return {"_class_name": type(network).__name__, "_diffusers_version": diffusers.__version__, **own}


def _text_config(network: PreTrainedModel) -> Config:
    """CLIP's architecture alone: transformers 4 and 5 differ in everything else that they write."""
    own = {key: getattr(network.config, key) for key in clip_config()}
    return {"model_type": "clip_text_model", "architectures": [type(network).__name__], **own}


def _model_index(networks: Mapping[str, nn.Module], zeros_for_empty_prompt: bool) -> dict[str, Any]:
    libraries = {name: "transformers" if name.startswith("text_encoder") else "diffusers" for name in networks}
    inpaints = _config(networks["unet"])["in_channels"] != LATENT_CHANNELS
    return {
        "_class_name": f"StableDiffusionXL{'Inpaint' if inpaints else ''}Pipeline",
        "_diffusers_version": diffusers.__version__,
        "force_zeros_for_empty_prompt": zeros_for_empty_prompt,
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
