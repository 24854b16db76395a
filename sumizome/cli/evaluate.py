"""Measure models, one or several, and write one JSON and one HTML page.

    sumizome evaluate --model runs/mine --latents latents --out evaluation.html
    sumizome evaluate --model runs/mine base.safetensors --latents latents --out evaluation.html

Colours need nothing but the model. With the data's latents: recall of its tags, distance from it, loss by timestep,
saturation and sharpness by guidance scale. A small network is trained on the data for it, in a minute or so.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sumizome.evaluate.config import EvaluateConfig

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
    from dataclasses import replace

    import torch
    from rich.console import Console

    from sumizome.device import choose_device
    from sumizome.evaluate.candidates import load_candidate, unique_names
    from sumizome.evaluate.config import check_config
    from sumizome.evaluate.evaluation import data_facts, evaluate_model, prepare_data
    from sumizome.evaluate.evaluation_page import evaluation_page
    from sumizome.files import write_atomically
    from sumizome.report.page import check_page_path, write_page
    from sumizome.settings import as_mapping

    check_page_path(command.out)
    check_config(command.config)
    device = choose_device(command.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[command.dtype]
    with Console(stderr=True).status("loading") as status:
        candidates = [load_candidate(path, command.weights, device=device, dtype=dtype) for path in command.model]
        names = unique_names([candidate.name for candidate in candidates])
        candidates = [replace(each, name=name) for each, name in zip(candidates, names, strict=True)]
        reference = classifier = features = data = None
        if command.latents is not None:
            reference, classifier, features = prepare_data(
                command.latents,
                candidates[0],
                command.config,
                epochs=command.classifier_epochs,
                features=command.features,
                told=status.update,
            )
            data = data_facts(reference, classifier, features)
        measured = [
            evaluate_model(each, command.config, reference, classifier, features, status.update) for each in candidates
        ]
    config = command.config
    facts = {
        "format": 1,
        "sampling": f"{config.steps} steps of {config.sampler}, guidance {config.guidance.guidance_scale:g}",
        "config": as_mapping(command.config),
        "data": data,
        "models": [model for model, _ in measured],
    }
    text = json.dumps(facts, ensure_ascii=False, indent=1)
    table = command.out.with_suffix(".json")
    write_atomically(table, lambda path: path.write_text(text, encoding="utf-8"))
    write_page(command.out, evaluation_page(facts, [shown for _, shown in measured]))
    for model, _ in measured:
        parts = [f"{row['colour']} {row['error']['value']:.3f}" for row in model["colours"][:3]]
        line = f"{model['name']}: colour error {', '.join(parts)}"
        if model.get("tags") and model["tags"]["recall"]:
            tags = model["tags"]
            line += f"; recall {tags['recall']['value']:.1%} (chance {tags['chance']['value']:.1%})"
        if model.get("distance"):
            distance = model["distance"]
            line += f"; Fréchet {distance['frechet']['value']:.2f} (real pictures {distance['real_frechet']:.2f})"
        print(line)
    print(f"wrote {command.out} and {table}")
