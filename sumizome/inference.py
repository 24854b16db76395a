"""Prompts to pictures, from pure noise: the one path that `sample`, previews and evaluation share.

Requests of one canvas and one way of sampling are drawn together; a picture depends on its own request alone, never on
what it was batched with. Noise comes from a CPU generator by seed, as ComfyUI's and A1111's (RNG: CPU) does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sumizome.diffusion.denoiser import Denoise, Denoiser
from sumizome.diffusion.guidance import GuidanceConfig, build_guided_denoiser
from sumizome.diffusion.samplers import SAMPLERS, SamplerName, SamplerState
from sumizome.diffusion.schedule import build_noise_schedule
from sumizome.diffusion.sigmas import BASE_SIGMA_MAX, Grid, SigmaMax, Sigmas, build_sigmas
from sumizome.errors import ConfigError
from sumizome.models.conditioning import UNetConditioning, apply_unet, canvas_time_ids
from sumizome.models.sdxl import SDXLModel
from sumizome.models.vae import decode_latents, vae_factor
from sumizome.models.weighted_prompts import chunk_weighted, encode_weighted
from sumizome.prompts import PromptSyntax, scheduled
from sumizome.seeds import generator
from sumizome.shapes import Latents, Pixels

__all__ = [
    "Picture",
    "PictureRequest",
    "SamplingConfig",
    "check_canvas",
    "draw_pictures",
    "guided_denoiser",
    "initial_noise",
    "native_canvas",
    "picture_grid",
]

_LATENT_CHANNELS = 4


@dataclass(frozen=True)
class SamplingConfig:
    """How noise becomes a picture."""

    steps: int = 28
    """Network calls, or pairs of them for second-order samplers; 28 is the report's."""
    sampler: SamplerName = "euler"
    """Euler and euler_ancestral are the report's."""
    grid: Grid = "native"
    """Where the steps stand: native = evenly in timestep, the report's."""
    sigma_max: SigmaMax = "pure"
    """Where sampling starts: pure noise, a finite sigma, or one scaled with the canvas."""
    base_sigma_max: float = BASE_SIGMA_MAX
    """For sigma_max "canvas": the sigma of a canvas of 512×512, from which it grows with √area."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)


@dataclass(frozen=True)
class PictureRequest:
    """One picture to draw."""

    prompt: str
    negative_prompt: str = ""
    canvas: tuple[int, int] = (1024, 1024)
    """(height, width) in pixels."""
    seed: int = 0
    """Of its noise; the same seed gives the same picture alone or in a batch."""
    noise_row: int = 0
    """Which picture of a ComfyUI batch it is: all of a batch are drawn from one seed. A1111 counts the seed up."""
    syntax: PromptSyntax = "plain"
    """How weights, breaks and schedules are written in its prompts; plain = not at all."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class Picture:
    """A drawn picture and what was asked for."""

    request: PictureRequest
    image: Image.Image
    batch: tuple[int, int] = (0, 1)
    """Its row, and how many rows were drawn together: what bit-equal repetition needs beside the request."""
    dropped: str = ""
    """The ends of prompt and negative prompt that did not fit into the chunks; "" if all did."""


def native_canvas(model: SDXLModel) -> tuple[int, int]:
    """The (height, width) in pixels that the model was made for: 1024² for SDXL."""
    side = int(model.unet.config["sample_size"]) * vae_factor(model.vae)
    return side, side


def draw_pictures(
    model: SDXLModel,
    requests: Sequence[PictureRequest],
    *,
    batch_size: int = 4,
    max_chunks: int = 3,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Picture]:
    """The requested pictures in order, as they are finished. `on_step(done, total)` counts sampler steps over all.

    Raises: ConfigError for a canvas that the model cannot draw.
    """
    for request in requests:
        check_canvas(model, request.canvas)
    batches = list(_batches(requests, batch_size, max_chunks))
    total = sum(batch[0].sampling.steps for batch in batches)
    done = 0
    for batch in batches:
        for state in _sample(model, batch, max_chunks):
            latents = state.x
            done += 1
            if on_step is not None:
                on_step(done, total)
        for number, (request, row) in enumerate(zip(batch, latents, strict=True)):
            # One at a time: at SDXL's size decoding takes more memory than the U-Net.
            (image,) = _images(decode_latents(model.vae, row[None]))
            dropped = [chunk_weighted(p, request.syntax, max_chunks).dropped for p in _step_prompts(request)[-1]]
            yield Picture(request, image, (number, len(batch)), "; ".join(filter(None, dropped)))


def _batches(requests: Sequence[PictureRequest], batch_size: int, max_chunks: int) -> Iterator[list[PictureRequest]]:
    """Consecutive requests that one batch can hold: equal canvas, sampling and prompt length in chunks.

    A prompt batched with a longer one would be padded with an empty chunk, and be another picture.
    """
    for _, group in groupby(requests, key=lambda r: (r.canvas, r.sampling, r.syntax, _chunks(r, max_chunks))):
        alike = list(group)
        yield from (alike[start : start + batch_size] for start in range(0, len(alike), batch_size))


def _chunks(request: PictureRequest, max_chunks: int) -> tuple[tuple[int, ...], ...]:
    """Chunks of prompt and negative prompt, of each version that schedules make of them."""
    versions = dict.fromkeys(_step_prompts(request))
    counts = [tuple(len(chunk_weighted(p, request.syntax, max_chunks).chunks) for p in pair) for pair in versions]
    return tuple((max(pair),) if request.syntax in ("plain", "novelai") else pair for pair in counts)


def _step_prompts(request: PictureRequest) -> list[tuple[str, str]]:
    """(prompt, negative prompt) of each step."""
    steps = request.sampling.steps
    prompts = (request.prompt, request.negative_prompt)
    return list(zip(*(scheduled(prompt, request.syntax, steps) for prompt in prompts), strict=True))


def _sample(model: SDXLModel, batch: list[PictureRequest], max_chunks: int) -> Iterator[SamplerState]:
    sampling, canvas = batch[0].sampling, batch[0].canvas
    schedule = build_noise_schedule(model.schedule_config)
    shape = (_LATENT_CHANNELS, *(side // vae_factor(model.vae) for side in canvas))
    # What a canvas asks of sigma_max is decided by its latents: the rule's pixels are SDXL's, eight to a latent.
    sdxl_canvas = (8 * shape[1], 8 * shape[2])
    sigmas = build_sigmas(
        sampling.grid, sampling.steps, schedule, sampling.sigma_max, sdxl_canvas, sampling.base_sigma_max
    )
    device = model.unet.device
    x = (
        torch.stack([initial_noise(request.seed, shape, request.noise_row) for request in batch]).to(device)
        * sigmas[0].float()
    )

    def noise(key: int) -> Latents:
        rows = [torch.randn(shape, generator=generator(request.seed, "sampler", key)) for request in batch]
        return torch.stack(rows).to(device)

    return SAMPLERS[sampling.sampler](guided_denoiser(model, batch, max_chunks, sigmas), x, sigmas, noise)


def initial_noise(seed: int, shape: tuple[int, ...], row: int = 0) -> Float[Tensor, "c h w"]:
    """Unit noise [c, h, w] by seed, bit for bit what ComfyUI and A1111 (RNG: CPU) draw for a single picture.

    `row` > 0 is a further picture of a ComfyUI batch, whose noise is one draw [rows, c, h, w].
    """
    return torch.randn((row + 1, *shape), generator=torch.Generator("cpu").manual_seed(seed))[row]


@torch.no_grad()
def guided_denoiser(
    model: SDXLModel, batch: Sequence[PictureRequest], max_chunks: int = 3, sigmas: Sigmas | None = None
) -> Denoise:
    """D(x, sigma) for a batch of requests of one canvas, guided as their (common) sampling says.

    `sigmas`, the grid, says which step a sigma belongs to where prompts change while sampling.
    """
    by_step = list(zip(*(_step_prompts(request) for request in batch), strict=True))
    denoisers = {prompts: _guided(model, batch, prompts, max_chunks) for prompts in dict.fromkeys(by_step)}
    if len(denoisers) == 1 or sigmas is None:
        return denoisers[by_step[0]]
    ends = sigmas[1:].tolist()

    def changing(x: Latents, sigma: float) -> Latents:
        step = sum(end >= sigma for end in ends)
        return denoisers[by_step[step]](x, sigma)

    return changing


def _guided(
    model: SDXLModel, batch: Sequence[PictureRequest], prompts: Sequence[tuple[str, str]], max_chunks: int
) -> Denoise:
    """The denoiser of one version of each request's prompt and negative prompt."""
    syntax = batch[0].syntax
    texts = [prompt for prompt, _ in prompts] + [negative for _, negative in prompts]
    chunked = [chunk_weighted(text, syntax, max_chunks) for text in texts]
    prompt_embeds, pooled = encode_weighted(model.text_encoders, chunked, syntax)
    time_ids = canvas_time_ids(batch[0].canvas, len(texts)).to(prompt_embeds.device)
    both = UNetConditioning(prompt_embeds, pooled, time_ids)
    rows = slice(len(batch))
    return build_guided_denoiser(batch[0].sampling.guidance, _denoiser(model, both.rows(rows)), _denoiser(model, both))


def _denoiser(model: SDXLModel, conditioning: UNetConditioning) -> Denoise:
    @torch.no_grad()
    def predict(noised_latents: Latents, timesteps: Tensor) -> Latents:
        return apply_unet(model.unet, noised_latents, timesteps, conditioning)

    schedule = build_noise_schedule(model.schedule_config)
    return Denoiser(schedule, model.prediction_type, predict, network_dtype=model.unet.dtype)


def check_canvas(model: SDXLModel, canvas: tuple[int, int]) -> None:
    """Raises: ConfigError for a canvas that the model cannot draw."""
    # The U-Net halves the latents at every level but the last; other sides would not come back to their size.
    multiple = vae_factor(model.vae) * 2 ** (len(model.unet.config["block_out_channels"]) - 1)
    if any(side < multiple or side % multiple for side in canvas):
        raise ConfigError(
            f"a canvas of {canvas[0]}×{canvas[1]} (height×width) cannot be drawn: "
            f"both sides must be multiples of {multiple}"
        )


def _images(pixels: Pixels) -> list[Image.Image]:
    array = ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    return [Image.fromarray(row) for row in array]


def picture_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """The pictures side by side, row by row, each centred in a cell of the largest one's size."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * width + (width - image.width) // 2, row * height + (height - image.height) // 2))
    return grid
