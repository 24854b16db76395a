"""Draw pictures from prompts, starting at pure noise; repeat or edit those that others drew.

The model is a run directory, a diffusers folder or a single file.

    sumizome sample --model runs/mine --prompt "1girl, red hair, night" --out pictures
    sumizome sample --model model.safetensors --prompts prompts.txt --out pictures
    sumizome sample --model runs/mine --from picture.png --out again
    sumizome sample --model runs/mine --from picture.png --seed 7 --steps 40 --out edited

A line of a prompt file may end in `--w 832 --h 1216 --d 7 --s 28 --l 5 --n lowres` (width, height, seed, steps,
guidance scale, negative prompt). Each PNG carries its settings as A1111 writes them, and as JSON. `--from` reads the
settings of pictures by this program, A1111, ComfyUI and NovelAI; options given beside it win.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sumizome.cli.quick_imports import quick_imports
from sumizome.diffusion.samplers import SamplerName
from sumizome.diffusion.sigmas import Grid, SigmaMax
from sumizome.prompts import PromptSyntax

if TYPE_CHECKING:
    from typing import Any

    from sumizome.inference import PictureRequest
    from sumizome.models.sdxl import SDXLModel
    from sumizome.png_settings import FoundSettings

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class GuidanceOptions:
    """How strongly, and where along the trajectory, the prompt is enforced."""

    guidance_scale: float | None = None
    """5 by default, 1 = off. The report finds 3.5 to 5 right for zero terminal SNR, where older models need 7.5."""
    guidance_rescale: float | None = None
    """φ in 0 … 1, against burnt contrast: how far the guided velocity's spread is brought back to the conditional's.
    0 = off by default, the report's setting; other programs use 0.7 for such models."""
    skip_above_sigma: float | None = None
    """Above this sigma only the prompt is used, unguided: more varied compositions; 19 is usual. Never by default."""
    scale_by_sigma: tuple[float, ...] | None = None
    """Other scales below given sigmas, as pairs SIGMA SCALE: `20 5 1 3` is 5 below sigma 20 and 3 below sigma 1."""


@dataclass(frozen=True)
class RedrawOptions:
    """A picture to begin with, instead of noise alone."""

    image: Path | None = None
    """The picture; it is resized to the canvas."""
    strength: float | None = None
    """Share of the steps that are made, their last ones; 0.75 by default."""
    mask: Path | None = None
    """White where the picture is drawn anew, black where it stays."""


@dataclass(frozen=True)
class SecondPassOptions:
    """A larger canvas, drawn over the enlarged result of the first."""

    scale: float | None = None
    """Of both sides; 1, no second pass, by default."""
    steps: int | None = None
    """Sampling steps of the second pass; 14 by default."""
    detail_sigma: float | None = None
    """Detail below this noise level of the first canvas is drawn anew; 0.7 by default. The second pass starts at
    detail_sigma·√(area/first area)."""


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
    from_image: Annotated[Path | None, tyro.conf.arg(aliases=["--from"])] = None
    """A PNG whose settings are taken; with no other option it is drawn again, bit for bit if it is ours."""
    negative_prompt: str | None = None
    """What to steer away from, for prompts that do not bring their own."""
    syntax: PromptSyntax | None = None
    """How weights, breaks and schedules are written: plain (not at all, the default), a1111, comfyui, novelai."""
    canvas: tuple[int, int] | None = None
    """Height and width in pixels; by default the model's own, 1024 1024 for SDXL."""
    seed: int | None = None
    """Of a prompt's first picture, 0 by default; its further ones, and a file's next lines, have the next seeds."""
    count: int = 1
    """Pictures a prompt."""
    count_seeds: Literal["a1111", "comfyui"] = "a1111"
    """Noise of further pictures: a1111 counts the seed up; comfyui draws all from the first seed, as its batches do."""
    noise_row: int | None = None
    """Which picture of a ComfyUI batch the first one is; 0 by default."""
    steps: int | None = None
    """Sampling steps; 28, the report's, by default."""
    sampler: SamplerName | None = None
    """The report uses euler, the default, and euler_ancestral."""
    grid: Grid | None = None
    """Where the steps stand; native by default: evenly in timestep, the report's."""
    sigma_max: SigmaMax | None = None
    """Where sampling starts: "pure" noise by default; a sigma; "ui", the 4518.76 of ComfyUI and A1111; "canvas"."""
    base_sigma_max: float | None = None
    """For --sigma-max canvas: the sigma of 512×512 pixels, 14.6146 by default, from which it grows with √area."""
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)
    redraw: RedrawOptions = field(default_factory=RedrawOptions)
    second_pass: SecondPassOptions = field(default_factory=SecondPassOptions)
    weights: Literal["ema", "raw"] = "ema"
    """Of a run directory: the averaged weights, or the trained ones as they are."""
    batch_size: int = 4
    """Pictures drawn at once; the result depends on it by rounding alone."""
    max_chunks: int = 3
    """Longest prompt, in chunks of 75 tokens; what does not fit is reported."""
    decode_tile: int = 0
    """Side in pixels of the tiles that the VAE decodes at a time, where memory is short; 0 = whole pictures."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of U-Net and text encoders; the VAE is always float32."""
    device: str = "auto"
    """"auto" takes a CUDA device when there is one; else cpu, cuda, cuda:1."""


_OF_REQUEST = ("negative_prompt", "syntax", "canvas", "seed", "noise_row")
_OF_SAMPLING = ("steps", "sampler", "grid", "sigma_max", "base_sigma_max")


def run(command: Command) -> None:
    """Draws the pictures, and one grid of all of them."""
    from rich.console import Console
    from rich.progress import Progress

    with quick_imports():
        from sumizome.inference import draw_pictures, picture_grid
        from sumizome.png_info import write_png

    _check(command)
    found = _found(command)
    model, name = _load(command)
    requests = _requests(command, model, found)
    repeated = found is not None and found.origin == "sumizome" and requests == [found.request]
    row, rows = found.batch if found is not None and repeated else (0, 1)
    images = []
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling", total=None)
        pictures = draw_pictures(
            model,
            requests * rows,
            # A row of a batch is repeated in its place among as many rows, for the last bit.
            batch_size=rows if repeated else command.batch_size,
            max_chunks=command.max_chunks,
            decode_tile=command.decode_tile,
            on_step=lambda done, total: progress.update(task, completed=done, total=total),
        )
        kept = [picture for number, picture in enumerate(pictures) if number == row] if repeated else pictures
        for number, picture in enumerate(kept):
            path = command.out / f"{number:05d}-seed{picture.request.seed}.png"
            drawn = {"batch": list(picture.batch), "dtype": command.dtype, "device": str(model.device)}
            zero_snr = model.schedule_config.zero_terminal_snr
            write_png(picture.image, path, picture.request, name, zero_snr, drawn)
            images.append(picture.image)
            if picture.dropped:
                print(f"{path}: the prompt is too long for {command.max_chunks} chunks; left out: {picture.dropped!r}")
    grid = command.out / "grid.png"
    picture_grid(images, columns=command.count if command.count > 1 else None).save(grid)
    one = len(images) == 1
    print(f"1 picture in {command.out}" if one else f"{len(images)} pictures in {command.out}, all of them in {grid}")


def _check(command: Command) -> None:
    from sumizome.errors import ConfigError

    if not command.prompt and command.prompts is None and command.from_image is None:
        raise ConfigError('nothing to draw; give --prompt "…", --prompts FILE or --from PICTURE')
    for flag in ("count", "batch_size", "max_chunks"):
        if getattr(command, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(command, flag)}; give 1 or more")


def _found(command: Command) -> "FoundSettings | None":
    """The settings of `--from`; what will differ is said."""
    from sumizome.errors import ConfigError
    from sumizome.png_settings import read_settings

    if command.from_image is None:
        return None
    found = read_settings(command.from_image)
    used = found.request.redraw
    if used.image is not None and command.redraw.image is None:
        # A picture's settings come from anywhere and never decide which files are read.
        raise ConfigError(f"{command.from_image}: drawn over {used.image}; give --redraw.image (and its mask) yourself")
    model = f", model {found.model_name}" if found.model_name else ""
    print(f"{command.from_image}: settings by {found.origin}{model}")
    for difference in found.differs:
        print(f"  not as there · {difference}")
    return found


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


def _requests(command: Command, model: "SDXLModel", found: "FoundSettings | None") -> "list[PictureRequest]":
    """Every picture to draw: the found settings, or the defaults, with the command's own upon them."""
    from dataclasses import replace

    from sumizome.errors import ConfigError
    from sumizome.inference import PictureRequest, native_canvas
    from sumizome.prompt_file import read_prompt_file

    base = found.request if found is not None else PictureRequest("", canvas=native_canvas(model))
    sampling = replace(
        base.sampling, **_given(command, _OF_SAMPLING), guidance=_edited(base.sampling.guidance, command.guidance)
    )
    defaults = replace(
        base,
        **_given(command, _OF_REQUEST),
        sampling=sampling,
        redraw=_edited(base.redraw, command.redraw),
        second_pass=_edited(base.second_pass, command.second_pass),
    )
    asked = [replace(defaults, prompt=prompt) for prompt in command.prompt]
    if command.prompts is not None:
        asked += read_prompt_file(command.prompts, defaults)
        if not asked:
            raise ConfigError(f"{command.prompts}: no prompt in it, only comments and empty lines")
    return [_further(command, request, index) for request in asked or [defaults] for index in range(command.count)]


def _given(command: object, names: tuple[str, ...]) -> "dict[str, Any]":
    return {name: getattr(command, name) for name in names if getattr(command, name) is not None}


def _edited(config: "Any", options: object) -> "Any":
    """`config` with the options that were given."""
    from dataclasses import replace

    return replace(config, **_given(options, tuple(vars(options))))


def _further(command: Command, request: "PictureRequest", index: int) -> "PictureRequest":
    """The picture `index` places behind `request`, whose noise is the next one."""
    from dataclasses import replace

    if command.count_seeds == "comfyui":
        return replace(request, noise_row=request.noise_row + index)
    return replace(request, seed=request.seed + index)
