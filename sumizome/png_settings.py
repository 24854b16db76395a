"""The settings inside a picture, as a request that can be drawn again: ours, A1111's, ComfyUI's and NovelAI's.

Only our own repeat bit for bit. Of the others what has no counterpart here is named, never guessed; nothing in a
picture can make a program run or a file be read.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.samplers import SamplerName
from sumizome.diffusion.sigmas import Grid, SigmaMax
from sumizome.errors import ConfigError, DataError
from sumizome.inference import PictureRequest, SamplingConfig
from sumizome.png_info import GRID_LABELS, SAMPLER_LABELS
from sumizome.png_texts import read_png_texts

__all__ = ["FoundSettings", "read_settings"]

_Config = TypeVar("_Config")

_A1111_PAIR = re.compile(r'\s*(\w[\w \-/+]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_A1111_SAMPLERS: dict[str, SamplerName] = {
    **{label: name for name, label in SAMPLER_LABELS.items()},
    "DPM++ 2M SDE Heun": "dpmpp_2m_sde",
}
_A1111_GRIDS: dict[str, Grid] = {
    **{label: name for name, label in GRID_LABELS.items() if name != "trailing"},
    "Normal": "native",
}
_A1111_AUTOMATIC: dict[SamplerName, Grid] = {
    "dpmpp_2m": "karras",
    "dpmpp_sde": "karras",
    "dpmpp_2s_ancestral": "karras",
    "dpm2": "karras",
    "dpm2_ancestral": "karras",
    "dpmpp_2m_sde": "exponential",
    "dpmpp_3m_sde": "exponential",
}
_COMFYUI_SAMPLERS: dict[str, SamplerName] = {
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_ancestral",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "uni_pc_bh2": "unipc",
    **{name: name for name in SAMPLER_LABELS if name not in ("dpm2", "dpm2_ancestral", "unipc")},
}
_COMFYUI_GRIDS: dict[str, Grid] = {
    "normal": "native",
    **{name: name for name in GRID_LABELS if name not in ("native", "trailing", "polyexponential")},
}
_NOVELAI_SAMPLERS: dict[str, SamplerName] = {f"k_{name}": name for name in SAMPLER_LABELS} | {"ddim": "ddim"}


@dataclass(frozen=True)
class FoundSettings:
    """What a picture says of how it was drawn."""

    origin: Literal["sumizome", "a1111", "comfyui", "novelai"]
    request: PictureRequest
    model_name: str = ""
    """As the program that drew it called the model; "" if it does not say."""
    batch: tuple[int, int] = (0, 1)
    """Row and rows of the batch it was drawn in, where that is known."""
    differs: tuple[str, ...] = ()
    """What will be different here: settings without a counterpart."""


def read_settings(path: Path) -> FoundSettings:
    """The settings inside a PNG; our own before A1111's before NovelAI's before ComfyUI's.

    Raises: DataError for a file that is no PNG, holds no settings, or settings that cannot be read.
    """
    texts = read_png_texts(path)
    readers = {"sumizome": _own, "parameters": _a1111, "Comment": _novelai, "prompt": _comfyui}
    for name, read in readers.items():
        if name in texts:
            try:
                return read(texts[name])
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError, ConfigError) as error:
                raise DataError(
                    f"{path}: the settings under '{name}' cannot be read ({error!r}); give the settings as options"
                ) from error
    raise DataError(
        f"{path}: no settings inside (found {', '.join(texts) or 'no text at all'}); programs that resave pictures "
        "drop them: use the file as it was first written"
    )


def _own(text: str) -> FoundSettings:
    mapping = json.loads(text)
    row, rows = mapping.get("batch", (0, 1))
    names = {field.name for field in dataclasses.fields(PictureRequest)}
    request = _built(PictureRequest, {name: value for name, value in mapping.items() if name in names})
    return FoundSettings("sumizome", request, str(mapping.get("model", "")), (int(row), int(rows)))


def _built(config_type: type[_Config], mapping: Mapping[str, Any]) -> _Config:
    """A config from what `settings.as_mapping` made of it."""
    hints = typing.get_type_hints(config_type)
    unknown = mapping.keys() - hints.keys()
    if unknown:
        raise ValueError(f"unknown key {min(unknown)}; a newer version may know it")
    return config_type(**{name: _value(hints[name], value) for name, value in mapping.items()})


def _value(hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _built(hint, value)
    if origin in (typing.Union, UnionType):
        for choice in typing.get_args(hint):
            try:
                return _value(choice, value)
            except (TypeError, ValueError):
                continue
        raise ValueError(f"{value!r} is no {hint}")
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{value!r} is none of {typing.get_args(hint)}")
        return value
    if origin is tuple:
        items = typing.get_args(hint)
        kinds = [items[0]] * len(value) if items[-1] is Ellipsis else list(items)
        return tuple(_value(kind, item) for kind, item in zip(kinds, value, strict=True))
    if hint is type(None):
        if value is not None:
            raise ValueError("not None")
        return None
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint):
        raise ValueError(f"{value!r} is no {hint.__name__}")
    return value


def _a1111(text: str) -> FoundSettings:
    *lines, last = text.strip().split("\n")
    pairs = {name.strip(): _unquoted(value) for name, value in _A1111_PAIR.findall(last)}
    if len(pairs) < 3:
        lines, pairs = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
    if not _ and prompt.startswith("Negative prompt:"):
        prompt, negative = "", prompt.removeprefix("Negative prompt:")
    differs: list[str] = []
    sampler_label = pairs.pop("Sampler", "Euler")
    grid_label = pairs.pop("Schedule type", "Automatic")
    for label in ("Karras", "Exponential", "Polyexponential"):  # before A1111 1.9 the sampler's name ended so
        if sampler_label.endswith(f" {label}"):
            sampler_label, grid_label = sampler_label.removesuffix(f" {label}"), label
    sampler = _known(_A1111_SAMPLERS, sampler_label, "Sampler", "euler", differs)
    automatic = _A1111_AUTOMATIC.get(sampler, "native")
    grid = (
        automatic if grid_label == "Automatic" else _known(_A1111_GRIDS, grid_label, "Schedule type", "native", differs)
    )
    width, _, height = pairs.pop("Size", "1024x1024").partition("x")
    guidance = GuidanceConfig(float(pairs.pop("CFG scale", "7")), float(pairs.pop("Rescale CFG", "0")))
    if pairs.pop("Noise Schedule", "") != "Zero Terminal SNR":
        differs.append("Noise Schedule: drawn without zero terminal SNR")
    if pairs.pop("RNG", "GPU") != "CPU":
        differs.append("RNG: the noise was a GPU's")
    sigma_max: SigmaMax = float(pairs.pop("Schedule max sigma")) if "Schedule max sigma" in pairs else "ui"
    request = PictureRequest(
        prompt.strip(),
        negative.strip(),
        (int(height), int(width)),
        int(pairs.pop("Seed", "0")),
        SamplingConfig(int(pairs.pop("Steps", "20")), sampler, grid, sigma_max, guidance=guidance),
        syntax="a1111",
    )
    model = pairs.pop("Model", "")
    ignored = ("Version", "Model hash", "VAE", "VAE hash")
    differs += [f"{name}: {value}" for name, value in pairs.items() if name not in ignored]
    return FoundSettings("a1111", request, model, differs=tuple(differs))


def _unquoted(value: str) -> str:
    return str(json.loads(value)) if value.startswith('"') else value.strip()


_Name = TypeVar("_Name", bound=str)


def _known(table: Mapping[str, _Name], label: str, what: str, default: _Name, differs: list[str]) -> _Name:
    if label in table:
        return table[label]
    differs.append(f"{what}: {label}, drawn with {default}")
    return default


def _novelai(text: str) -> FoundSettings:
    comment = json.loads(text)
    differs: list[str] = []
    grid_name = comment.get("noise_schedule") or "native"
    guidance = GuidanceConfig(
        float(comment["scale"]),
        float(comment.get("cfg_rescale") or 0),
        float(comment["skip_cfg_above_sigma"]) if comment.get("skip_cfg_above_sigma") else None,
    )
    grids: dict[str, Grid] = {name: name for name in ("native", "karras", "exponential", "polyexponential")}
    sampling = SamplingConfig(
        int(comment["steps"]),
        _known(_NOVELAI_SAMPLERS, comment["sampler"], "sampler", "euler", differs),
        _known(grids, grid_name, "noise_schedule", "native", differs),
        guidance=guidance,
    )
    canvas = int(comment["height"]), int(comment["width"])
    request = PictureRequest(
        str(comment["prompt"]), str(comment.get("uc") or ""), canvas, int(comment["seed"]), sampling, syntax="novelai"
    )
    return FoundSettings("novelai", request, differs=tuple(differs))


def _comfyui(text: str) -> FoundSettings:
    """The first KSampler of an API graph, and what hangs on it."""
    graph: dict[str, Any] = json.loads(text)
    samplers = [node for node in graph.values() if node["class_type"] in ("KSampler", "KSamplerAdvanced")]
    inputs = samplers[0]["inputs"] if samplers else {}
    if not samplers:
        raise ValueError("no KSampler in the graph")
    differs = [f"{len(samplers)} samplers in the graph, the first is read"] if len(samplers) > 1 else []
    latent = _node(graph, inputs["latent_image"])
    if latent["class_type"] != "EmptyLatentImage":
        raise ValueError(f"it starts at a {latent['class_type']}, not at an empty picture")
    model, rescale = inputs["model"], 0.0
    while (node := _node(graph, model))["class_type"] != "CheckpointLoaderSimple":
        if node["class_type"] == "RescaleCFG":
            rescale = float(node["inputs"]["multiplier"])
        else:
            differs.append(f"the model passes a {node['class_type']}")
        if "model" not in node["inputs"]:
            break
        model = node["inputs"]["model"]
    grid = _known(_COMFYUI_GRIDS, inputs["scheduler"], "scheduler", "native", differs)
    if grid in ("karras", "exponential"):
        differs.append(f"scheduler: {grid} here takes one step from pure noise, ComfyUI's takes many")
    guidance = GuidanceConfig(float(inputs["cfg"]), rescale)
    sampling = SamplingConfig(
        int(inputs["steps"]),
        _known(_COMFYUI_SAMPLERS, inputs["sampler_name"], "sampler_name", "euler", differs),
        grid,
        "ui",
        guidance=guidance,
    )
    canvas = int(latent["inputs"]["height"]), int(latent["inputs"]["width"])
    request = PictureRequest(
        _comfyui_text(graph, inputs["positive"]),
        _comfyui_text(graph, inputs["negative"]),
        canvas,
        int(inputs["seed"] if "seed" in inputs else inputs["noise_seed"]),
        sampling,
        syntax="comfyui",
    )
    if int(latent["inputs"].get("batch_size", 1)) > 1:
        differs.append("one of a batch: its row is not in the file, give --noise-row")
    name = str(_node(graph, model)["inputs"].get("ckpt_name", ""))
    return FoundSettings("comfyui", replace(request), name.rpartition(".")[0] or name, differs=tuple(differs))


def _node(graph: Mapping[str, Any], link: Any) -> Mapping[str, Any]:
    node: Mapping[str, Any] = graph[str(link[0])]
    return node


def _comfyui_text(graph: Mapping[str, Any], link: Any, depth: int = 20) -> str:
    """The text behind a conditioning, through the nodes that pass it on."""
    node = _node(graph, link)
    for name in ("text", "string", "value", "text_g", "conditioning"):
        if name in node["inputs"]:
            value = node["inputs"][name]
            if isinstance(value, str):
                return value
            if depth > 0:
                return _comfyui_text(graph, value, depth - 1)
    raise ValueError(f"no text behind a {node['class_type']}")
