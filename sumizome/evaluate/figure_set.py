"""Which figures are drawn of a model, and why others are not. Owns the choice alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.images import open_image
from sumizome.data.latents import LatentCache, open_latents
from sumizome.errors import ConfigError, DataError, ShardError
from sumizome.evaluate.candidates import Candidate
from sumizome.evaluate.config import FigureConfig
from sumizome.evaluate.data_figures import crops, latent_histograms
from sumizome.evaluate.figures import (
    Figure,
    finite_start,
    intermediate_predictions,
    noised_picture,
    opposing_colours,
    two_canvases,
)
from sumizome.evaluate.reference import decode_rows, fits

__all__ = ["FIGURES", "draw_figures"]

FIGURES = ("1", "2", "3", "4", "5-7", "8", "B")

_CONSIDERED = 16
_NO_LATENTS = "it shows the data; give --latents"
_NO_TERMINAL_STEP = "the model's schedule has no terminal step; `sumizome inspect` shows it"


def draw_figures(
    candidate: Candidate,
    config: FigureConfig,
    wanted: Sequence[str],
    *,
    latents: Path | None,
    picture: Path | None,
    told: Callable[[str], None],
) -> tuple[list[Figure], dict[str, str]]:
    """The wanted figures, all if none are named, and why some were left out.

    Raises: ConfigError where a figure that was asked for by name cannot be drawn; ShardError for another VAE's latents.
    """
    model = candidate.model
    cache = open_latents(latents) if latents is not None else None
    if cache is not None and not fits(cache, model.vae):
        raise ShardError(f"{latents} was made with another VAE than that of {candidate.path}; give this model's")
    terminal = model.schedule_config.zero_terminal_snr

    drawings: dict[str, tuple[Callable[[], Figure], str]] = {
        "1": (
            lambda: noised_picture(model, _picture(candidate, cache, picture)),
            "" if picture or cache else "it needs a picture; give --picture or --latents",
        ),
        "2": (lambda: finite_start(model, config), "" if terminal else _NO_TERMINAL_STEP),
        "3": (lambda: opposing_colours(model, config), "" if terminal else _NO_TERMINAL_STEP),
        "4": (lambda: intermediate_predictions(model, config), "" if terminal else _NO_TERMINAL_STEP),
        "5-7": (lambda: two_canvases(model, config), "" if terminal else _NO_TERMINAL_STEP),
        "8": (lambda: crops(_given(cache), model.vae), "" if cache else _NO_LATENTS),
        "B": (lambda: latent_histograms(_given(cache)), "" if cache else _NO_LATENTS),
    }
    figures, left_out = [], {}
    for key, (draw, reason) in drawings.items():
        if wanted and key not in wanted:
            continue
        if reason and wanted:
            raise ConfigError(f"--figures {key}: {reason}")
        if reason:
            left_out[key] = reason
            continue
        told(f"figure {key}")
        figures.append(draw())
    return figures, left_out


def _given(cache: LatentCache | None) -> LatentCache:
    assert cache is not None  # only asked for where it is
    return cache


def _picture(candidate: Candidate, cache: LatentCache | None, path: Path | None) -> Image.Image:
    """The picture of figure 1: the user's, or of the pictures with the least hashes the one with the most contrast.

    A flat one would show nothing of what noise hides.
    """
    if path is not None:
        try:
            return open_image(path)
        except ImageRejected as error:
            raise DataError(f"{path}: cannot be shown: {error}") from error
    pictures = _given(cache).index.pictures()
    first = np.argsort(_given(cache).index.picture_hash[pictures], kind="stable")[:_CONSIDERED]
    arrays = decode_rows(_given(cache), candidate.model.vae, pictures[first])
    return Image.fromarray(max(arrays, key=lambda array: float(array.std()))[0])
