"""Settings of a network that the shapes of its tensors do not show: how a single file says them. No torch.

Owns which they are, what every reader assumes of them, and the metadata that says where a model differs. Only we read
that; a diffusers folder says all of them in its config.json files. How latents are scaled is none of them: it is folded
into the VAE, or refused, because no other program would draw rightly.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sumizome.errors import ModelError
from sumizome.models.architecture import MOST_LATENT_SIDE, Config, latent_canvas
from sumizome.models.expected import expected_original
from sumizome.models.infer_config import file_config

__all__ = [
    "PIPELINE_OF_ZEROS",
    "SETTINGS_KEY",
    "Settings",
    "drawing_settings",
    "drawing_words",
    "says_zeros",
    "settings_metadata",
    "settings_words",
    "stated_settings",
    "unseen_settings",
]

Settings = Mapping[str, Config]
"""By network; under "pipeline", what model_index.json says of the whole."""

SETTINGS_KEY = "sumizome.settings"
_PIPELINE, _ZEROS = "pipeline", "force_zeros_for_empty_prompt"
PIPELINE_OF_ZEROS: Settings = {_PIPELINE: {_ZEROS: True}}
"""Of a model for which diffusers gives the U-Net zeros where there is no negative prompt."""

_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12}
_ASSUMED: dict[str, Config] = {
    "unet": {
        "sample_size": 128,
        "attention_head_dim": (5, 10, 20),
        "norm_num_groups": 32,
        "addition_time_embed_dim": 256,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "timestep_post_act": None,
        "time_embedding_act_fn": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1.0,
        "resnet_out_scale_factor": 1.0,
        "center_input_sample": False,
        "upcast_attention": False,
    },
    "vae": {"norm_num_groups": 32, "act_fn": "silu", "force_upcast": True},
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
    _PIPELINE: {_ZEROS: False},
}
"""Each setting and SDXL's value, where `infer_config` does not give that by a rule of its own."""
_DRAWS_THE_SAME = ("sample_size", "upcast_attention", "force_upcast")
"""A default canvas, and precision."""
_MOST = 4096
_RANGES: dict[str, tuple[float, float]] = {
    "sample_size": (1, MOST_LATENT_SIDE),
    "addition_time_embed_dim": (4, _MOST),
    "freq_shift": (0, 1),
    "downsample_padding": (0, 1),
    "norm_eps": (1e-15, 1),
    "layer_norm_eps": (1e-15, 1),
    "mid_block_scale_factor": (1e-3, 1e3),
    "resnet_out_scale_factor": (1e-3, 1e3),
}
"""Of numbers in a file that anybody may have written: with others a network draws nothing, or not-a-numbers. Numbers
that are not here, of heads and groups, are 1 to `_MOST`."""
_DIFFUSERS_FUNCTIONS = frozenset({"gelu", "mish", "relu", "silu", "swish"})
_CLIP_FUNCTIONS = _DIFFUSERS_FUNCTIONS | {
    *("gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh"),
    *("hardswish", "laplace", "leaky_relu", "linear", "quick_gelu", "relu2", "relu6", "sigmoid", "sqrtsoftplus"),
    "tanh",
}
"""What transformers knows, but for functions with weights of their own, which no layout has a place for."""
_FUNCTIONS = {
    "act_fn": _DIFFUSERS_FUNCTIONS,
    "timestep_post_act": _DIFFUSERS_FUNCTIONS,
    "time_embedding_act_fn": _DIFFUSERS_FUNCTIONS,
    "hidden_act": _CLIP_FUNCTIONS,
}
_SWISH = "swish"
"""silu by its other name."""


def unseen_settings(name: str, config: Config) -> Config:
    """Those of a network's settings that a reader of its shapes alone would get wrong; mostly none.

    `config` is the built network's: what a config.json leaves out is the library's default, not SDXL's value.
    Raises: ModelError for a value that no file can say.
    """
    assumed = _ASSUMED[name] | file_config(name, expected_original(name, config))
    told = {key: _plain(key, config.get(key), config) for key in _ASSUMED[name]}
    other = {key: value for key, value in told.items() if value not in (None, _plain(key, assumed[key], config))}
    for key, value in other.items():
        if not _fits(name, key, value):
            raise ModelError(
                f"the configuration of {name} sets {key} to {str(value)[:40]!r}, which no single file can say: correct "
                "its config.json, or write a diffusers folder."
            )
    return other


def drawing_settings(settings: Config) -> Config:
    """Of a network's `unseen_settings`, those without which other pictures are drawn."""
    return {key: value for key, value in settings.items() if key not in _DRAWS_THE_SAME}


def _plain(key: str, value: Any, config: Config) -> Any:
    """A value as JSON gives it back, the same for the same meaning: one number of heads stands for every level."""
    if key == "sample_size":
        height, width = latent_canvas(config | {key: value})
        return height if height == width else [height, width]
    if key in _FUNCTIONS and isinstance(value, str):
        return _function(value)
    if key == "attention_head_dim" and isinstance(value, int):
        return [value] * len(config["block_out_channels"])
    return list(value) if isinstance(value, tuple) else value


def _function(name: str) -> str:
    return "silu" if name.lower() == _SWISH else name.lower()


def says_zeros(settings: Settings) -> bool:
    """Whether these are settings with `PIPELINE_OF_ZEROS`."""
    return bool(settings.get(_PIPELINE, {}).get(_ZEROS, False))


def settings_metadata(settings: Settings) -> dict[str, str]:
    """The metadata of a file with such networks; empty where nothing needs to be said."""
    told = {name: dict(sorted(own.items())) for name, own in settings.items() if own}
    return {SETTINGS_KEY: json.dumps(told)} if told else {}


def stated_settings(metadata: Mapping[str, str]) -> dict[str, Config]:
    """What a file's metadata says, checked; the inverse of `settings_metadata`.

    Raises: ModelError if it is malformed, or says what is not known here.
    """
    try:
        found = json.loads(metadata.get(SETTINGS_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"its metadata {SETTINGS_KEY} is no JSON: damaged. Use another copy of the model.") from error
    if not isinstance(found, dict) or not all(isinstance(own, dict) for own in found.values()):
        raise ModelError(f"its metadata {SETTINGS_KEY} is no table of settings by network. Use another copy.")
    for name, own in found.items():
        for key, value in own.items():
            if not _fits(name, key, value):
                raise ModelError(
                    f"its metadata {SETTINGS_KEY} sets {f'{name}.{key}'[:80]!r} to {str(value)[:40]!r}, which "
                    "is not known here. Use a newer Sumizome, or the model as a diffusers folder."
                )
    return {name: {key: value for key, value in own.items() if not _is_own(key, value)} for name, own in found.items()}


def _is_own(key: str, value: Any) -> bool:
    """Whether this is SDXL's own function by another name, which no reader draws otherwise with."""
    return key == "act_fn" and _function(value) == "silu"


def _fits(name: str, key: str, value: Any) -> bool:
    """Whether this can be a network's setting, as JSON gives it."""
    if key not in _ASSUMED.get(name, {}):
        return False
    if key in _FUNCTIONS:
        return isinstance(value, str) and value in _FUNCTIONS[key]
    assumed = _ASSUMED[name][key]
    if isinstance(assumed, bool):
        return isinstance(value, bool)
    least, most = _RANGES.get(key, (1, _MOST))
    kinds = (int, float) if isinstance(assumed, float) else (int,)
    numbers = value if isinstance(value, list) else [value]
    if isinstance(value, list):
        lengths = range(1, 11) if isinstance(assumed, tuple) else (2,) if key == "sample_size" else ()
    else:
        lengths = () if isinstance(assumed, tuple) else (1,)
    return len(numbers) in lengths and all(type(one) in kinds and least <= one <= most for one in numbers)


def settings_words(settings: Settings) -> Iterator[str]:
    """What other programs will make of a file with these settings, a phrase each.

    Nothing of the pipeline: what stands for an empty negative prompt each program decides for itself, of any file.
    """
    yield from drawing_words(settings)
    others = _told(settings, lambda key: key in _DRAWS_THE_SAME)
    if others:
        yield f"{others}: {_READ_BY} choose precision and canvas themselves"


def drawing_words(settings: Settings) -> Iterator[str]:
    """The same, of settings without which other pictures are drawn."""
    drawing = _told(settings, lambda key: key not in _DRAWS_THE_SAME)
    if drawing:
        yield (
            f"{drawing}: {_READ_BY} take SDXL's own and will draw something else: give them a diffusers folder "
            "(mend --out FOLDER)"
        )


_READ_BY = "said in metadata that Sumizome alone reads; other programs"


def _told(settings: Settings, wanted: Callable[[str], bool]) -> str:
    return ", ".join(
        f"{name} {key} {value if isinstance(value, str) else json.dumps(value)}"
        for name, own in settings.items()
        for key, value in own.items()
        if name != _PIPELINE and wanted(key)
    )
