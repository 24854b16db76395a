"""A model as one safetensors file in SDXL's original layout: what is read from one, and what marks one.

Owns the inference of configurations from a file's shapes, and the marker tensors and metadata by which programs know
what the U-Net predicts, both ways. Names and tensor layouts are `key_map`'s, the commit is `export`'s.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sumizome.errors import ExportError, ModelError
from sumizome.models.architecture import Config, clip_config, time_id_dim, unet_config, vae_config
from sumizome.models.key_map import NETWORK_PREFIXES, KeyRule, from_original, key_rules, to_original

if TYPE_CHECKING:  # names and shapes are read without torch, whose import takes seconds
    from torch import Tensor, nn

    from sumizome.diffusion.prediction import PredictionType
    from sumizome.diffusion.schedule import ScheduleConfig
    from sumizome.models.tensor_file import TensorFile

__all__ = [
    "SingleFile",
    "infer_configs",
    "open_single_file",
    "prediction_markers",
    "prediction_metadata",
    "prediction_of",
]

Shapes = Mapping[str, tuple[int, ...]]

_OTHER_KINDS = (
    ("cond_stage_model.", "a Stable Diffusion 1 or 2 checkpoint"),
    ("conditioner.embedders.0.model.", "the SDXL refiner"),
    ("lora_", "a LoRA, not a model"),
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 model"),
    ("double_blocks.", "a Flux model"),
    ("model.diffusion_model.double_blocks.", "a Flux model"),
    ("input_blocks.", "a bare U-Net without VAE and text encoders"),
    ("down_blocks.", "one network of a diffusers folder: give the folder that holds model_index.json"),
)


@dataclass(frozen=True)
class SingleFile:
    """An opened file: a source of configurations and tensors for `sdxl.load_model`."""

    path: Path
    file: "TensorFile"
    configs: Mapping[str, Config]

    def config(self, name: str) -> Config:
        """The network's configuration. Raises: ModelError if the file does not hold that network."""
        if name not in self.configs:
            held = ", ".join(self.configs) or "none of SDXL's networks"
            raise ModelError(
                f"{self.path} has no {name} (no {NETWORK_PREFIXES[name]}* tensors), only {held}. Use the full "
                "checkpoint, or a diffusers folder that holds every network."
            )
        return self.configs[name]

    def tensors(self, name: str, network: "nn.Module") -> "Iterator[tuple[str, Tensor]]":
        """The network's tensors by native names, one at a time; foreign ones come last, under their own names."""
        from sumizome.models.networks import native_state

        prefix = NETWORK_PREFIXES[name]
        state = {f"{name}.{key}": tensor for key, tensor in native_state(network).items()}
        remaining = {key for key in self.file.shapes if key.startswith(prefix)}
        for rule in key_rules(name, native_state(network)):
            if rule.original in remaining:
                remaining.remove(rule.original)
                self._check_shape(rule, tuple(to_original(rule, state).shape))
                for native, tensor in from_original(rule, self.file.read(rule.original)).items():
                    yield native.removeprefix(f"{name}."), tensor
        for key in sorted(remaining):
            yield key.removeprefix(prefix), self.file.read(key)

    def _check_shape(self, rule: KeyRule, expected: tuple[int, ...]) -> None:
        found = self.file.shapes[rule.original]
        # Old VAE files hold linear layers where the layout has 1×1 convolutions.
        if found != expected and not (rule.layout == "pointwise" and found == expected[:2]):
            raise ModelError(
                f"{self.path}: {rule.original} has shape {found}, expected {expected}. "
                "It is no SDXL model, or one whose architecture was changed."
            )

    def prediction(self) -> "tuple[PredictionType, ScheduleConfig]":
        """What the file's markers and metadata say."""
        from sumizome.diffusion.schedule import ScheduleConfig

        stated, zero_terminal_snr = prediction_of(self.file.shapes, self.file.metadata)
        return stated, ScheduleConfig(zero_terminal_snr=zero_terminal_snr)


def open_single_file(path: Path) -> SingleFile:
    """The file at `path`. Raises: ModelError if it is damaged or pickled, or a model of another kind."""
    from sumizome.models.tensor_file import open_tensor_file

    file = open_tensor_file(path)
    for prefix, kind in _OTHER_KINDS:
        if any(name.startswith(prefix) for name in file.shapes):
            raise ModelError(f"{path} is not a whole SDXL model but {kind}.")
    try:
        prediction_of(file.shapes, file.metadata)
        return SingleFile(path, file, infer_configs(file.shapes))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


# --- configurations from shapes --------------------------------------------------------------------------------------


def infer_configs(shapes: Shapes) -> dict[str, Config]:
    """The configuration of each network that the file has, read from its tensors' shapes.

    Numbers that shapes do not show follow `architecture`'s rules. That every tensor fits is checked when they
    are loaded.

    Raises: ModelError if the tensors of a network are not those of its architecture.
    """
    configs = {}
    for network, prefix in NETWORK_PREFIXES.items():
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        if not own:
            continue
        try:
            configs[network] = _INFER[network](own)
        except KeyError as error:
            raise ModelError(f"the tensors under {prefix}* are not SDXL's {network}: {error} is missing.") from error
        except (IndexError, ValueError) as error:
            raise ModelError(f"the tensors under {prefix}* are not SDXL's {network}: {error}.") from error
    return configs


def _infer_unet(shapes: Shapes) -> Config:
    blocks = range(_count(shapes, r"input_blocks\.(\d+)\."))
    downsamplings = [block for block in blocks if f"input_blocks.{block}.0.op.weight" in shapes]
    layers = min(downsamplings) - 1
    starts = [1 + level * (layers + 1) for level in range(len(downsamplings) + 1)]
    channels = tuple(shapes[f"input_blocks.{start}.0.out_layers.3.weight"][0] for start in starts)
    depths = tuple(_count(shapes, rf"input_blocks\.{start}\.1\.transformer_blocks\.(\d+)\.") for start in starts)
    features = time_id_dim(max(channels))
    return unet_config(
        block_out_channels=channels,
        transformer_layers=depths,
        layers_per_block=layers,
        cross_attention_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        pooled_dim=shapes["label_emb.0.0.weight"][1] - 6 * features,
    )


def _infer_vae(shapes: Shapes) -> Config:
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    return vae_config(
        block_out_channels=tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)),
        layers_per_block=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        latent_channels=shapes["post_quant_conv.weight"][0],
    )


def _infer_clip(shapes: Shapes) -> Config:
    return clip_config(
        width=shapes["final_layer_norm.weight"][0],
        layers=_count(shapes, r"encoder\.layers\.(\d+)\."),
        intermediate=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        projection_dim=shapes["final_layer_norm.weight"][0],
    )


def _infer_openclip(shapes: Shapes) -> Config:
    return clip_config(
        width=shapes["ln_final.weight"][0],
        layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
        intermediate=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        activation="gelu",
        projection_dim=shapes["text_projection"][1],
    )


_INFER: dict[str, Callable[[Shapes], Config]] = {
    "unet": _infer_unet,
    "vae": _infer_vae,
    "text_encoder": _infer_clip,
    "text_encoder_2": _infer_openclip,
}


def _count(shapes: Shapes, pattern: str) -> int:
    """How many blocks there are; numbers with gaps would let a small file ask for a network of any size."""
    numbers = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"blocks {sorted(numbers)[:9]} are not numbered from 0 on")
    return len(numbers)


# --- what the U-Net was trained to predict ---------------------------------------------------------------------------


def prediction_of(names: Iterable[str], metadata: Mapping[str, str]) -> "tuple[PredictionType, bool]":
    """(prediction type, zero terminal SNR) of an original file: its marker tensors, else its metadata, else SDXL's own.

    `ztsnr` says nothing without `v_pred`, as in ComfyUI. Markers win over metadata because other programs read
    only them.

    Raises: ModelError for the markers of EDM models, whose noise levels are not SDXL's.
    """
    markers = {"v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max"}.intersection(names)
    foreign = {marker for marker in markers if marker.startswith("edm")}
    if foreign:
        raise ModelError(
            f"it is marked as an EDM model ({', '.join(sorted(foreign))}), whose noise levels are not SDXL's."
        )
    if "v_pred" in markers:
        return "v_prediction", "ztsnr" in markers
    stated = metadata.get("modelspec.prediction_type") or metadata.get("prediction_type") or "epsilon"
    if stated in ("v", "v-zsnr", "v_prediction"):
        return "v_prediction", "zsnr" in stated
    return "epsilon", False


def prediction_markers(prediction_type: "PredictionType", schedule_config: "ScheduleConfig") -> "dict[str, Tensor]":
    """The marker tensors of a file with such a U-Net; `prediction_of` reads them back.

    Raises: ExportError for what the layout has no mark for.
    """
    import torch

    from sumizome.diffusion.schedule import COMFYUI_TERMINAL_ALPHA_CUMPROD, ScheduleConfig, build_noise_schedule

    if prediction_type == "sample":
        raise ExportError("the single-file layout has no mark for prediction type sample: export a diffusers folder.")
    if schedule_config.zero_terminal_snr and prediction_type != "v_prediction":
        raise ExportError("the single-file layout marks zero terminal SNR only for v_prediction (ztsnr needs v_pred).")
    if schedule_config != ScheduleConfig(zero_terminal_snr=schedule_config.zero_terminal_snr):
        raise ExportError("the single-file layout cannot hold betas other than SDXL's: export a diffusers folder.")
    markers = {}
    if prediction_type == "v_prediction":
        markers["v_pred"] = torch.tensor([])
    if schedule_config.zero_terminal_snr:
        markers["ztsnr"] = torch.tensor([])
        # stable-diffusion.cpp reads this table instead of the mark; all the others ignore it.
        schedule = build_noise_schedule(schedule_config)
        table = schedule.with_terminal_alpha_cumprod(COMFYUI_TERMINAL_ALPHA_CUMPROD).alphas_cumprod
        markers["alphas_cumprod"] = table.float()
    return markers


def prediction_metadata(prediction_type: "PredictionType", schedule_config: "ScheduleConfig") -> dict[str, str]:
    """The same as metadata: ModelSpec's key, which SwarmUI reads, and the bare one, which qDiffusion reads.

    `v-zsnr` is no value of the specification; given plain "v", SwarmUI switches zero terminal SNR off.
    """
    if prediction_type != "v_prediction":
        return {"modelspec.prediction_type": "epsilon", "prediction_type": "epsilon"}
    stated = "v-zsnr" if schedule_config.zero_terminal_snr else "v"
    return {"modelspec.prediction_type": stated, "prediction_type": "v"}
