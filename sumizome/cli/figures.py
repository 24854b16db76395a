"""Draw the report's figures on your own model, each with a number under it, and one page of them all.

    sumizome figures --model runs/mine --latents latents --out figures

1 a noised picture and its surviving mean · 2 black from pure noise and from a finite start · 3 opposing colours without
the terminal step · 4 intermediate predictions · 5-7 sigma_max 14.6 and 29 on a canvas of double length · 8 square crops
and buckets · B latents before and after normalising. 8 and B, and 1 without --picture, need --latents.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from sumizome.evaluate.config import FigureConfig

__all__ = ["Command", "run"]

Key = Literal["1", "2", "3", "4", "5-7", "8", "B"]


@dataclass(frozen=True)
class Command:
    """What `sumizome figures` takes."""

    model: Path
    """Run directory, one of its checkpoints, diffusers folder, or safetensors file."""
    out: Path
    """Folder for the pictures, index.html and figures.json."""
    latents: Path | None = None
    """Folder that `sumizome prepare` wrote with this model's VAE."""
    picture: Path | None = None
    """The picture of figure 1; by default one of the data."""
    figures: tuple[Key, ...] = ()
    """Which; by default all that can be drawn."""
    weights: Literal["ema", "raw"] = "ema"
    """Of a run directory: the averaged weights, or the trained ones as they are."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of U-Net and text encoders."""
    device: str = "auto"
    """"auto" takes a CUDA device when there is one; else cpu, cuda, cuda:1."""
    config: FigureConfig = field(default_factory=FigureConfig)


def run(command: Command) -> None:
    """Draws the figures, writes pictures, page and numbers, and prints each number."""
    import json

    import torch
    from rich.console import Console

    from sumizome.device import choose_device
    from sumizome.errors import ConfigError
    from sumizome.evaluate.candidates import load_candidate
    from sumizome.evaluate.figure_set import draw_figures
    from sumizome.evaluate.figures_page import figures_page
    from sumizome.files import write_atomically
    from sumizome.report.page import check_page_path, write_page

    if command.config.seeds < 2 or command.config.steps < 5:
        raise ConfigError("--config.seeds must be 2 or more, --config.steps 5 or more")
    page = command.out / "index.html"
    check_page_path(page)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[command.dtype]
    with Console(stderr=True).status("loading") as status:
        candidate = load_candidate(command.model, command.weights, device=choose_device(command.device), dtype=dtype)
        figures, left_out = draw_figures(
            candidate,
            command.config,
            command.figures,
            latents=command.latents,
            picture=command.picture,
            told=status.update,
        )
    for figure in figures:
        image = figure.image
        if image is not None:
            path = command.out / f"figure-{figure.key}.png"
            write_atomically(path, partial(image.save, format="PNG"))
    facts = {
        "model": candidate.name,
        "figures": {f.key: {"title": f.title, "number": f.number, "values": f.values} for f in figures},
        "left_out": left_out,
    }
    text = json.dumps(facts, ensure_ascii=False, indent=1)
    write_atomically(command.out / "figures.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_page(page, figures_page(figures, candidate.name))
    for figure in figures:
        print(f"{figure.key}: {figure.number}")
    for key, reason in left_out.items():
        print(f"{key}: left out: {reason}")
    print(f"wrote {page}, figures.json and {sum(f.image is not None for f in figures)} pictures")
