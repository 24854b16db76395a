"""The report's figures on a model of one's own: each a picture, or a plot, with a number under it.

Owns what each figure shows and how its number is taken; layout is `labelled`'s, the page `figures_page`'s. Figures of
pictures share their seeds between what is compared, so that the start of sampling is all that differs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.samplers import SAMPLERS
from sumizome.diffusion.schedule import ScheduleConfig, build_noise_schedule, signal_and_noise_rates
from sumizome.diffusion.sigmas import BASE_SIGMA_MAX, SigmaMax, build_sigmas
from sumizome.evaluate.config import FigureConfig
from sumizome.evaluate.labelled import labelled_grid
from sumizome.evaluate.scores import bootstrap, brightness
from sumizome.inference import (
    PictureRequest,
    SamplingConfig,
    draw_pictures,
    guided_denoiser,
    initial_noise,
    native_canvas,
)
from sumizome.models.architecture import latent_canvas
from sumizome.models.sdxl import SDXLModel
from sumizome.models.vae import decode_latents, encode_pixels, latent_statistics, normalise, vae_factor
from sumizome.seeds import generator
from sumizome.shapes import Latents

__all__ = [
    "NOISED_SIGMAS",
    "SKIPPED_START",
    "Figure",
    "finite_start",
    "intermediate_predictions",
    "matched_sigma",
    "noised_picture",
    "opposing_colours",
    "sigma_sequences",
    "surviving_mean_error",
    "two_canvases",
]

NOISED_SIGMAS = (0.0, 0.447, 3.17, 14.6, float("inf"))
"""The report's figure 1, and pure noise."""

SKIPPED_START = 56.178239
"""The second sigma of the report's 28 steps: where its ablation of the terminal step starts."""

_SDXL_LATENT_SIDE = 128
_CHANNELS = 4


@dataclass(frozen=True)
class Figure:
    """One figure: its picture (None where it is a plot), what it shows, and its numbers."""

    key: str
    title: str
    says: str
    """What the report says it shows."""
    number: str
    """The number under it, as a sentence."""
    values: dict[str, Any]
    image: Image.Image | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def _sampling(config: FigureConfig, sigma_max: SigmaMax, steps: int | None = None) -> SamplingConfig:
    guidance = GuidanceConfig(guidance_scale=config.guidance_scale)
    return SamplingConfig(steps=steps or config.steps, sigma_max=sigma_max, guidance=guidance)


def _draw(model: SDXLModel, base: PictureRequest, seeds: int) -> list[Image.Image]:
    return [p.image for p in draw_pictures(model, [replace(base, seed=seed) for seed in range(seeds)], batch_size=8)]


def _pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def _images(model: SDXLModel, latents: Latents) -> list[Image.Image]:
    pixels = ((decode_latents(model.vae, latents).permute(0, 2, 3, 1) + 1) * 127.5).round()
    return [Image.fromarray(row) for row in pixels.clamp(0, 255).to("cpu", torch.uint8).numpy()]


# --- 1: what noise leaves ---------------------------------------------------------------------------------------------


def noised_picture(model: SDXLModel, picture: Image.Image, *, draws: int = 16) -> Figure:
    """Figure 1: a picture under noise, and the flat colour that its latents' mean still tells.

    The picture is brought to 128 × 128 latents, SDXL's: on fewer, the same sigma hides more (report §2.3).
    """
    side = _SDXL_LATENT_SIDE * vae_factor(model.vae)
    array = np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float32)
    pixels = torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    latents = normalise(encode_pixels(model.vae, pixels), latent_statistics(model.vae)).cpu()
    noise = initial_noise(0, tuple(latents.shape[1:]))[None]
    noised, means = [], []
    for sigma in NOISED_SIGMAS:
        alpha = torch.tensor([1 / (1 + sigma**2)], dtype=torch.float64)
        signal, strength = signal_and_noise_rates(alpha, latents)
        noised.append(signal * latents + strength * noise)
        # At infinity no signal is left to scale the mean by: that of the noise itself is shown.
        x = latents + sigma * noise if np.isfinite(sigma) else noise
        means.append(x.mean(dim=(2, 3), keepdim=True).expand(-1, -1, 16, 16))
    rows = [[_images(model, row)[0].resize((192, 192)) for row in noised]]
    rows.append([_images(model, row)[0].resize((192, 192)) for row in means])
    errors = {f"{sigma:g}": surviving_mean_error(latents, sigma, draws) for sigma in NOISED_SIGMAS if sigma < 1e9}
    labels = [f"σ = {sigma:g}" if np.isfinite(sigma) else "σ = ∞" for sigma in NOISED_SIGMAS]
    return Figure(
        "1",
        "A noised picture, and the mean that survives",
        "Noise up to σ = 14.6, where SDXL's own schedule ends, leaves the mean colour of a picture readable (report "
        "§2.2, figure 1). Training never shows the network an input without it, but sampling starts from one.",
        f"At σ = 14.6 the mean of the noised latents misses the picture's own by {errors['14.6']:.3f} of a latent's "
        f"deviation (expected: 14.6/128 = {14.6 / 128:.3f}); at σ = ∞ nothing of it is left.",
        {"surviving_mean_error": errors, "latent_side": _SDXL_LATENT_SIDE, "draws": draws},
        labelled_grid(rows, ["noised", "its mean, as a colour"], labels, least_side=160),
    )


def surviving_mean_error(latents: Latents, sigma: float, draws: int = 16) -> float:
    """Root mean square, over channels and draws of noise, of mean(latents + σ·noise) − mean(latents).

    Of n latents it is σ/√n on average.
    """
    shape = tuple(latents.shape)
    noises = [torch.randn(shape, generator=generator("figure 1", draw)) for draw in range(draws)]
    misses = torch.stack([(sigma * noise).mean(dim=(2, 3)) for noise in noises])
    return float(misses.square().mean().sqrt())


# --- 2, 3, 4: the terminal step ---------------------------------------------------------------------------------------


def matched_sigma(model: SDXLModel, sigma: float) -> float:
    """The sigma that leaves as much of a flat colour on the model's own canvas as `sigma` does on SDXL's.

    The mean over n × n latents has noise sigma / n, so this is sigma·n/128: `sigma` itself for SDXL. Of another
    shape, n is the root of their number. Source: report §2.3.
    """
    height, width = latent_canvas(dict(model.unet.config))
    return sigma * math.sqrt(height * width) / _SDXL_LATENT_SIDE


def _sigma_words(model: SDXLModel, sigma: float) -> str:
    matched = matched_sigma(model, sigma)
    words = f"σ = {matched:.3g}"
    return words if matched == sigma else f"{words} ({sigma:.3g} on 128 × 128 latents)"


def finite_start(model: SDXLModel, config: FigureConfig) -> Figure:
    """Figure 2: black from pure noise, and from what σ = 14.6 is on this canvas."""
    base = PictureRequest(config.black_prompt, canvas=native_canvas(model))
    finite_name = _sigma_words(model, BASE_SIGMA_MAX)
    starts: dict[str, SigmaMax] = {"pure noise": "pure", finite_name: matched_sigma(model, BASE_SIGMA_MAX)}
    rows = [_draw(model, replace(base, sampling=_sampling(config, start)), config.seeds) for start in starts.values()]
    pure, finite = (bootstrap(brightness(_pixels(row))) for row in rows)
    return Figure(
        "2",
        f"“{config.black_prompt}” from pure noise and from a finite start",
        "From pure noise black is black; started at a finite σ with noise of mean 0, the picture has medium brightness "
        "(report §2.2, figure 2).",
        f"Mean brightness (0 = black, 1 = white): {pure.value:.3f} ({pure.low:.3f} to {pure.high:.3f}) from pure "
        f"noise, {finite.value:.3f} ({finite.low:.3f} to {finite.high:.3f}) from {finite_name}; {config.seeds} seeds.",
        {
            "pure": vars(pure),
            "finite": vars(finite),
            "finite_sigma": matched_sigma(model, BASE_SIGMA_MAX),
            "prompt": config.black_prompt,
        },
        labelled_grid(rows, list(starts), [f"seed {seed}" for seed in range(config.seeds)], least_side=128),
    )


def opposing_colours(model: SDXLModel, config: FigureConfig) -> Figure:
    """Figure 3: large areas of opposing colours, with the terminal step and without."""
    finite_name = _sigma_words(model, BASE_SIGMA_MAX)
    starts: dict[str, SigmaMax] = {"pure noise": "pure", finite_name: matched_sigma(model, BASE_SIGMA_MAX)}
    rows, labels = [], []
    found: dict[str, list[Float[np.ndarray, " n"]]] = {name: [] for name in starts}
    for prompt in config.opposing_prompts:
        for name, start in starts.items():
            base = PictureRequest(prompt, canvas=native_canvas(model), sampling=_sampling(config, start))
            row = _draw(model, base, config.seeds)
            rows.append(row)
            labels.append(f"{prompt}: {name}")
            found[name].append(brightness(_pixels(row)))
    pure, finite = (bootstrap(bright - dark) for bright, dark in found.values())
    values = [
        {"prompt": prompt, "pure": vars(bootstrap(of_pure)), "finite": vars(bootstrap(of_finite))}
        for prompt, of_pure, of_finite in zip(config.opposing_prompts, *found.values(), strict=True)
    ]
    return Figure(
        "3",
        "Opposing colours with and without the terminal step",
        "Without the terminal step the mean of the canvas is held near that of noise, so a dark part is bought with a "
        "bright one (report §2.2, figure 3).",
        f"The bright canvas is {pure.value:.3f} brighter than the dark one ({pure.low:.3f} to {pure.high:.3f}) from "
        f"pure noise, {finite.value:.3f} ({finite.low:.3f} to {finite.high:.3f}) from {finite_name}; 0 = both the same "
        f"grey, {config.seeds} seeds.",
        {"prompts": values, "pure": vars(pure), "finite": vars(finite)},
        labelled_grid(rows, labels, [f"seed {seed}" for seed in range(config.seeds)], least_side=128),
    )


@torch.no_grad()
def intermediate_predictions(model: SDXLModel, config: FigureConfig, *, shown: int = 7) -> Figure:
    """Figure 4: what the network takes the picture for at each sigma, with the terminal step and with it skipped.

    The same unit noise and the same grid: the second row leaves out the first step and starts at its second sigma. On
    a canvas smaller than SDXL's, as many steps are left out as bring the start to what that sigma is there.
    """
    schedule = build_noise_schedule(model.schedule_config)
    canvas = native_canvas(model)
    noise = initial_noise(0, (_CHANNELS, *(side // vae_factor(model.vae) for side in canvas)))[None]
    request = PictureRequest(config.black_prompt, canvas=canvas, sampling=_sampling(config, "pure"))
    denoise = guided_denoiser(model, [request])
    sigmas = build_sigmas("native", config.steps, schedule)
    places = sorted({1, 2, *np.linspace(1, config.steps - 1, shown - 1).round().astype(int).tolist()})[: shown - 1]
    levels = sigmas[1 : config.steps - 1].tolist()
    skipped = 1 + sum(level > 1.001 * matched_sigma(model, SKIPPED_START) for level in levels)
    rows, curves = [], []
    for skip in (0, skipped):
        grid = sigmas[skip:]
        x = noise.to(model.device) * grid[0].float()
        states = list(SAMPLERS["euler"](denoise, x, grid, _no_noise))
        predicted = {state.step + skip: _images(model, state.denoised)[0] for state in states}
        rows.append([predicted[place] if place in predicted else _blank(canvas) for place in (0, *places)])
        means = brightness(_pixels([predicted[step] for step in sorted(predicted)]))
        curves.append([(float(sigmas[step]), float(mean)) for step, mean in zip(sorted(predicted), means, strict=True)])
    first, without = curves[0][0][1], curves[1][0][1]
    labels = ["pure noise", *(f"σ = {float(sigmas[place]):.4g}" for place in places)]
    return Figure(
        "4",
        "Intermediate predictions by sigma",
        "With the terminal step the first prediction has the picture's mean already; without it, an SDXL takes the "
        "noise's for the picture's, and keeps it (report §2.2, figure 4).",
        f"“{config.black_prompt}”: the first prediction has brightness {first:.3f} at pure noise, {without:.3f} where "
        f"sampling starts at σ = {float(sigmas[skipped]):.2f}; at the end {curves[0][-1][1]:.3f} and "
        f"{curves[1][-1][1]:.3f}." + ("" if without > first + 0.05 else " This model asks the prompt there, too."),
        {"with_terminal_step": curves[0], "without": curves[1], "prompt": config.black_prompt},
        labelled_grid(rows, ["with the terminal step", "without it"], labels, least_side=128),
        {"curves": curves},
    )


def _no_noise(key: int) -> Latents:
    raise AssertionError("Euler's sampler asks for no noise")


def _blank(canvas: tuple[int, int]) -> Image.Image:
    """Nothing was predicted here: crossed out, or it would look like a picture."""
    image = Image.new("RGB", (canvas[1], canvas[0]), (236, 234, 230))
    for start, end in (((0, 0), (canvas[1], canvas[0])), ((0, canvas[0]), (canvas[1], 0))):
        ImageDraw.Draw(image).line([start, end], fill=(190, 186, 180))
    return image


# --- 5, 6, 7: high noise for large canvases ---------------------------------------------------------------------------


def sigma_sequences(steps: int = 28, starts: Sequence[float] = (14.6, 29.0)) -> dict[str, list[float]]:
    """The first five sigmas of the native grid of so many steps on the rescaled table, from each start.

    The report's are 14.6, 10.7, 8.3, 6.6, 5.4 and 29.0, 17.8, 12.4, 9.2, 7.2. Source: report §2.3.
    """
    schedule = build_noise_schedule(ScheduleConfig())
    return {f"{start:g}": build_sigmas("native", steps, schedule, start)[:5].tolist() for start in starts}


def two_canvases(model: SDXLModel, config: FigureConfig) -> Figure:
    """Figures 5 to 7: a canvas of double length from what σ = 14.6 and 29 are to it, and from pure noise."""
    height, width = native_canvas(model)
    at = {_sigma_words(model, sigma): matched_sigma(model, sigma) for sigma in (14.6, 29.0)}
    own = dict(zip(at, sigma_sequences(config.steps, list(at.values())).values(), strict=True))
    starts: dict[str, SigmaMax] = {**at, "pure noise": "pure"}
    base = PictureRequest(config.large_prompt, canvas=(2 * height, 2 * width))
    rows = [_draw(model, replace(base, sampling=_sampling(config, start)), config.seeds) for start in starts.values()]
    labels = [name + (": " + " → ".join(f"{s:.3g}" for s in own[name]) if name in own else "") for name in starts]
    last = _pixels(rows[-1]).astype(np.float64)
    away = {
        name: vars(bootstrap(np.sqrt(np.square(_pixels(row) - last).mean(axis=(1, 2, 3)))))
        for name, row in zip(starts, rows, strict=True)
    }
    told = "; ".join(f"{name}: {value['value']:.1f}" for name, value in away.items() if name != "pure noise")
    return Figure(
        "5-7",
        f"A canvas of {2 * height} × {2 * width} from two finite starts and from pure noise",
        "A canvas of double length needs double the noise for the same signal-to-noise ratio: 14.6 loses the "
        "coherence of large parts, 29 mends it, and a schedule that reaches pure noise suffices for any canvas "
        "(report §2.3, figures 5 to 7).",
        f"Distance from the picture of pure noise and the same seed, root mean square in levels of 255: {told}.",
        {
            "sigmas": sigma_sequences(config.steps),
            "of_rows": own,
            "away_from_pure": away,
            "prompt": config.large_prompt,
        },
        labelled_grid(rows, labels, [f"seed {seed}" for seed in range(config.seeds)], least_side=160),
    )
