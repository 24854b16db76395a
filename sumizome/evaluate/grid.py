"""Two settings against each other: one labelled picture of all their values, and the table of its numbers.

Owns what an axis is and how its values are read; drawing is `inference`'s. The invariant: cells differ in the two
settings alone: prompt, seeds and all else are the same in each.
"""

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sumizome.diffusion.samplers import SamplerName
from sumizome.diffusion.sigmas import Grid
from sumizome.errors import ConfigError
from sumizome.evaluate.candidates import Candidate
from sumizome.evaluate.labelled import labelled_grid
from sumizome.evaluate.scores import brightness, saturation, sharpness
from sumizome.inference import PictureRequest, draw_pictures, native_canvas, picture_grid

__all__ = ["MODEL_AXIS", "SETTINGS", "Axis", "Cell", "draw_grid", "grid_picture", "parse_axis", "table_rows"]

MODEL_AXIS = "model"

Apply = Callable[[PictureRequest, Any], PictureRequest]


@dataclass(frozen=True)
class Axis:
    """A setting, its values as they were given, and as settings take them."""

    setting: str
    labels: tuple[str, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Cell:
    """One place of the grid: what was drawn there, one picture a seed."""

    row: str
    column: str
    model: str
    requests: tuple[PictureRequest, ...]
    images: tuple[Image.Image, ...]


def _sampling(name: str) -> Apply:
    return lambda request, value: replace(request, sampling=replace(request.sampling, **{name: value}))


def _guidance(name: str) -> Apply:
    def apply(request: PictureRequest, value: Any) -> PictureRequest:
        guidance = replace(request.sampling.guidance, **{name: value})
        return replace(request, sampling=replace(request.sampling, guidance=guidance))

    return apply


def _number(text: str) -> float:
    return float(text)


def _sigma_max(text: str) -> float | str:
    return text if text in ("pure", "ui", "canvas") else float(text)


def _sigma_or_none(text: str) -> float | None:
    return None if text == "never" else float(text)


def _canvas(text: str) -> tuple[int, int]:
    height, width = (int(side) for side in text.lower().replace("×", "x").split("x"))
    return height, width


def _one_of(kind: Any) -> Callable[[str], str]:
    known = typing.get_args(kind)

    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return text

    return read


SETTINGS: dict[str, tuple[Callable[[str], Any], Apply, str]] = {
    "sigma_max": (_sigma_max, _sampling("sigma_max"), "pure, ui, canvas or a sigma"),
    "steps": (int, _sampling("steps"), "whole numbers"),
    "sampler": (_one_of(SamplerName), _sampling("sampler"), "names of samplers"),
    "grid": (_one_of(Grid), _sampling("grid"), "names of grids"),
    "cfg": (_number, _guidance("guidance_scale"), "numbers"),
    "rescale": (_number, _guidance("guidance_rescale"), "numbers from 0 to 1"),
    "skip_above_sigma": (_sigma_or_none, _guidance("skip_above_sigma"), "sigmas, or never"),
    "canvas": (_canvas, lambda request, value: replace(request, canvas=value), "HEIGHTxWIDTH"),
    "seed": (int, lambda request, value: replace(request, seed=value), "whole numbers"),
    "prompt": (str, lambda request, value: replace(request, prompt=value), "prompts in quotes"),
    "negative_prompt": (str, lambda request, value: replace(request, negative_prompt=value), "prompts in quotes"),
    MODEL_AXIS: (Path, lambda request, value: request, "models, or RUN/checkpoints/step-…"),
}
"""Setting → how a value is read, how it is put into a request, and what values are."""


def parse_axis(words: Sequence[str], flag: str) -> Axis:
    """`("cfg", "3.5", "5")` as an axis.

    Raises: ConfigError for a setting that is none, or a value that it cannot take.
    """
    if len(words) < 2 or words[0] not in SETTINGS:
        known = ", ".join(SETTINGS)
        found = " ".join(words) or "nothing"
        raise ConfigError(f"{flag}: expected a setting ({known}) and its values, found '{found}'")
    setting, *texts = words
    read, _, kind = SETTINGS[setting]
    values = []
    for text in texts:
        try:
            values.append(read(text))
        except ValueError as error:
            raise ConfigError(f"{flag}: '{text}' is no value of {setting}, which takes {kind} ({error})") from error
    return Axis(setting, tuple(texts), tuple(values))


def draw_grid(
    candidates: Sequence[Candidate],
    base: PictureRequest,
    rows: Axis,
    columns: Axis,
    *,
    count: int = 1,
    batch_size: int = 4,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """The cells, row by row; `candidates` are the models of the axis `model`, or the one model of all cells.

    A base canvas of (0, 0) stands for each model's own. Raises: ConfigError for what a model cannot draw.
    """
    if rows.setting == columns.setting:
        raise ConfigError(f"rows and columns are both {rows.setting}; give two settings")
    wanted = [
        (row, column, _model_of(candidates, rows, columns, row, column))
        for row in range(len(rows.values))
        for column in range(len(columns.values))
    ]
    asked = [
        [_request(base, rows, columns, row, column, candidate, seed) for seed in range(count)]
        for row, column, candidate in wanted
    ]
    total = sum(request.sampling.steps for requests in asked for request in requests)
    drawn: dict[int, tuple[Image.Image, ...]] = {}
    done = 0
    for candidate in {id(each): each for _, _, each in wanted}.values():
        places = [place for place, (_, _, each) in enumerate(wanted) if each is candidate]
        requests = [request for place in places for request in asked[place]]
        images = []
        for picture in draw_pictures(candidate.model, requests, batch_size=batch_size):
            images.append(picture.image)
            done += picture.request.sampling.steps
            if on_step is not None:
                on_step(done, total)
        for number, place in enumerate(places):
            drawn[place] = tuple(images[number * count : (number + 1) * count])
    return [
        Cell(rows.labels[row], columns.labels[column], candidate.name, tuple(asked[place]), drawn[place])
        for place, (row, column, candidate) in enumerate(wanted)
    ]


def _model_of(candidates: Sequence[Candidate], rows: Axis, columns: Axis, row: int, column: int) -> Candidate:
    if MODEL_AXIS not in (rows.setting, columns.setting):
        return candidates[0]
    return candidates[row if rows.setting == MODEL_AXIS else column]


def _request(
    base: PictureRequest, rows: Axis, columns: Axis, row: int, column: int, candidate: Candidate, place: int
) -> PictureRequest:
    request = base if any(base.canvas) else replace(base, canvas=native_canvas(candidate.model))
    request = SETTINGS[rows.setting][1](request, rows.values[row])
    request = SETTINGS[columns.setting][1](request, columns.values[column])
    return replace(request, seed=request.seed + place)


def grid_picture(cells: Sequence[Cell], rows: Axis, columns: Axis, title: str) -> Image.Image:
    """All cells with their labels; several pictures of a cell stand side by side in it."""
    width = len(columns.labels)
    pictures = [cell.images[0] if len(cell.images) == 1 else picture_grid(cell.images) for cell in cells]
    return labelled_grid(
        [pictures[start : start + width] for start in range(0, len(pictures), width)],
        [f"{rows.setting} {label}" for label in rows.labels],
        [f"{columns.setting} {label}" for label in columns.labels],
        title=title,
    )


def table_rows(cells: Sequence[Cell], rows: Axis, columns: Axis) -> list[dict[str, Any]]:
    """A line a picture: its two settings, its seed, and its numbers."""
    lines = []
    for cell in cells:
        for request, image in zip(cell.requests, cell.images, strict=True):
            pixels = np.asarray(image)[None]
            lines.append(
                {
                    rows.setting: cell.row,
                    columns.setting: cell.column,
                    "of_model": cell.model,
                    "of_seed": request.seed,
                    "height": image.height,
                    "width": image.width,
                    "brightness": round(float(brightness(pixels)[0]), 4),
                    "saturation": round(float(saturation(pixels)[0]), 4),
                    "sharpness": round(float(sharpness(pixels)[0]), 4),
                }
            )
    return lines
