"""Draw one labelled picture of two settings against each other, and a table of its numbers.

    sumizome grid --model runs/mine --prompt "1girl" --rows cfg 1 3.5 5 7.5 --columns rescale 0 0.7 --out g.png
    sumizome grid --model runs/mine --rows sigma_max 14.6 29 pure --columns canvas 1024x1024 2048x2048 --out g.png
    sumizome grid --rows model runs/mine/checkpoints/step-00000450 runs/mine --columns prompt "1girl" "sky" --out g.png

An axis is a setting and its values: sigma_max, steps, sampler, grid, cfg, rescale, skip_above_sigma, canvas, seed,
prompt, negative_prompt, model. Beside g.png stand g.csv and g.json: brightness, saturation, sharpness of each picture.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.samplers import SamplerName
from sumizome.diffusion.sigmas import Grid, SigmaMax

if TYPE_CHECKING:
    from typing import Any

    from sumizome.evaluate.candidates import Candidate
    from sumizome.evaluate.grid import Axis
    from sumizome.inference import PictureRequest

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome grid` takes."""

    out: Path
    """The .png file; its table is written beside it."""
    rows: tuple[str, ...]
    """A setting and its values, such as: cfg 1 3.5 5."""
    columns: tuple[str, ...]
    """Another setting and its values."""
    model: Path | None = None
    """Run directory, one of its checkpoints, diffusers folder, or safetensors file; not with an axis "model"."""
    prompt: str = ""
    """Of all pictures; not with an axis "prompt"."""
    negative_prompt: str = ""
    """What to steer away from."""
    canvas: tuple[int, int] | None = None
    """Height and width in pixels; by default the model's own."""
    seed: int = 0
    """Of the first picture of each cell."""
    count: int = 1
    """Pictures a cell, of seeds one after the other."""
    steps: int = 28
    """Sampling steps."""
    sampler: SamplerName = "euler"
    """The report uses euler and euler_ancestral."""
    grid: Grid = "native"
    """Where the steps stand."""
    sigma_max: SigmaMax = "pure"
    """Where sampling starts: "pure" noise, a sigma, …"""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    weights: Literal["ema", "raw"] = "ema"
    """Of a run directory: the averaged weights, or the trained ones as they are."""
    batch_size: int = 4
    """Pictures drawn at once."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of U-Net and text encoders."""
    device: str = "auto"
    """"auto" takes a CUDA device when there is one; else cpu, cuda, cuda:1."""


def run(command: Command) -> None:
    """Draws the grid, writes picture and table."""
    from rich.console import Console
    from rich.progress import Progress

    from sumizome.errors import ConfigError
    from sumizome.evaluate.grid import draw_grid, grid_picture, parse_axis, table_rows
    from sumizome.files import write_atomically

    rows, columns = parse_axis(command.rows, "--rows"), parse_axis(command.columns, "--columns")
    if command.out.suffix.lower() != ".png":
        raise ConfigError(f"--out: expected the path of a .png file, found {command.out}")
    if min(command.count, command.batch_size) < 1:
        raise ConfigError(f"--count and --batch-size must be 1 or more, found {command.count} and {command.batch_size}")
    candidates, rows, columns = _models(command, rows, columns)
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("drawing", total=None)
        cells = draw_grid(
            candidates,
            _request(command),
            rows,
            columns,
            count=command.count,
            batch_size=command.batch_size,
            on_step=lambda done, total: progress.update(task, completed=done, total=total),
        )
    title = " · ".join(filter(None, [" and ".join(dict.fromkeys(cell.model for cell in cells)), command.prompt]))
    picture = grid_picture(cells, rows, columns, title)
    write_atomically(command.out, lambda path: picture.save(path, format="PNG"))
    _write_table(command.out, table_rows(cells, rows, columns))
    table = command.out.with_suffix(".csv")
    print(f"{len(rows.labels)} × {len(columns.labels)} cells in {command.out}; its table: {table} and .json")


def _models(command: Command, rows: "Axis", columns: "Axis") -> "tuple[list[Candidate], Axis, Axis]":
    """The model of all cells, or those of an axis, which then has their names."""
    from dataclasses import replace

    import torch

    from sumizome.device import choose_device
    from sumizome.errors import ConfigError
    from sumizome.evaluate.candidates import load_candidate, unique_names
    from sumizome.evaluate.grid import MODEL_AXIS

    of_models = [axis for axis in (rows, columns) if axis.setting == MODEL_AXIS]
    if bool(of_models) == (command.model is not None):
        raise ConfigError("give either --model or an axis of models (--rows model A B)")
    paths = of_models[0].values if of_models else (command.model,)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[command.dtype]
    device = choose_device(command.device)
    candidates = [load_candidate(path, command.weights, device=device, dtype=dtype) for path in paths]
    if of_models:
        names = tuple(unique_names([each.name for each in candidates]))
        rows, columns = (replace(axis, labels=names) if axis in of_models else axis for axis in (rows, columns))
    return candidates, rows, columns


def _request(command: Command) -> "PictureRequest":
    """What all cells have in common."""
    from sumizome.inference import PictureRequest, SamplingConfig

    return PictureRequest(
        command.prompt,
        negative_prompt=command.negative_prompt,
        canvas=command.canvas or (0, 0),
        seed=command.seed,
        sampling=SamplingConfig(
            steps=command.steps,
            sampler=command.sampler,
            grid=command.grid,
            sigma_max=command.sigma_max,
            guidance=command.guidance,
        ),
    )


def _write_table(out: Path, lines: "list[dict[str, Any]]") -> None:
    """The grid's numbers beside its picture, as .csv and .json."""
    import csv
    import json

    from sumizome.files import write_atomically

    def write_csv(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)

    write_atomically(out.with_suffix(".csv"), write_csv)
    text = json.dumps(lines, ensure_ascii=False, indent=1)
    write_atomically(out.with_suffix(".json"), lambda path: path.write_text(text, encoding="utf-8"))
