"""Draw pictures from prompts, starting at pure noise.

The model is a run directory, a diffusers folder or a single file.

    sumizome sample --model runs/mine --prompt "1girl, red hair, night" --out pictures
    sumizome sample --model model.safetensors --prompts prompts.txt --out pictures

A line of a prompt file may end in `--w 832 --h 1216 --d 7 --s 28 --l 5 --n lowres` (width, height, seed, steps,
guidance scale, negative prompt). Each PNG carries its settings as A1111 writes them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.samplers import SamplerName
from sumizome.diffusion.sigmas import Grid, SigmaMax

if TYPE_CHECKING:
    from sumizome.inference import PictureRequest
    from sumizome.models.sdxl import SDXLModel

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome sample` takes."""

    model: Path
    """Run directory, diffusers folder, or single safetensors file."""
    out: Path
    """Folder for the pictures; those of an earlier call with the same numbers are replaced."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompts: Path | None = None
    """A file with a prompt a line."""
    negative_prompt: str = ""
    """What to steer away from, for prompts that do not bring their own."""
    canvas: tuple[int, int] | None = None
    """Height and width in pixels; by default the model's own, 1024 1024 for SDXL."""
    seed: int = 0
    """Of a prompt's first picture; its further ones, and the next lines of a file, have the next seeds."""
    count: int = 1
    """Pictures a prompt."""
    steps: int = 28
    """Sampling steps; 28 is the report's."""
    sampler: SamplerName = "euler"
    """The report uses euler and euler_ancestral."""
    grid: Grid = "native"
    """Where the steps stand; native = evenly in timestep, the report's."""
    sigma_max: SigmaMax = "pure"
    """Where sampling starts: "pure" noise, a sigma, …"""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    weights: Literal["ema", "raw"] = "ema"
    """Of a run directory: the averaged weights, or the trained ones as they are."""
    batch_size: int = 4
    """Pictures drawn at once; the result does not depend on it."""
    max_chunks: int = 3
    """Longest prompt, in chunks of 75 tokens; what does not fit is reported."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of U-Net and text encoders; the VAE is always float32."""
    device: str = "auto"
    """"auto" takes a CUDA device when there is one; else cpu, cuda, cuda:1."""


def run(command: Command) -> None:
    """Draws the pictures, and one grid of all of them."""
    from rich.console import Console
    from rich.progress import Progress

    from sumizome.errors import ConfigError
    from sumizome.inference import draw_pictures, picture_grid
    from sumizome.png_info import write_png

    if not command.prompt and command.prompts is None:
        raise ConfigError('nothing to draw; give --prompt "…" or --prompts FILE')
    for flag in ("count", "batch_size", "max_chunks"):
        if getattr(command, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(command, flag)}; give 1 or more")
    model, name = _load(command)
    requests = _requests(command, model)
    if not requests:
        raise ConfigError(f"{command.prompts}: no prompt in it, only comments and empty lines")
    images = []
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling", total=None)
        pictures = draw_pictures(
            model,
            requests,
            batch_size=command.batch_size,
            max_chunks=command.max_chunks,
            on_step=lambda done, total: progress.update(task, completed=done, total=total),
        )
        for number, picture in enumerate(pictures):
            path = command.out / f"{number:05d}-seed{picture.request.seed}.png"
            write_png(picture.image, path, picture.request, name, model.schedule_config.zero_terminal_snr)
            images.append(picture.image)
            if picture.dropped:
                print(f"{path}: the prompt is too long for {command.max_chunks} chunks; left out: {picture.dropped!r}")
    grid = command.out / "grid.png"
    picture_grid(images, columns=command.count if command.count > 1 else None).save(grid)
    print(f"{len(images)} pictures in {command.out}, all of them in {grid}")


def _load(command: Command) -> "tuple[SDXLModel, str]":
    """The model on its device, and the name that the pictures' metadata give it."""
    import torch

    from sumizome.device import choose_device
    from sumizome.models.sdxl import load_model
    from sumizome.train.run_dir import is_run_dir, load_trained_model

    device = choose_device(command.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[command.dtype]
    if is_run_dir(command.model):
        model, step = load_trained_model(command.model, command.weights, device=device, dtype=dtype)
        return model, f"{command.model.resolve().name}-step{step}"
    return load_model(command.model, device=device, dtype=dtype), command.model.stem


def _requests(command: Command, model: "SDXLModel") -> "list[PictureRequest]":
    from dataclasses import replace

    from sumizome.inference import PictureRequest, SamplingConfig, native_canvas
    from sumizome.prompt_file import read_prompt_file

    sampling = SamplingConfig(command.steps, command.sampler, command.grid, command.sigma_max, command.guidance)
    canvas = command.canvas or native_canvas(model)
    defaults = PictureRequest("", command.negative_prompt, canvas, command.seed, sampling)
    asked = [replace(defaults, prompt=prompt) for prompt in command.prompt]
    if command.prompts is not None:
        asked += read_prompt_file(command.prompts, defaults)
    return [replace(request, seed=request.seed + index) for request in asked for index in range(command.count)]
