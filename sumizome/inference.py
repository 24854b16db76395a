"""Prompts to pictures, from pure noise: the one path that `sample`, previews and evaluation share.

Requests of one canvas and one way of sampling are drawn together; a picture depends on its own request alone, never on
what it was batched with. Noise comes from a CPU generator by seed, as ComfyUI's and A1111's (RNG: CPU) does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sumizome.diffusion.denoiser import Denoise, Denoiser
from sumizome.diffusion.guidance import GuidedDenoiser, build_guided_denoiser
from sumizome.diffusion.samplers import SAMPLERS, SamplerState
from sumizome.diffusion.schedule import build_noise_schedule
from sumizome.diffusion.sigmas import Sigmas, build_sigmas, scaled_sigma_max
from sumizome.errors import ConfigError
from sumizome.models.architecture import latent_canvas
from sumizome.models.conditioning import UNetConditioning, apply_unet, canvas_time_ids
from sumizome.models.expected import check_time_features
from sumizome.models.sdxl import SDXLModel
from sumizome.models.tiled_decode import decode_in_tiles
from sumizome.models.vae import vae_factor
from sumizome.models.weighted_prompts import chunk_weighted, encode_weighted
from sumizome.picture_request import Picture, PictureRequest, RedrawConfig, SamplingConfig, SecondPassConfig
from sumizome.prompts import scheduled
from sumizome.redraw import Start, enlarge, keep_known, keep_outside_mask, load_start
from sumizome.seeds import generator
from sumizome.shapes import Latents, Pixels

__all__ = [
    "Picture",
    "PictureRequest",
    "RedrawConfig",
    "SamplingConfig",
    "SecondPassConfig",
    "check_canvas",
    "draw_pictures",
    "final_canvas",
    "guided_denoiser",
    "initial_noise",
    "native_canvas",
    "picture_grid",
    "without_autograd",
]

_LATENT_CHANNELS = 4


def native_canvas(model: SDXLModel) -> tuple[int, int]:
    """The (height, width) in pixels that the model was made for: 1024² for SDXL.

    Raises: ModelError if its U-Net's configuration says what is no canvas.
    """
    height, width = latent_canvas(dict(model.unet.config))
    factor = vae_factor(model.vae)
    return height * factor, width * factor


def draw_pictures(
    model: SDXLModel,
    requests: Sequence[PictureRequest],
    *,
    batch_size: int = 4,
    max_chunks: int = 3,
    decode_tile: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Picture]:
    """The requested pictures in order, as they are finished. `on_step(done, total)` counts sampler steps over all.

    `decode_tile`: side in pixels of the tiles that the VAE decodes at a time; 0 = whole pictures.
    Raises: ConfigError for a canvas that the model cannot draw; ModelError for networks that do not fit together.
    """
    projecting: Any = model.text_encoders[1].config
    check_time_features(dict(model.unet.config), projecting.projection_dim)
    for request in requests:
        for canvas in (request.canvas, final_canvas(request)):
            check_canvas(model.unet, vae_factor(model.vae), canvas)
    batches = list(_batches(requests, batch_size, max_chunks))
    total = sum(len(sigmas) - 1 for batch in batches for sigmas in _grids(model, batch[0]))
    done = 0
    for batch in batches:
        with without_autograd():  # closed before the caller is yielded to
            for state in _drawn(model, batch, max_chunks):
                latents = state.x
                done += 1
                if on_step is not None:
                    on_step(done, total)
        for number, (request, row) in enumerate(zip(batch, latents, strict=True)):
            # One at a time: at SDXL's size decoding takes more memory than the U-Net.
            (image,) = _images(decode_in_tiles(model.vae, row[None], decode_tile))
            dropped = [chunk_weighted(p, request.syntax, max_chunks).dropped for p in _step_prompts(request)[-1]]
            image = keep_outside_mask(image, request.redraw)
            yield Picture(request, image, (number, len(batch)), "; ".join(filter(None, dropped)))


def without_autograd() -> AbstractContextManager[object]:
    """What sampling runs in: inference mode, which keeps no books of views and versions and is 6 % faster than
    `no_grad` on small canvases. Not among several ranks: a sharded network gathers weights within a call, and those
    must be fit for training afterwards.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.no_grad() if several else torch.inference_mode()


def _batches(requests: Sequence[PictureRequest], batch_size: int, max_chunks: int) -> Iterator[list[PictureRequest]]:
    """Consecutive requests that one batch can hold: equal canvas, sampling and prompt length in chunks.

    A prompt batched with a longer one would be padded with an empty chunk, and be another picture.
    """
    for _, group in groupby(requests, key=lambda request: _alike(request, max_chunks)):
        alike = list(group)
        yield from (alike[start : start + batch_size] for start in range(0, len(alike), batch_size))


def _alike(request: PictureRequest, max_chunks: int) -> tuple[object, ...]:
    """What requests of one batch have in common."""
    chunks = _chunks(request, max_chunks)
    return request.canvas, request.sampling, request.syntax, request.redraw, request.second_pass, chunks


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


def _grids(model: SDXLModel, request: PictureRequest) -> list[Sigmas]:
    """The sigmas of the pass, or of both."""
    sampling, second = request.sampling, request.second_pass
    schedule = build_noise_schedule(model.schedule_config)
    # What a canvas asks of sigma_max is decided by its latents: the rule's pixels are SDXL's, eight to a latent.
    height, width = (8 * side for side in _latent_shape(model, request.canvas)[1:])
    first = build_sigmas(
        sampling.grid, sampling.steps, schedule, sampling.sigma_max, (height, width), sampling.base_sigma_max
    )
    if request.redraw.image is not None:
        first = first[-max(1, int(request.redraw.strength * sampling.steps)) - 1 :]
    if second.scale == 1:
        return [first]
    start = scaled_sigma_max(second.detail_sigma, final_canvas(request), request.canvas)
    return [first, build_sigmas(sampling.grid, second.steps, schedule, start)]


def final_canvas(request: PictureRequest) -> tuple[int, int]:
    """The (height, width) of the finished picture."""
    height, width = (round(side * request.second_pass.scale) for side in request.canvas)
    return height, width


def _drawn(model: SDXLModel, batch: list[PictureRequest], max_chunks: int) -> Iterator[SamplerState]:
    """States of the pass or of both; the last one's x is the result."""
    first, *others = _grids(model, batch[0])
    shape = _latent_shape(model, batch[0].canvas)
    noise = torch.stack([initial_noise(request.seed, shape, request.noise_row) for request in batch])
    start = load_start(model.vae, batch[0].redraw, batch[0].canvas)
    mask = None if start is None else start.mask
    state = None
    for state in _sample(model, batch, max_chunks, first, noise, start):
        yield state
    for sigmas in others:
        assert state is not None
        sampling = replace(batch[0].sampling, steps=len(sigmas) - 1)
        larger = [replace(request, canvas=final_canvas(request), sampling=sampling) for request in batch]
        shape = _latent_shape(model, larger[0].canvas)
        known = enlarge(state.x, shape[1:])
        mask = None if mask is None else enlarge(mask, shape[1:])
        noise = torch.stack([_later_noise(request, shape, "second pass") for request in larger])
        yield from _sample(model, larger, max_chunks, sigmas, noise, Start(known, mask))


def _sample(
    model: SDXLModel,
    batch: list[PictureRequest],
    max_chunks: int,
    sigmas: Sigmas,
    unit_noise: Latents,
    start: Start | None,
) -> Iterator[SamplerState]:
    """One pass: from noise, or from `start` with noise upon it."""
    device = model.device
    x = unit_noise.to(device) * sigmas[0].float()
    denoise = guided_denoiser(model, batch, max_chunks, sigmas)
    if start is not None:
        x = x + start.latents.to(device)
        denoise = keep_known(denoise, start)
    shape = tuple(unit_noise.shape[1:])

    def noise(key: int) -> Latents:
        return torch.stack([_later_noise(request, shape, "sampler", key) for request in batch]).to(device)

    return SAMPLERS[batch[0].sampling.sampler](denoise, x, sigmas, noise)


def _latent_shape(model: SDXLModel, canvas: tuple[int, int]) -> tuple[int, int, int]:
    factor = vae_factor(model.vae)
    return _LATENT_CHANNELS, canvas[0] // factor, canvas[1] // factor


def initial_noise(seed: int, shape: tuple[int, ...], row: int = 0) -> Float[Tensor, "c h w"]:
    """Unit noise [c, h, w] by seed, bit for bit what ComfyUI and A1111 (RNG: CPU) draw for a single picture.

    `row` > 0 is a further picture of a ComfyUI batch, whose noise is one draw [rows, c, h, w].
    """
    return torch.randn((row + 1, *shape), generator=torch.Generator("cpu").manual_seed(seed))[row]


def _later_noise(request: PictureRequest, shape: tuple[int, ...], *purpose: int | str) -> Float[Tensor, "c h w"]:
    """Unit noise that comes after the first: a picture's own, also where a whole batch has one seed.

    From pure noise the first step of a stochastic sampler forgets what it started from: there this is what tells the
    pictures of a batch apart.
    """
    row = ("row", request.noise_row) if request.noise_row else ()
    return torch.randn(shape, generator=generator(request.seed, *purpose, *row))


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
    ends: list[float] = sigmas[1:].tolist()
    # A grid that was cut at its beginning makes the last steps.
    versions = [denoisers[prompts] for prompts in by_step[-len(ends) :]]

    def version(sigma: float) -> GuidedDenoiser:
        return versions[sum(end >= sigma for end in ends)]

    return GuidedDenoiser(
        batch[0].sampling.guidance,
        lambda x, sigma: version(sigma).conditional(x, sigma),
        lambda x, sigma: version(sigma).paired(x, sigma),
    )


def _guided(
    model: SDXLModel, batch: Sequence[PictureRequest], prompts: Sequence[tuple[str, str]], max_chunks: int
) -> GuidedDenoiser:
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
    def predict(noised_latents: Latents, timesteps: Tensor) -> Latents:
        # Asked first, because switching off what is off costs as much as a few of the sampler's own operations.
        if torch.is_grad_enabled():
            with torch.no_grad():
                return apply_unet(model.unet, noised_latents, timesteps, conditioning)
        return apply_unet(model.unet, noised_latents, timesteps, conditioning)

    schedule = build_noise_schedule(model.schedule_config)
    return Denoiser(schedule, model.prediction_type, predict, network_dtype=model.unet.dtype)


def check_canvas(unet: UNet2DConditionModel, factor: int, canvas: tuple[int, int]) -> None:
    """`factor` [px]: of the VAE. Raises: ConfigError for a canvas that these cannot draw."""
    # The U-Net halves the latents at every level but the last; other sides would not come back to their size.
    multiple = factor * 2 ** (len(unet.config["block_out_channels"]) - 1)
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
