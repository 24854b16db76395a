"""Measure models, one or several, and write one JSON and one HTML page.

    sumizome evaluate --model runs/mine --latents latents --out evaluation.html
    sumizome evaluate --model runs/mine base.safetensors --latents latents --out evaluation.html

Colours need nothing but the model. With the data's latents: recall of its tags, distance from it, loss by timestep,
saturation and sharpness by guidance scale. A small network is trained on the data for it, in a minute or so.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sumizome.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from typing import Any

    from PIL import Image

    from sumizome.evaluate.candidates import Candidate
    from sumizome.evaluate.evaluation import Told

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome evaluate` takes."""

    model: tuple[Path, ...]
    """Run directories, checkpoints of runs, diffusers folders, safetensors files."""
    out: Path
    """The .html page; its numbers are written beside it as .json."""
    latents: Path | None = None
    """Folder that `sumizome prepare` wrote; the first model's VAE must have made it."""
    features: Path | None = None
    """Folder of a local vision model (CLIP, DINOv2, …; transformers, safetensors) to measure distances in;
    by default the last layer of the network that is trained on the data."""
    classifier_epochs: int = 12
    """Passes over the data of that network."""
    weights: Literal["ema", "raw"] = "ema"
    """Of run directories: the averaged weights, or the trained ones as they are."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of U-Nets and text encoders."""
    device: str = "auto"
    """"auto" takes a CUDA device when there is one; else cpu, cuda, cuda:1."""
    config: EvaluateConfig = field(default_factory=EvaluateConfig)


def run(command: Command) -> None:
    """Measures, writes page and JSON, prints a line a model."""
    import json

    from rich.console import Console

    from sumizome.evaluate.config import check_config
    from sumizome.evaluate.evaluation_page import evaluation_page
    from sumizome.files import write_atomically
    from sumizome.report.page import check_page_path, write_page

    check_page_path(command.out)
    check_config(command.config)
    with Console(stderr=True).status("loading") as status:
        facts, pictures = _measured(command, status.update)
    text = json.dumps(facts, ensure_ascii=False, indent=1)
    table = command.out.with_suffix(".json")
    write_atomically(table, lambda path: path.write_text(text, encoding="utf-8"))
    write_page(command.out, evaluation_page(facts, pictures))
    for model in facts["models"]:
        print(_in_short(model))
    print(f"wrote {command.out} and {table}")


def _measured(command: Command, told: "Told") -> "tuple[dict[str, Any], list[dict[str, list[Image.Image]]]]":
    """All numbers as the JSON has them, and each model's pictures."""
    from sumizome.evaluate.evaluation import data_facts, evaluate_model, prepare_data
    from sumizome.evaluate.paired import beside_the_first
    from sumizome.settings import as_mapping

    candidates, config = _candidates(command), command.config
    reference = classifier = features = data = None
    if command.latents is not None:
        reference, classifier, features = prepare_data(
            command.latents,
            candidates[0],
            config,
            epochs=command.classifier_epochs,
            features=command.features,
            told=told,
        )
        data = data_facts(reference, classifier, features)
    measured = [evaluate_model(each, config, reference, classifier, features, told) for each in candidates]
    sampling = config.sampling
    facts = {
        "format": 1,
        "sampling": f"{sampling.steps} steps of {sampling.sampler}, guidance {sampling.guidance.guidance_scale:g}",
        "config": as_mapping(config),
        "data": data,
        "models": [model for model, _ in measured],
        "beside_first": beside_the_first([model for model, _ in measured]),
    }
    return facts, [shown for _, shown in measured]


def _candidates(command: Command) -> "list[Candidate]":
    """The models, each with a name of its own."""
    from dataclasses import replace

    import torch

    from sumizome.device import choose_device
    from sumizome.evaluate.candidates import load_candidate, unique_names

    device = choose_device(command.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[command.dtype]
    candidates = [load_candidate(path, command.weights, device=device, dtype=dtype) for path in command.model]
    names = unique_names([candidate.name for candidate in candidates])
    return [replace(each, name=name) for each, name in zip(candidates, names, strict=True)]


def _in_short(model: "dict[str, Any]") -> str:
    """A model's most telling numbers in a line."""
    line = f"{model['name']}: colour error "
    line += ", ".join(f"{row['colour']} {row['error']['value']:.3f}" for row in model["colours"][:3])
    if model.get("tags") and model["tags"]["recall"]:
        tags = model["tags"]
        line += f"; recall {tags['recall']['value']:.1%} (chance {tags['chance']['value']:.1%})"
    if model.get("distance"):
        distance = model["distance"]
        line += f"; Fréchet {distance['frechet']['value']:.2f} (real pictures {distance['real_frechet']:.2f})"
    return line
