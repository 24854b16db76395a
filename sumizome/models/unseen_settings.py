"""Settings of a network that the shapes of its tensors do not show: how a single file says them. No torch.

Owns which they are, what every reader assumes of them, and the metadata that says where a model differs. Only we read
that; a diffusers folder says all of them in its config.json files. How latents are scaled is none of them: it is folded
into the VAE, or refused, because no other program would draw rightly.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sumizome.errors import ModelError
from sumizome.models.architecture import Config
from sumizome.models.expected import expected_original
from sumizome.models.infer_config import file_config

__all__ = [
    "PIPELINE_OF_ZEROS",
    "SETTINGS_KEY",
    "Settings",
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
"""Of a number in a file that anybody may have written."""
_NAME = re.compile(r"\w{1,40}", re.ASCII)
"""Of a function; it is printed."""


def unseen_settings(name: str, config: Config) -> Config:
    """Those of a network's settings that a reader of its shapes alone would get wrong; mostly none.

    `config` is the built network's: what a config.json leaves out is the library's default, not SDXL's value.
    """
    assumed = _ASSUMED[name] | file_config(name, expected_original(name, config))
    told = {key: _plain(key, config.get(key), config) for key in _ASSUMED[name]}
    return {key: value for key, value in told.items() if value not in (None, _plain(key, assumed[key], config))}


def _plain(key: str, value: Any, config: Config) -> Any:
    """A value as JSON gives it back; one number of heads stands for every level."""
    if key == "attention_head_dim" and isinstance(value, int):
        return [value] * len(config["block_out_channels"])
    return list(value) if isinstance(value, tuple) else value


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
            if not _fits(value, _ASSUMED.get(name, {}).get(key)):
                raise ModelError(
                    f"its metadata {SETTINGS_KEY} sets {f'{name}.{key}'[:80]!r} to {str(value)[:40]!r}, which "
                    "is not known here. Use a newer Sumizome, or the model as a diffusers folder."
                )
    return found


def _fits(value: Any, assumed: Any) -> bool:
    if isinstance(assumed, str):
        return isinstance(value, str) and bool(_NAME.fullmatch(value))
    if isinstance(assumed, bool):
        return isinstance(value, bool)
    if isinstance(assumed, tuple):
        return isinstance(value, list) and 0 < len(value) <= 10 and all(_fits(one, assumed[0]) for one in value)
    numbers = (int, float) if isinstance(assumed, float) else (int,)
    return assumed is not None and type(value) in numbers and 0 <= value <= _MOST


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
